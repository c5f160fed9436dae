# SPDX-License-Identifier: MIT
"""Servers that begin in a tenth of a second: one process imports everything and forks for each life of the server.

Each life runs `twistd -n polarismail`, in a session of its own so that all its processes can be ended at once. `fresh`
lives start a new interpreter instead, as an operator's does; the environment reaches only those before Python starts.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import pkgutil
import resource
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
_libc = ctypes.CDLL(None)
_START = "from twisted.scripts.twistd import run; run()"


class Life:
    """One running server. `listener` is for a FaultyDisk where the life is watched, else None."""

    def __init__(self, lives: Lives, pid: int, listener: int | None) -> None:
        self._lives, self.pid, self.listener = lives, pid, listener
        self._status: int | None = None

    def kill(self) -> None:
        """SIGKILL for every process of it; does not wait."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def freeze(self) -> None:
        """Not one more instruction of any of its threads. Returns when that is so; calls into the kernel may still end.

        Each thread that runs is told: the kernel gives a signal for the process to one of them, which may be inside a call
        that it does not leave before we say so (a FaultyDisk's), and the others would never hear of it.
        """
        while running := [(pid, thread) for pid in _family(self.pid) for thread in _running_threads(pid)]:
            for pid, thread in running:
                _libc.tgkill(pid, thread, signal.SIGSTOP)
            time.sleep(0.0005)

    def wait(self) -> int:
        """Wait until it has ended; its exit status, negative for a signal. Whatever it leaves behind is killed."""
        if self._status is None:
            self._status = int(self._lives.ask({"wait": self.pid})[0]["status"])
            self.kill()
        return self._status

    def ended(self) -> int | None:
        """The exit status, or None while it lives."""
        if self._status is None:
            status = self._lives.ask({"poll": self.pid})[0]["status"]
            self._status = None if status is None else int(status)
        return self._status

    def terminate(self) -> int:
        """SIGTERM, and wait; the exit status."""
        os.kill(self.pid, signal.SIGTERM)
        return self.wait()


def _family(pid: int) -> list[int]:
    """The process and its descendants."""
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):
            found += map(int, Path(f"/proc/{each}/task/{each}/children").read_text().split())
    return found


def _running_threads(pid: int) -> list[int]:
    """Those that are not stopped, dead, or inside a call that they cannot leave but to stop."""
    running = []
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # gone
            if path.read_text().rpartition(")")[2].split()[0] not in "TtDZX":
                running.append(int(path.parent.name))
    return running


class Lives:
    """Begins lives. To be closed; what still lives is killed then."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.lives", str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd=ROOT
        )
        theirs.close()

    def begin(
        self,
        config: Path,
        log: Path,
        *,
        clock_offset: float = 0.0,
        watched: bool = False,
        fresh: bool = False,
        environment: dict[str, str] | None = None,
        descriptors: int | None = None,
        careless: str = "",
    ) -> Life:
        """A server with this configuration; what it prints is appended to `log`. `descriptors`: RLIMIT_NOFILE.

        `careless`: a server that does not keep its promises ("database": commits that are not synced; "maildirs":
        deliveries that are not), for tests of whether that would be noticed.
        """
        words = ["-n", "--pidfile=", "polarismail", "--config", str(config), "--clock-offset", str(clock_offset)]
        order = {
            "words": words,
            "log": str(log),
            "watched": watched,
            "fresh": fresh,
            "environment": environment or {},
            "descriptors": descriptors,
            "careless": careless,
        }
        answer, received = self.ask(order)
        return Life(self, int(answer["pid"]), received[0] if received else None)

    def ask(self, order: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        """One order to the process that forks, and its answer."""
        self._socket.send(json.dumps(order).encode())
        octets, descriptors, _, _ = socket.recv_fds(self._socket, 65536, 1)
        if not octets:
            raise RuntimeError("the process that begins lives has ended")
        return json.loads(octets), descriptors

    def close(self) -> None:
        """End it all."""
        self._socket.close()
        self._process.wait()


def _import_everything() -> None:
    import polarismail

    for module in pkgutil.walk_packages(polarismail.__path__, "polarismail."):
        # The factory of SMTP would choose a reactor; migrations are not modules for everybody.
        if module.name == "polarismail.serve.smtp" or ".migrations." in module.name or "__main__" in module.name:
            continue
        importlib.import_module(module.name)
    for name in (
        "alembic.command",
        "alembic.runtime.migration",
        "argon2.low_level",
        "sqlalchemy.dialects.sqlite.pysqlite",
        "twisted.internet.epollreactor",
        "twisted.protocols.tls",
        "twisted.scripts.twistd",
    ):
        importlib.import_module(name)
    assert "twisted.internet.reactor" not in sys.modules, "each life chooses its own reactor"
    import gc

    gc.collect()
    gc.freeze()


def _live(order: dict[str, Any], answers: socket.socket) -> None:
    """The child: become the server."""
    os.setsid()
    with open(order["log"], "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if order["descriptors"]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (order["descriptors"], order["descriptors"]))
    os.environ.update(order["environment"])
    _be_careless(order["careless"])
    answer = json.dumps({"pid": os.getpid()}).encode()
    if order["watched"]:
        from polarismail.testing_disk import watch_this_process

        listener = watch_this_process()
        socket.send_fds(answers, [answer], [listener])
        os.close(listener)
    else:
        answers.send(answer)
    answers.close()
    if order["fresh"]:
        os.execv(sys.executable, [sys.executable, "-c", _START, *order["words"]])
    from tests.crash.forked import fork_spawners

    fork_spawners()
    sys.argv = [sys.executable, *order["words"]]
    from twisted.scripts.twistd import run

    run()


def _be_careless(what: str) -> None:
    from polarismail.store import database, maildir_delivery

    if what == "database":
        make_engine = database.make_engine
        database.make_engine = lambda url, *, durable, writes: make_engine(url, durable=False, writes=writes)
    elif what == "maildirs":
        maildir_delivery._libc = types.SimpleNamespace(syncfs=lambda descriptor: 0)


def _serve(orders: socket.socket) -> None:
    alive: set[int] = set()
    while octets := orders.recv(65536):
        order = json.loads(octets)
        if "wait" in order or "poll" in order:
            pid = order.get("wait") or order["poll"]
            found, status = os.waitpid(pid, 0 if "wait" in order else os.WNOHANG)
            if found:
                alive.discard(pid)
            orders.send(json.dumps({"status": os.waitstatus_to_exitcode(status) if found else None}).encode())
            continue
        pid = os.fork()
        if not pid:
            status = 70
            try:
                _live(order, orders)
                status = 0
            except SystemExit as ended:
                status = ended.code if isinstance(ended.code, int) else 1
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        alive.add(pid)
    for pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    _import_everything()
    _serve(socket.socket(fileno=int(sys.argv[1])))
