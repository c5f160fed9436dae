# SPDX-License-Identifier: MIT
"""Workers that begin in a tenth of a second: the supervisor's child becomes a worker by calling its main, without an exec.

All that Twisted keeps for the supervisor's process is taken out of the child first. A share of the lives of each run is
`fresh` (tests/crash/lives.py), with interpreters of their own, so that nothing rests on this alone.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from typing import Any

from twisted.internet import process


def fork_workers() -> None:
    """From now on `spawnProcess` of a worker forks; of anything else it does what it always does."""
    execute = process.Process._execChild

    def become(self: Any, path: Any, uid: Any, gid: Any, executable: Any, args: Any, environment: Any) -> None:
        if b"polarismail.worker" not in args and "polarismail.worker" not in args:
            execute(self, path, uid, gid, executable, args, environment)
        status = 70
        try:
            _forget_the_supervisor()
            from polarismail import worker

            worker.main()
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    process.Process._execChild = become
    process.Process._trySpawnInsteadOfFork = lambda self, *arguments: False


def _forget_the_supervisor() -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    from twisted.internet import epollreactor
    from twisted.logger import _global

    from twisted import internet, logger

    logger.globalLogPublisher._observers = []
    _global.globalLogBeginner._temporaryObserver = _global.LimitedHistoryLogObserver()
    old = sys.modules.pop("twisted.internet.reactor", None)
    if old is not None:
        del internet.reactor
    epollreactor.install()
    new = sys.modules["twisted.internet.reactor"]
    for module in list(sys.modules.values()):
        if getattr(module, "reactor", None) is old and old is not None:
            module.reactor = new  # type: ignore[attr-defined]
    gc.enable()
