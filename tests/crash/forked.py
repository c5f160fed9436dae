# SPDX-License-Identifier: MIT
"""A supervisor whose spawner begins in a tenth of a second: forked from what has everything imported, without an exec.

What Twisted keeps for the supervisor's process is taken out of it first. A share of the lives of each run is `fresh`
(tests/crash/lives.py), with interpreters of their own, so that nothing rests on this alone.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from typing import Any

from polarismail import spawner


class _Forked:
    """As much of a subprocess.Popen as the supervisor uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def wait(self) -> None:
        os.waitpid(self.pid, 0)


def fork_spawners() -> None:
    """From now on a Spawner of this process forks."""

    def start(self: Any) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            pid = os.fork()
            if not pid:
                _spawn(theirs.detach())
        self._process, self._reactor = _Forked(pid), None

    spawner.Spawner.__init__ = start


def _spawn(line: int) -> None:
    """Never returns."""
    try:
        kept = sorted((0, 1, 2, line))
        for low, high in zip(kept, [*kept[1:], 4096], strict=True):
            os.closerange(low + 1, high)
        _forget_the_supervisor()
        spawner.main(line)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)


def _forget_the_supervisor() -> None:
    from twisted.logger import _global, globalLogPublisher

    signal.set_wakeup_fd(-1)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    globalLogPublisher._observers = []
    _global.globalLogBeginner._temporaryObserver = _global.LimitedHistoryLogObserver()
