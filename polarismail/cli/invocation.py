# SPDX-License-Identifier: MIT
"""One run of the command: its options, and the way to the operations, on a running server or on its databases.

A command is a coroutine function that gets `call(operation, **arguments)`. Where a server answers at the control socket
the call goes there; where none does, the same Control runs in this process on the databases, under the writers' lock.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import click
from attrs import define

from polarismail.config import Config, load
from polarismail.control_socket import ControlClient, NoServer
from polarismail.store.migrations import rehearse
from polarismail.values.errors import ConfigError

T = TypeVar("T")
Call = Callable[..., Coroutine[Any, Any, Any]]


@define
class Invocation:
    """What was given before the noun, or after it."""

    config_path: str
    as_json: bool

    def load(self) -> Config:
        """The configuration. Raises ConfigError."""
        return load(self.config_path)

    def run(self, work: Callable[[Call], Coroutine[Any, Any, T]]) -> T:
        """Run `work(call)` and return its result. Raises what it raises, and ConfigError, Unavailable, PermissionError."""
        config = self.load()
        try:
            client = ControlClient(config.paths.control_socket)
        except NoServer:
            return _run_offline(config, work)
        try:

            async def call(operation: str, **arguments: Any) -> Any:
                return client.call(operation, **arguments)

            return _drive(work(call))
        finally:
            client.close()


def _into_invocation(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value:
        setattr(context.find_object(Invocation), "as_json" if parameter.name == "as_json" else "config_path", value)


def common(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--json` and `--config` after the noun, too, for those who think of them late; gives the Invocation first."""
    for words, settings in (
        (("--json", "as_json"), {"is_flag": True, "help": "One JSON value for programs."}),
        (("--config", "-c", "config_path"), {"metavar": "FILE", "help": "The configuration file."}),
    ):
        function = click.option(*words, expose_value=False, callback=_into_invocation, **settings)(function)
    return click.make_pass_decorator(Invocation)(function)


def _drive(work: Coroutine[Any, Any, T]) -> T:
    # The client blocks, so that nothing in here ever waits: one step runs it to its end.
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise AssertionError("a command waited for something else than the server")


def _run_offline(config: Config, work: Callable[[Call], Coroutine[Any, Any, T]]) -> T:
    from twisted.internet import reactor, task
    from twisted.internet.defer import Deferred

    from polarismail.cli.offline import OfflineControl

    control = OfflineControl(reactor, config)
    _become_owner(config)
    outcome: list[tuple[T | None, BaseException | None]] = []

    async def main() -> None:
        try:
            await control.start()
            try:
                outcome.append((await work(control.call), None))
            finally:
                await control.stop()
        except BaseException as problem:
            # task.react would print a traceback for what main() turns into one line.
            outcome.append((None, problem))

    try:
        task.react(lambda _: Deferred.fromCoroutine(main()))
    except SystemExit:
        pass  # react ends so always; the outcome is ours to tell
    if not outcome:
        raise KeyboardInterrupt
    result, problem = outcome[-1]
    if problem is not None:
        raise problem
    return result  # type: ignore[return-value]


def _become_owner(config: Config) -> None:
    """As root, act as the owner of the state directory: what we create must belong to the server's user."""
    state = config.paths.state
    try:
        os.makedirs(state, mode=0o700, exist_ok=True)
        owner = os.stat(state)
    except PermissionError:
        raise
    except OSError as problem:
        raise ConfigError(f"{state}: cannot be made: {problem.strerror}") from problem
    if not stat.S_ISDIR(owner.st_mode):
        raise ConfigError(f"{state}: expected a directory")
    if os.geteuid() == 0 and owner.st_uid != 0:
        rehearse()
        os.setgroups([])
        os.setresgid(owner.st_gid, owner.st_gid, owner.st_gid)
        os.setresuid(owner.st_uid, owner.st_uid, owner.st_uid)
