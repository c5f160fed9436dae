# SPDX-License-Identifier: MIT
"""A limit that spans several workers, in slices: what is granted to one is nobody else's, so that the sum never passes it.

The supervisor keeps the book, `Slices`; each worker holds a `Slice` of each limit, asks for more before it is used up, and
gives back what it does not need. A limit may be under-used for a moment, and is never over-used (HOUSE, Processes).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

_ASK_AT = 0.75
"""A worker asks for more when so much of its slice is in use."""


class Slices:
    """The supervisor's book: who holds how much of what."""

    def __init__(self, limits: Mapping[str, int], workers: int) -> None:
        self._limits, self._workers = dict(limits), workers
        self._granted: dict[str, dict[int, int]] = {name: {} for name in limits}

    def change_limits(self, limits: Mapping[str, int]) -> None:
        """Other limits: what is granted already runs down as it is given back."""
        self._limits.update(limits)

    def first(self, worker: int) -> dict[str, int]:
        """What a worker begins with: half of an even share, so that the rest can go where it is needed."""
        share = {name: max(1, limit // (2 * self._workers)) for name, limit in self._limits.items()}
        return {name: self.want(worker, name, wanted) for name, wanted in share.items()}

    def want(self, worker: int, name: str, wanted: int) -> int:
        """Grant up to `wanted` in all; returns what the worker holds from now on. Wanting less gives back."""
        granted = self._granted[name]
        others = sum(held for number, held in granted.items() if number != worker)
        granted[worker] = max(0, min(wanted, self._limits[name] - others))
        return granted[worker]

    def forget(self, worker: int) -> None:
        """It is gone, and so is all that it used."""
        for granted in self._granted.values():
            granted.pop(worker, None)


class Slice:
    """A worker's part of one limit. `used` says how much is in use; `want` asks the supervisor, whose answer is `grant`ed."""

    def __init__(self, granted: int, used: Callable[[], int], want: Callable[[int], None]) -> None:
        self.limit = granted
        self._used, self._want = used, want
        self._asked = False
        self._when_more: list[Callable[[], None]] = []

    def when_more(self, callback: Callable[[], None]) -> None:
        """Call this whenever the slice has grown."""
        self._when_more.append(callback)

    def look(self, waiting: int = 0) -> None:
        """Ask for more where it runs out (`waiting`: so many would be used at once), give back what is idle. Call it now and
        then, and when a use had to be refused."""
        used = self._used()
        if used + waiting >= self.limit * _ASK_AT:
            if not self._asked:
                self._asked = True
                self._want(max(self.limit, (used + waiting) * 2, 4))
        elif used * 4 < self.limit and self.limit > 4 and not self._asked:
            self._asked = True
            self.limit = max(4, used * 2)  # before anybody else may hold it
            self._want(self.limit)

    def grant(self, granted: int) -> None:
        """The supervisor's word."""
        grew, self.limit, self._asked = granted > self.limit, granted, False
        if grew:
            for callback in self._when_more:
                callback()
