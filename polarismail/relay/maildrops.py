# SPDX-License-Identifier: MIT
"""The line in front of local delivery: what was accepted together is delivered together, new mail first.

Guarantees: few batches at a time, so that what waits here may still be taken back; large mail goes message by message in
a line of its own, so that small mail does not wait for it; every recipient handed over gets an outcome.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from polarismail.relay.settings import RelaySettings
from polarismail.store.content import MAILDIR
from polarismail.store.interfaces import Outcome, QueuedRecipient
from polarismail.values.envelope import RecipientState
from polarismail.values.reply import TRY_AGAIN

_FILES_A_BATCH = 64


class Maildrops:
    """`deliver` is LocalDelivery's; `decided` hears of the outcomes of each batch."""

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        deliver: Callable[[list[QueuedRecipient]], Deferred[list[Outcome]]],
        settings: RelaySettings,
        decided: Callable[[list[Outcome]], None],
    ) -> None:
        self._reactor, self._deliver, self._decided = reactor, deliver, decided
        self.settings = settings
        self._fresh: deque[QueuedRecipient] = deque()
        self._retries: deque[QueuedRecipient] = deque()
        self._large: deque[QueuedRecipient] = deque()
        self._small_running = self._large_running = 0
        self._tick: Any = None
        self._next_batch = 0.0
        self._idle: list[Deferred[None]] = []
        self.running = False

    def __len__(self) -> int:
        return len(self._fresh) + len(self._retries) + len(self._large)

    def put(self, recipient: QueuedRecipient) -> None:
        """Deliver in the next turn of the reactor, so that what one group commit accepted is one batch; under load a little
        later, so that batches stay few."""
        message = recipient.message
        if message.size > self.settings.large_octets or message.storage == MAILDIR:
            self._large.append(recipient)
        elif recipient.attempts:
            self._retries.append(recipient)
        else:
            self._fresh.append(recipient)
        self._arm()

    def drop(self, queue_ids: set[str] | None) -> list[QueuedRecipient]:
        """Take back what waits: of these messages, or None for all."""
        taken: list[QueuedRecipient] = []
        for line in (self._fresh, self._retries, self._large):
            everyone = list(line)
            line.clear()
            for each in everyone:
                (taken if queue_ids is None or each.message.queue_id in queue_ids else line).append(each)
        return taken

    def start(self) -> None:
        """Begin, or go on after `pause`."""
        self.running = True
        if len(self):
            self._arm()

    def pause(self) -> None:
        """Begin no batch; those under way go on."""
        self.running = False

    def when_idle(self) -> Deferred[None]:
        """Fires when no batch is under way. Call `pause` first."""
        done: Deferred[None] = Deferred()
        if self._small_running or self._large_running:
            self._idle.append(done)
        else:
            done.callback(None)
        return done

    def _arm(self) -> None:
        # Each batch costs a sync and a transaction, whatever its size: under load one begins each gather_seconds, and
        # when nothing went out lately, at once.
        if self._tick is None:
            wait = self._next_batch - self._reactor.seconds()
            self._tick = self._reactor.callLater(min(max(wait, 0.0), self.settings.gather_seconds), self._drain)

    def _drain(self) -> None:
        self._tick = None
        settings = self.settings
        self._next_batch = self._reactor.seconds() + settings.gather_seconds
        while self.running and self._small_running < settings.local_batches:
            batch = [
                line.popleft()
                for line in (self._fresh, self._retries)
                for _ in range(min(len(line), settings.local_batch))
            ]
            if not batch:
                break
            self._small_running += 1
            self._start(batch, False)
        while self.running and self._large and self._large_running < settings.local_batches:
            batch = [self._large.popleft()]
            while self._large and _go_together(batch, self._large[0]):
                batch.append(self._large.popleft())
            self._large_running += 1
            self._start(batch, True)

    def _start(self, batch: list[QueuedRecipient], is_large: bool) -> None:
        Deferred.fromCoroutine(self._run(batch)).addBoth(self._done, is_large)

    async def _run(self, batch: list[QueuedRecipient]) -> None:
        try:
            outcomes = await self._deliver(batch)
        except Exception:
            self.log.failure("a batch of local deliveries failed in an unexpected way")
            outcomes = [Outcome(each, RecipientState.QUEUED, str(TRY_AGAIN), remote="local") for each in batch]
        self._decided(outcomes)

    def _done(self, result: object, is_large: bool) -> None:
        if isinstance(result, Failure):
            self.log.failure("outcomes of local deliveries were lost", result)
        if is_large:
            self._large_running -= 1
        else:
            self._small_running -= 1
        if len(self):
            self._arm()
        if not (self._small_running or self._large_running):
            idle, self._idle = self._idle, []
            for done in idle:
                done.callback(None)


def _go_together(batch: list[QueuedRecipient], one: QueuedRecipient) -> bool:
    """Recipients of one large message; or messages that lie in the spool as a Maildir keeps them, which cost a link each."""
    first = batch[0].message
    if one.message.queue_id == first.queue_id:
        return True
    alone = all(each.storage == MAILDIR and each.recipient_count == 1 for each in (first, one.message))
    return alone and len(batch) < _FILES_A_BATCH
