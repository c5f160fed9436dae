# SPDX-License-Identifier: MIT
"""One deadline for whatever a connection waits for now, moved for each reply, at the cost of a number.

Guarantees: `expired` is called once the time of the last `allow` is over, never before, and not after `stop`.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any

NEVER = float("inf")


class Deadline:
    """A timer that looks again when it fires: re-arming one for each reply would cost more than the reply."""

    __slots__ = ("_due", "_expired", "_reactor", "_stopped", "_timer", "_timer_due")

    def __init__(self, reactor: Any, expired: Callable[[], None]) -> None:
        self._reactor, self._expired = reactor, expired
        self._due = NEVER
        self._timer: Any = None
        self._timer_due = 0.0
        self._stopped = False

    def allow(self, seconds: float) -> None:
        """So long from now; NEVER: until the next word."""
        self._due = due = monotonic() + seconds
        if self._stopped or seconds == NEVER:
            return
        if self._timer is None:
            self._timer, self._timer_due = self._reactor.callLater(seconds, self._look), due
        elif due < self._timer_due:
            self._timer.reset(seconds)
            self._timer_due = due

    def stop(self) -> None:
        """For good."""
        self._stopped = True
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _look(self) -> None:
        self._timer = None
        left = self._due - monotonic()
        if left <= 0:
            self._expired()
        elif left != NEVER:
            self._timer, self._timer_due = self._reactor.callLater(left, self._look), self._due
