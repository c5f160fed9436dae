# SPDX-License-Identifier: MIT
"""Look-ups by key that share their work: many questions become one read, and the same question is asked once.

Guarantees: at most one read is under way; what is asked meanwhile goes into the next one, so that batches form by
themselves and an idle server adds no delay; the number of keys that wait is bounded; every question is answered within
`answer_seconds`; whatever goes wrong is Unavailable ("try again"), never "not found".
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

from twisted.internet.defer import Deferred, fail, maybeDeferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from polarismail.values.errors import Unavailable

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Lookups(Generic[K, V]):
    """`fetch(keys)` reads the values of at most `batch` keys and fires with a dict; a value that is an exception fails
    its own key alone."""

    log = Logger()

    def __init__(
        self,
        fetch: Callable[[Sequence[K]], Deferred[dict[K, V | Unavailable]]],
        reactor: Any,
        *,
        batch: int = 100,
        waiting: int = 10_000,
        answer_seconds: float = 10.0,
    ) -> None:
        self.refused = 0  # questions turned away because too many waited
        self.reads = 0
        self._fetch, self._reactor = fetch, reactor
        self._batch, self._max_waiting, self._answer_seconds = batch, waiting, answer_seconds
        self._waiting: dict[K, list[Deferred[V]]] = {}
        self._asked: dict[K, list[Deferred[V]]] = {}
        self._busy = False

    def ask(self, key: K) -> Deferred[V]:
        """The value of `key`. Fails with Unavailable."""
        asked = self._asked.get(key) or self._waiting.get(key)
        if asked is None:
            if len(self._waiting) >= self._max_waiting:
                self.refused += 1
                return fail(Unavailable("too many look-ups at once"))
            asked = self._waiting[key] = []
        answer: Deferred[V] = Deferred()
        asked.append(answer)
        if not self._busy:
            self._busy = True
            # At the end of this turn of the reactor, so that what arrives together is read together.
            self._reactor.callLater(0, self._read)
        return answer

    def forget_running(self) -> None:
        """What is asked from now on is not answered by a read that has already begun."""
        # The same lists go on being answered by that read; they are only not found by newcomers.
        self._asked = {}

    def _read(self) -> None:
        keys = list(self._waiting)[: self._batch]
        asked = self._asked = {key: self._waiting.pop(key) for key in keys}
        self.reads += 1
        over = False

        def done(values: dict[K, V | Unavailable] | None) -> None:
            nonlocal over
            if over:
                return  # an answer that came after its time
            over = True
            if late.active():
                late.cancel()
            if self._asked is asked:
                self._asked = {}
            if self._waiting:
                self._reactor.callLater(0, self._read)
            else:
                self._busy = False
            self._answer(asked, values)

        def failed(failure: Failure) -> None:
            if failure.check(Unavailable) is None:
                self.log.failure("a look-up failed", failure)
            done(None)

        def give_up() -> None:
            # What waits behind a database that is silent has waited long enough as well.
            waiting, self._waiting = self._waiting, {}
            done(None)
            self._answer(waiting, None)

        late = self._reactor.callLater(self._answer_seconds, give_up)
        maybeDeferred(self._fetch, keys).addCallbacks(done, failed).addErrback(failed)

    def _answer(self, asked: dict[K, list[Deferred[V]]], values: dict[K, V | Unavailable] | None) -> None:
        for key in list(asked):
            value = Unavailable("the database does not answer") if values is None else values[key]
            for answer in asked.pop(key):
                if isinstance(value, Exception):
                    answer.errback(Failure(value))
                else:
                    answer.callback(value)
