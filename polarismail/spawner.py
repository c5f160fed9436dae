# SPDX-License-Identifier: MIT
"""The process that workers are forked from: it has everything imported, no thread, no socket of its own, and no privileges.

It is started while its parent may still be root, because Python itself may lie where the later user cannot read; it drops
what root it had before it forks anybody. So a worker takes milliseconds to start, at any time, and shares the memory of
what was imported with its fellows.

The supervisor sends packets over a socket pair: `drop`, then `spawn` with the descriptors that the worker inherits. The
spawner answers `started` and `ended`, and goes when the supervisor does.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.interfaces import IReadDescriptor
from twisted.logger import Logger
from twisted.python.util import switchUID
from zope.interface import implementer

from polarismail.inheritance import import_everything
from polarismail.privileges import check_dropped, forbid_new_privileges
from polarismail.values.errors import ConfigError

_PACKET_OCTETS = 65536
_MOST_DESCRIPTORS = 250  # SCM_MAX_FD of the kernel is 253
_IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM)


# -- the supervisor's side ---------------------------------------------------------------------------------------------


@implementer(IReadDescriptor)
class Spawner:
    """The supervisor's hold on the process. `spawn` and `drop` may be called before the reactor runs; `listen` after."""

    log = Logger()

    def __init__(self) -> None:
        """Start it, as the user that this process is now."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Where this process found its modules is where the other finds them, whatever its directory.
        path = os.pathsep.join(os.path.abspath(each) for each in sys.path)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "polarismail.spawner", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
                pass_fds=(theirs.fileno(),),
            )
        self._reactor: Any = None

    def drop(self, uid: int | None, gid: int | None) -> None:
        """Have it become the user that the service is to be."""
        self._send({"do": "drop", "uid": uid, "gid": gid})

    def spawn(self, number: int, descriptors: Sequence[int]) -> None:
        """Have it fork worker `number` with these descriptors, of which it gets copies. Raises OSError."""
        self._send({"do": "spawn", "number": number}, descriptors)

    def listen(
        self,
        reactor: Any,
        started: Callable[[int, int], None],
        ended: Callable[[int, int], None],
        lost: Callable[[str], None],
    ) -> None:
        """Say from now on: `started(number, pid)`; `ended(number, status)`, as os.waitpid gives it; `lost(why)`, when there is
        no more spawning."""
        self._reactor, self._started, self._ended, self._lost = reactor, started, ended, lost
        self._socket.setblocking(False)
        reactor.addReader(self)

    def stop(self) -> None:
        """Let it go. Idempotent."""
        if self._socket.fileno() >= 0:
            if self._reactor is not None:
                self._reactor.removeReader(self)
            self._socket.close()
            self._process.wait()

    def fileno(self) -> int:
        """IReadDescriptor."""
        return self._socket.fileno()

    def logPrefix(self) -> str:
        """ILoggingContext."""
        return "spawner"

    def connectionLost(self, reason: Any) -> None:
        """The reactor is at its end."""

    def doRead(self) -> None:
        """One packet of the spawner's."""
        try:
            packet = self._socket.recv(_PACKET_OCTETS)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            self.stop()
            self._lost(f"the process that starts workers has ended with status {self._process.returncode}")
            return
        said = json.loads(packet)
        try:
            if said["say"] == "started":
                self._started(said["number"], said["pid"])
            elif said["say"] == "ended":
                self._ended(said["number"], said["status"])
            else:
                self._lost(said["problem"])
        except Exception:
            self.log.failure("what the spawner says")

    def _send(self, words: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        if len(descriptors) > _MOST_DESCRIPTORS:
            raise OSError(f"a worker inherits at most {_MOST_DESCRIPTORS} descriptors: name fewer listeners")
        socket.send_fds(self._socket, [json.dumps(words).encode("ascii")], list(descriptors))


# -- the process -------------------------------------------------------------------------------------------------------


def main(descriptor: int) -> None:
    """Fork workers until the supervisor hangs up."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)  # they reach the whole group; the supervisor answers them, in order
    line = socket.socket(fileno=descriptor)
    line.set_inheritable(False)
    import_everything()
    importlib.import_module("polarismail.service")
    # What is here now stays shared with every worker: the collector must not touch it.
    gc.collect()
    gc.freeze()
    wakes, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    children: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([line.fileno(), wakes], [], [])
        if wakes in ready:
            os.read(wakes, 4096)
            _reap(line, children)
        if line.fileno() not in ready:
            continue
        try:
            packet, descriptors, _, _ = socket.recv_fds(line, _PACKET_OCTETS, _MOST_DESCRIPTORS + 3)
        except ConnectionResetError:
            return
        if not packet:
            return
        words = json.loads(packet)
        if words["do"] == "drop":
            if not _drop(line, words["uid"], words["gid"]):
                return
        else:
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                os.close(wakes)
                os.close(woken)
                line.close()
                _become_worker(descriptors)
            children[pid] = words["number"]
            for each in descriptors:
                os.close(each)
            _say(line, {"say": "started", "number": words["number"], "pid": pid})


def _drop(line: socket.socket, uid: int | None, gid: int | None) -> bool:
    try:
        if (uid is not None and uid != os.getuid()) or (gid is not None and gid != os.getgid()):
            switchUID(uid, gid)
        check_dropped(uid, gid)
        forbid_new_privileges()
    except (ConfigError, OSError) as problem:
        _say(line, {"say": "failed", "problem": f"polarismail cannot start: {problem}"})
        return False
    return True


def _reap(line: socket.socket, children: dict[int, int]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        number = children.pop(pid, None)
        if number is not None:
            _say(line, {"say": "ended", "number": number, "status": status})


def _say(line: socket.socket, words: dict[str, Any]) -> None:
    try:
        line.send(json.dumps(words).encode("ascii"))
    except OSError:
        return  # the supervisor has gone: the next read says so


def _become_worker(descriptors: list[int]) -> None:
    """Never returns."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        from polarismail.worker import main as work

        work(descriptors)
        status = 0
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else 1
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main(int(sys.argv[1]))
