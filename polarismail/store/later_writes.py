# SPDX-License-Identifier: MIT
"""When changes that may be lost are written: in batches, one at a time, a moment after the first of them; a failure is no end.

For memories (the greylist, known clients), whose last moments a power cut may take; promises go through the committer.
What has changed, how it is written, and what a failure leaves are the owner's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, succeed


class LaterWrites:
    """`has_changes` says whether anything waits. `write` begins to write all of it; what it returns fires, and never fails,
    with the seconds until the next write may begin."""

    def __init__(self, reactor: Any, has_changes: Callable[[], bool], write: Callable[[], Deferred[float]]) -> None:
        self._reactor, self._has_changes, self._write = reactor, has_changes, write
        self._under_way: Deferred[None] | None = None
        self._call: Any = None

    def soon(self, seconds: float) -> None:
        """Something has changed: write in so many seconds, unless a write comes before that."""
        if self._call is None and self._under_way is None:
            self._call = self._reactor.callLater(seconds, self._due)

    def stop(self) -> Deferred[None]:
        """Write what is not yet written; fires when that is done or has failed."""
        if self._under_way is not None:
            return self._under_way.addCallback(lambda _: self.stop())
        if self._call is not None:
            self._call.cancel()
            self._call = None
        return self._begin(again=False)

    def _due(self) -> None:
        self._call = None
        self._begin(again=True)

    def _begin(self, again: bool) -> Deferred[None]:
        if not self._has_changes():
            return succeed(None)
        done = self._under_way = Deferred()

        def finish(seconds: float) -> None:
            self._under_way = None
            if again and self._has_changes():
                self.soon(seconds)
            done.callback(None)

        self._write().addCallback(finish)
        return done
