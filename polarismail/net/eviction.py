# SPDX-License-Identifier: MIT
"""Who must go when all places are taken and somebody comes: those who have kept us waiting longest, from crowded networks
first.

A client that dribbles is behind for seconds, one that means it for milliseconds; so under a flood of clients that only hold
places an honest newcomer is taken, and stays (HOSTILE E6, F12).

Guarantees: who has logged in, or waits for us, is never put out; nor who is behind by less than `LEAST_SECONDS`. One look
at all connections makes room for a twentieth of them, and one that found too little is not repeated at once, so that a
newcomer costs microseconds, however many there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any

from polarismail.net.limits import ConnectionCounter

LEAST_SECONDS = 1.0
_A_PART = 20
_REST_SECONDS = 0.2


def choose(standing: Iterable[tuple[float, str, Any]], number: int, least_seconds: float = LEAST_SECONDS) -> list[Any]:
    """Of (seconds behind, network, connection) at most `number` that should go."""
    candidates = list(standing)
    crowd = Counter(network for _, network, _ in candidates)
    ranked = [
        (seconds * crowd[network], at)
        for at, (seconds, network, _) in enumerate(candidates)
        if seconds >= least_seconds
    ]
    ranked.sort(reverse=True)
    return [candidates[at][2] for _, at in ranked[:number]]


class Eviction:
    """Makes room among the connections of one counter. Sets the counter's `make_room`."""

    def __init__(self, counter: ConnectionCounter, *, now: Callable[[], float] = monotonic) -> None:
        self._counter, self._now = counter, now
        self._rests_until = 0.0
        self.put_out = 0  # since the start
        counter.make_room = self.make_room

    def make_room(self, least_seconds: float | None = None) -> bool:
        """Put out some of those who are behind by `least_seconds`; whether there is room for one now."""
        now = self._now()
        if now < self._rests_until:
            return False
        counter = self._counter
        standing = [
            (connection.behind, connection.network, (factory, connection))
            for factory in counter.factories
            for connection in factory.connections
        ]
        number = max(1, len(standing) // _A_PART)
        chosen = choose(standing, number, LEAST_SECONDS if least_seconds is None else least_seconds)
        if len(chosen) < number:
            self._rests_until = now + _REST_SECONDS
        for factory, connection in chosen:
            connection.put_out(factory.busy)
        self.put_out += len(chosen)
        return bool(chosen)
