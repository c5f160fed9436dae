# SPDX-License-Identifier: MIT
"""Python processes without the second that Python takes to import: forked from one that has imported everything already.

`spawn(["-m", "polarismail.cli.main", ...])` is `subprocess.Popen([sys.executable, "-m", ...])` for tests that start many. What
runs is the same: the module as `__main__` with its arguments, in a process of its own, with the given standard streams, the
environment and directory that the caller has now, its own session where asked, default signals, and an interpreter that ends
as interpreters do. Left out is exec alone; so what is about starting (tests/cli, packaging, operations, service, privileges,
workers, limits of memory) is started by exec, as people do.

Guarantees: the process that forks has no thread, no reactor and no descriptor but its line; it reaps what it forked; when the
test run ends, or is killed, it kills what is left and goes. One for each process that runs tests, started with its first use.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_PACKET_OCTETS = 262144
# Run as __main__, or about to choose a reactor: these are imported where they run.
_NOT_BEFORE = {"polarismail.cli.main", "polarismail.testing", "polarismail.serve.smtp"}
_MORE = (
    "alembic.command",
    "encodings.idna",
    "rich.progress",
    "sqlalchemy.dialects.sqlite.pysqlite",
    "twisted.internet.epollreactor",
    "twisted.scripts.twistd",
)


# -- the side of the tests ---------------------------------------------------------------------------------------------


class Forked:
    """One process, as far as tests use a `subprocess.Popen`."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self.returncode: int | None = None
        self.pid = int(self._read())

    def _read(self) -> bytes:
        said = self._line.recv(64)
        if not said:
            raise RuntimeError("the process that forks has ended")
        return said

    def poll(self) -> int | None:
        """The exit status, or minus the signal, once it has ended."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The same, waiting for it. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            waiting = select.poll()
            waiting.register(self._line, select.POLLIN)
            if not waiting.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(int(self._read()))
            self._line.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class _Forker:
    def __init__(self) -> None:
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forking", str(theirs.fileno())],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # a Ctrl-C is for the tests
            )
        self.owner = os.getpid()
        atexit.register(self.stop)

    def spawn(self, arguments: Sequence[str], streams: tuple[int, int, int], session: bool) -> Forked:
        told = {
            "arguments": list(arguments),
            "session": session,
            "directory": str(ROOT),
            "environment": dict(os.environ),
        }
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(self._line, [json.dumps(told).encode()], [theirs.fileno(), *streams])
        return Forked(ours)

    def stop(self) -> None:
        if os.getpid() == self.owner:
            self._line.close()
            self._process.wait()


_forkers: list[_Forker] = []
_making = threading.Lock()


def spawn(
    arguments: Sequence[str], *, stdin: Any = None, stdout: Any, stderr: Any, new_session: bool = False
) -> Forked:
    """Run Python with these arguments, which begin with `-m MODULE` or `-c CODE`, in the root of the source. The streams are
    files or descriptors."""
    with _making:
        if not _forkers or _forkers[0].owner != os.getpid():
            _forkers[:] = [_Forker()]
    with open(os.devnull, "rb") as nothing:
        streams = [each if isinstance(each, int) else each.fileno() for each in (stdin or nothing, stdout, stderr)]
        return _forkers[0].spawn(arguments, (streams[0], streams[1], streams[2]), new_session)


# -- the process that forks --------------------------------------------------------------------------------------------


def _import_everything() -> None:
    import polarismail

    for found in pkgutil.walk_packages(polarismail.__path__, "polarismail."):
        if found.name not in _NOT_BEFORE and ".migrations." not in found.name:
            importlib.import_module(found.name)
    for name in _MORE:
        importlib.import_module(name)
    assert "twisted.internet.reactor" not in sys.modules, "each process chooses its own reactor"
    assert threading.active_count() == 1


def serve(descriptor: int) -> dict[str, Any]:
    """Fork until the tests hang up. Returns in each child, with what it is to be."""
    line = socket.socket(fileno=descriptor)
    _import_everything()
    # What is here now stays shared: a collector that touches it would copy it into every child.
    gc.collect()
    gc.freeze()
    wakes, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    children: dict[int, tuple[socket.socket, bool]] = {}
    while True:
        ready, _, _ = select.select([line, wakes], [], [])
        if wakes in ready:
            os.read(wakes, 4096)
            _reap(children)
        if line not in ready:
            continue
        try:
            packet, descriptors, _, _ = socket.recv_fds(line, _PACKET_OCTETS, 4)
        except ConnectionResetError:
            packet = b""
        if not packet:
            _kill(children)
            os._exit(0)
        told = json.loads(packet)
        answer = socket.socket(fileno=descriptors[0])
        pid = os.fork()
        if pid == 0:
            if told["session"]:
                os.setsid()
            # Only now: who knows the number may kill the group.
            answer.send(b"%d" % os.getpid())
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for stream, given in enumerate(descriptors[1:]):
                os.dup2(given, stream)
            for each in (line, answer, *(each for each, _ in children.values())):
                each.detach()
            os.closerange(3, 1 + max(int(name) for name in os.listdir("/proc/self/fd")))
            return told
        children[pid] = answer, told["session"]
        for each in descriptors[1:]:
            os.close(each)


def _reap(children: dict[int, tuple[socket.socket, bool]]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        answer, _ = children.pop(pid)
        with answer, suppress(OSError):
            answer.send(b"%d" % status)


def _kill(children: dict[int, tuple[socket.socket, bool]]) -> None:
    for pid, (_, session) in children.items():
        if session:
            with suppress(ProcessLookupError):  # it has only just been forked
                os.killpg(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def become(told: dict[str, Any]) -> None:
    """What the interpreter would do with these arguments."""
    os.environ.clear()
    os.environ.update(told["environment"])
    os.chdir(told["directory"])
    # As an interpreter makes them: blocks where nobody watches, lines on standard error.
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)
    kind, what, *rest = told["arguments"]
    if kind == "-m":
        sys.argv[:] = [what, *rest]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = ["-c", *rest]
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})


if __name__ == "__main__":
    # In each child all frames of the loop are gone here, so that it ends like any other interpreter.
    become(serve(int(sys.argv[1])))
