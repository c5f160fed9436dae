# SPDX-License-Identifier: MIT
"""How often the garbage collector looks, for a server with many short-lived objects and many that stay; and that the memory
of a crowd goes back to the system once the crowd has gone.

By default it looks at all that is young after 700 new objects (a dozen connections), and at everything that lives each time
a quarter as much has come; with a new connection for each message that is 40 us a message. What was made while starting never
goes, so it is not looked at any more; and the young are looked at a fourteenth as often.

Guarantees: cycles that are dead still go; what they can hold back is bounded by the 10,000 objects that may come between
two looks (some 500 connections that are gone).
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import Any

_YOUNG, _MIDDLE, _OLD = 10_000, 20, 20
_CROWD = 1000
_LOOK_SECONDS = 5.0


def settle() -> None:
    """Call once everything has started: what lives now is taken for permanent. Harmless when called again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _MIDDLE, _OLD)


class Relief:
    """Looks now and then how many sessions there are; when three of four of a crowd have left, what they held is given back.

    What TLS leaves in circles is found by a look at the few objects that still live (some milliseconds), and the allocator
    hands on what it would keep for the next crowd.
    """

    def __init__(self, reactor: Any, sessions: Callable[[], int]) -> None:
        self._reactor, self._sessions = reactor, sessions
        self._most = 0
        self._call: Any = None

    def start(self) -> None:
        """Begin to look."""
        self._call = self._reactor.callLater(_LOOK_SECONDS, self.look)

    def stop(self) -> None:
        """End. Idempotent."""
        call, self._call = self._call, None
        if call is not None and call.active():
            call.cancel()

    def look(self) -> None:
        """Once, and again in a while."""
        self._call = self._reactor.callLater(_LOOK_SECONDS, self.look)
        sessions = self._sessions()
        self._most = max(self._most, sessions)
        if self._most >= _CROWD and sessions * 4 < self._most:
            self._most = sessions
            give_back()


def give_back() -> None:
    """Collect what is dead, and hand free memory to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # the GNU C library's
    if trim is not None:
        trim(0)
