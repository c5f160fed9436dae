# SPDX-License-Identifier: MIT
"""Verdicts that come in thousands, settled piece by piece: a site that is down must not stop the reactor for new mail.

Guarantees: every item is settled once, in pieces of at most `PIECE`; `finish` leaves none. While the server is busy with new
mail, this takes at most a quarter of the reactor's time; else it only lets others have their turn between two pieces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from attrs import evolve

from polarismail.relay.sites import Verdict

PIECE = 50
_REST = 3.0  # times as long as a piece took


class Pieces:
    """`settle` gets verdicts of at most PIECE items; `is_busy` says whether somebody else needs the time."""

    def __init__(self, reactor: Any, settle: Callable[[Verdict], None], is_busy: Callable[[], bool]) -> None:
        self._reactor, self._settle, self._is_busy = reactor, settle, is_busy
        self._waiting: deque[Verdict] = deque()
        self._at = 0  # items of the first one that are settled
        self._timer: Any = None

    def put(self, verdict: Verdict) -> None:
        """Settle it: now where it is small, else from the next turn on."""
        if len(verdict.items) <= PIECE:
            self._settle(verdict)
            return
        self._waiting.append(verdict)
        if self._timer is None:
            self._timer = self._reactor.callLater(0, self._turn)

    def finish(self) -> None:
        """Settle all that waits, now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            self._next()

    def _turn(self) -> None:
        began = self._reactor.seconds()
        self._timer = None
        try:
            self._next()
        finally:
            if self._waiting:
                took = max(0.0, self._reactor.seconds() - began)
                rest = min(took * _REST, 1.0) if self._is_busy() else 0.0
                self._timer = self._reactor.callLater(rest, self._turn)

    def _next(self) -> None:
        verdict, at = self._waiting[0], self._at
        self._at += PIECE
        if self._at >= len(verdict.items):
            self._waiting.popleft()
            self._at = 0
        items, replies = verdict.items[at : at + PIECE], verdict.replies[at : at + PIECE]
        self._settle(evolve(verdict, items=items, replies=replies))
