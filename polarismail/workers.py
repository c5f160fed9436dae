# SPDX-License-Identifier: MIT
"""The supervisor of several equal workers: starts them, watches them, starts anew who died, and stops them in order.

Guarantees
    Listening sockets are bound once, before privileges go, and are open as long as the supervisor lives: a client that comes
    while a worker is replaced waits in line. What a dead worker had in hand is released at once, and its sites and slices
    are another's. A worker that gives no sign of life for `SILENT_SECONDS` is killed. SIGTERM lets transactions finish.
Never
    A database, a spool or a thread in this process: it does not hang on a disk, and there is little in it to go wrong.
HOUSE, "Processes".
"""

from __future__ import annotations

import os
import signal
import socket
from typing import Any

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall, deferLater

from polarismail import __version__, control_socket, reloading
from polarismail.channel import Channel
from polarismail.config import Config
from polarismail.fellows import RELAY
from polarismail.inheritance import Inheritance, Place, Prepared, patiently
from polarismail.net.shares import Shares, make_memory
from polarismail.net.slices import Slices
from polarismail.spawner import Spawner
from polarismail.top_service import TopService
from polarismail.values.errors import ConfigError, PolarisError

SILENT_SECONDS = 60.0
_START_SECONDS = 120.0  # migrations included
_WATCH_SECONDS = 5.0
_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.1, 30.0
_STEADY_SECONDS = 10.0
"""Who lived so long is started anew at once when it dies."""


@define(eq=False)
class Worker:
    """One worker process. `incarnation` is 0 until it is ready."""

    number: int
    channel: Channel
    started: float
    pid: int = 0
    incarnation: int = 0
    bus_name: str = ""
    ended: Deferred[None] = field(factory=Deferred)


@define
class _Reload:
    """One that is under way: what the log will say, and who has not taken it yet."""

    fields: dict[str, str]
    waiting: set[int]


class Supervisor(TopService):
    """`config` as it was read from `text`, the file at `config_path`."""

    def __init__(self, config: Config, config_path: str, text: str, **given: Any) -> None:
        """`given`: what TopService takes."""
        super().__init__(config, config_path, **given)
        self._text = text
        self._newer: str | None = None
        self._control: socket.socket | None = None
        self.workers: dict[int, Worker] = {}
        self._count = config.worker_count
        self._version = 0
        self._delays: dict[int, float] = {}
        self._restarts: set[Any] = set()
        self._has_served = False
        self._reload: _Reload | None = None
        self._watch = LoopingCall(self._look)

    # -- start -------------------------------------------------------------------------------------------------------

    def _prepare(self) -> Prepared:
        prepared = super()._prepare()
        self._spawner = Spawner()
        return prepared

    def startService(self) -> None:
        """Start the workers, as the user that the service is now. A failure ends the process with status 1."""
        super().startService()
        self._watch.clock = self.reactor
        try:
            self._spawner.drop(self._uid, self._gid)
            self._open_log()
            self._control = patiently(
                lambda: control_socket.listen(self.config.paths.control_socket, self.config.control)
            )
        except (PolarisError, OSError) as problem:
            raise SystemExit(f"polarismail cannot start: {problem}") from problem
        self._memory = make_memory(self._count)
        self._shares = Shares(self._memory, self._count)
        self._slices = Slices(self._limits(self.config), self._count)
        self._install_signals(self.reload, self._reopen)
        self._spawner.listen(self.reactor, self._started, self._ended, self._fail)
        for number in range(self._count):
            self._start(number)
        self._watch.start(_WATCH_SECONDS, now=False)

    @staticmethod
    def _limits(config: Config) -> dict[str, int]:
        return {RELAY: config.relay.connections}

    def _start(self, number: int) -> None:
        if self._stopping or number in self.workers:
            return
        assert self._prepared is not None and self._control is not None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        descriptors = [theirs.fileno(), self._memory, self._control.fileno()]
        sockets: dict[str, list[int]] = {}
        for name, bound in self._prepared.bound.items():
            sockets[name] = list(range(len(descriptors), len(descriptors) + len(bound)))
            descriptors += [each.fileno() for each in bound]
        certificates = self._prepared.certificates
        inheritance = Inheritance(
            place=Place(number, self._count, os.getpid(), grants=self._slices.first(number)),
            config_path=os.path.abspath(self.config_path),
            text=self._text,
            newer=self._newer,
            clock_offset_seconds=self._offset,
            uid=self._uid,
            gid=self._gid,
            sockets=sockets,
            pem=None if certificates is None else certificates.pem,
        )
        with theirs:
            self._spawner.spawn(number, descriptors)
        channel = Channel(self.reactor, ours.detach())
        self.workers[number] = Worker(number, channel, self.reactor.seconds())
        channel.subscribe("ready", lambda incarnation, name="": self._ready(number, incarnation, name))
        channel.subscribe("failed", lambda problem: self._failed(number, problem))
        channel.subscribe("reloaded", lambda problem: self._reloaded(number, problem))
        channel.subscribe("want", lambda name, wanted: self._want(number, name, wanted))
        channel.say_raw(inheritance.render())

    def _started(self, number: int, pid: int) -> None:
        self.workers[number].pid = pid

    # -- what workers say --------------------------------------------------------------------------------------------

    def _ready(self, number: int, incarnation: int, name: str) -> None:
        worker = self.workers[number]
        worker.incarnation, worker.bus_name = incarnation, name or str(incarnation)
        self.telemetry.record_event("worker-ready", {"worker": number, "pid": worker.pid})
        self._announce()
        if not self._has_served and all(each.incarnation for each in self.workers.values()):
            self._has_served = True
            self.telemetry.record_event(
                "started",
                {
                    "version": __version__,
                    "pid": os.getpid(),
                    "hostname": self.config.hostname,
                    "workers": self._count,
                },
            )

    def _announce(self) -> None:
        """Who lives, to all who live."""
        self._version += 1
        living = {number: each for number, each in self.workers.items() if each.incarnation}
        members = {str(number): each.incarnation for number, each in living.items()}
        names = {str(number): each.bus_name for number, each in living.items()}
        for each in living.values():
            each.channel.say("members", version=self._version, members=members, names=names)

    def _want(self, number: int, name: str, wanted: int) -> None:
        self.workers[number].channel.say("grant", name=name, granted=self._slices.want(number, name, wanted))

    def _failed(self, number: int, problem: str) -> None:
        self.log.critical("worker {number} cannot start: {problem}", number=number, problem=problem)
        if not self._has_served:
            self._fail(f"polarismail cannot start: {problem}")

    # -- ends --------------------------------------------------------------------------------------------------------

    def _ended(self, number: int, status: int) -> None:
        worker = self.workers.pop(number)
        worker.channel.close()
        self._shares.clear(number)
        self._slices.forget(number)
        code = os.waitstatus_to_exitcode(status)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        self.telemetry.record_event("worker-ended", {"worker": number, "pid": worker.pid, "how": how})
        if worker.incarnation:
            self._announce()
            for each in self.workers.values():
                each.channel.say("dead", incarnation=worker.incarnation)
        worker.ended.callback(None)
        self._reloaded(number, "")
        if self._stopping:
            return
        if not worker.incarnation and not self._has_served:
            self._fail(f"polarismail cannot start: worker {number} ended before it was ready: {how}")
            return
        lived = self.reactor.seconds() - worker.started
        delay = _FIRST_DELAY_SECONDS
        if lived < _STEADY_SECONDS:
            delay = min(self._delays.get(number, _FIRST_DELAY_SECONDS) * 2, _LONGEST_DELAY_SECONDS)
        self._delays[number] = delay
        self.log.error(
            "worker {number} {how} after {lived:.0f} s: another one in {delay:.1f} s",
            number=number, how=how, lived=lived, delay=delay,
        )  # fmt: skip
        again = self.reactor.callLater(delay, self._start_again, number)
        self._restarts.add(again)

    def _start_again(self, number: int) -> None:
        self._restarts = {each for each in self._restarts if each.active()}
        self._start(number)

    def _look(self) -> None:
        """Kill who hangs: its clients and its mail are served by others then."""
        for number, worker in self.workers.items():
            silent = self._shares.silent_seconds(number)
            starting = 0.0 if worker.incarnation else self.reactor.seconds() - worker.started
            if worker.pid and (silent > SILENT_SECONDS or starting > _START_SECONDS):
                self.log.critical("worker {number} gives no sign of life: it is killed", number=number)
                os.kill(worker.pid, signal.SIGKILL)

    def _fail(self, problem: str) -> None:
        if self._stopping:
            return
        self.log.critical("{problem}", problem=problem)
        self._end_in_failure()

    def stopService(self) -> Deferred[None]:
        """Close the listening sockets, let every worker finish its transactions, wait for their ends. Never fails."""
        super().stopService()
        self._stopping = True
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        if self._watch.running:
            self._watch.stop()
        for call in self._restarts:
            if call.active():
                call.cancel()
        if self._prepared is not None:
            self._prepared.close()
        if self._control is not None:
            self._control.close()
            control_socket.remove(self.config.paths.control_socket)
        for worker in self.workers.values():
            worker.channel.say("stop")
        patience = self.config.transport.drain_seconds + 2 * self.config.relay.stop_seconds + 10
        until = self.reactor.seconds() + patience
        while self.workers and self.reactor.seconds() < until:
            await deferLater(self.reactor, 0.05)
        for worker in [each for each in self.workers.values() if each.pid]:
            self.log.error("worker {number} does not end: it is killed", number=worker.number)
            os.kill(worker.pid, signal.SIGKILL)
            await worker.ended
        self._spawner.stop()
        self._close_log()

    # -- reload ------------------------------------------------------------------------------------------------------

    def _reopen(self) -> None:
        self.telemetry.reopen()
        for worker in self.workers.values():
            worker.channel.say("reopen")

    def reload(self) -> str:
        """SIGHUP: reopen the log, read configuration and certificate again, and have every worker take what was read.
        Returns "" or what kept the old ones in force."""
        self._reopen()
        assert self._prepared is not None
        certificates = self._prepared.certificates
        try:
            fresh = reloading.read_again(self.config, self.config_path)
            kept = reloading.renew_certificate(certificates, fresh.config, self.config)
        except ConfigError as problem:
            self.telemetry.record_event("reload-failed", {"path": self.config_path, "problem": str(problem)})
            return str(problem)
        self.config, self._newer = fresh.config, fresh.text
        self._slices.change_limits(self._limits(fresh.config))
        read = None if certificates is None else certificates.pem
        pem = None if read is None else [octets.decode("ascii") for octets in read]
        self._reload = _Reload(fresh.describe(self.config_path, kept), set(self.workers))
        for worker in self.workers.values():
            worker.channel.say("reload", text=fresh.text, pem=pem)
        return ""

    def _reloaded(self, number: int, problem: str) -> None:
        """A worker has taken what was read, or is gone; when all have, the log says so."""
        if problem:
            self.telemetry.record_event(
                "reload-failed", {"path": self.config_path, "problem": problem, "worker": number}
            )
        if self._reload is not None:
            self._reload.waiting.discard(number)
            if not self._reload.waiting:
                self.telemetry.record_event("reloaded", self._reload.fields)
                self._reload = None
