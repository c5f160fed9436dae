# SPDX-License-Identifier: MIT
"""Writes outcomes to the spool, at once and until it succeeds; failures of one message share one DSN.

Guarantees
    An outcome that is put here is recorded durably with the next group of the spool, together with the DSN that follows
    from it (DURABILITY rule 3). While the spool cannot be written, outcomes wait here and `suspended` is true: nothing
    new may be tried, because a delivery that cannot be recorded is a duplicate to come (rule 4). A failure waits a
    moment for the other recipients of its message; were the process to die meanwhile, it is found again by trying.
Never
    A failure that is recorded without its DSN: where the DSN cannot be written, the failure becomes a deferral. A success that
    waits: what is delivered is recorded as delivered, with or without its DSN.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Protocol

from attrs import evolve
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger

from polarismail.relay.queue import Hand
from polarismail.relay.verdicts import is_owed_success, needs_report
from polarismail.store.interfaces import Committed, Outcome, Submission
from polarismail.values.envelope import RecipientState
from polarismail.values.errors import TooManyTargets, Unavailable
from polarismail.values.events import RecordEvent

Compose = Callable[[Sequence[Outcome]], Awaitable[Submission | None]]
"""Outcomes of one message to the DSN about them; None where none is due."""
_UNWRITABLE_REPORT_SECONDS = 3_600.0


class Listener(Protocol):
    """Who must hear of what was recorded."""

    def recorded(self, outcomes: Sequence[Outcome], committed: Sequence[Committed]) -> None:
        """These outcomes, and these DSNs, are on stable storage."""

    def suspended(self) -> None:
        """The spool cannot be written: begin nothing."""

    def resumed(self) -> None:
        """The spool can be written again."""


class Recorder:
    """See the module. `now` is the wall clock."""

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        spool: Any,
        hand: Hand,
        listener: Listener,
        *,
        compose: Compose,
        record_event: RecordEvent,
        now: Callable[[], float],
        merge_seconds: float,
        retry_seconds: float,
    ) -> None:
        self._reactor, self._spool, self._hand, self._listener = reactor, spool, hand, listener
        self._compose, self._record_event, self._now = compose, record_event, now
        self._merge_seconds, self._retry_seconds = merge_seconds, retry_seconds
        self._merging: dict[str, list[Outcome]] = {}
        self._timers: dict[str, Any] = {}
        self._writing = 0
        self._idle: list[Deferred[None]] = []
        self._stopping = False
        self.suspended = False

    def put(self, outcomes: Iterable[Outcome]) -> None:
        """Record these. The recipients leave the hand when it is done."""
        hand, ready, closed = self._hand, [], []
        for outcome in outcomes:
            queue_id = outcome.recipient.message.queue_id
            if hand.decided(queue_id):
                closed.append(queue_id)
            # A success is recorded at once: what waits for company may be done again after a crash.
            if needs_report(outcome) and not is_owed_success(outcome):
                self._merging.setdefault(queue_id, []).append(outcome)
            else:
                ready.append(outcome)
        if self._merging:
            for queue_id in closed:
                ready += self._take_merged(queue_id)
            self._arm()
        if ready:
            self._start(ready)

    def close_message(self, queue_id: str) -> None:
        """No more outcomes of this message are to come for now: what waits for them is recorded."""
        merged = self._take_merged(queue_id)
        if merged:
            self._start(merged)

    def flush(self) -> None:
        """Record what waits for company, now."""
        for queue_id in list(self._merging):
            self.close_message(queue_id)

    def when_idle(self) -> Deferred[None]:
        """Fires when everything that was put here is recorded."""
        done: Deferred[None] = Deferred()
        if self._writing:
            self._idle.append(done)
        else:
            done.callback(None)
        return done

    def start(self) -> None:
        """Insist again, after a `stop`."""
        self._stopping = False

    def stop(self) -> None:
        """Give up waiting for a spool that cannot be written."""
        self._stopping = True
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        for queue_id in self._merging:
            if queue_id not in self._timers:
                self._timers[queue_id] = self._reactor.callLater(self._merge_seconds, self._merged_long, queue_id)

    def _merged_long(self, queue_id: str) -> None:
        del self._timers[queue_id]
        self.close_message(queue_id)

    def _take_merged(self, queue_id: str) -> list[Outcome]:
        timer = self._timers.pop(queue_id, None)
        if timer is not None:
            timer.cancel()
        return self._merging.pop(queue_id, [])

    def _start(self, outcomes: list[Outcome]) -> None:
        self._writing += 1
        Deferred.fromCoroutine(self._write(outcomes)).addErrback(
            lambda failure: self.log.failure("outcomes could not be recorded", failure)
        ).addBoth(self._written)

    def _written(self, _: object) -> None:
        self._writing -= 1
        if not self._writing:
            idle, self._idle = self._idle, []
            for done in idle:
                done.callback(None)

    async def _write(self, outcomes: list[Outcome]) -> None:
        while True:
            reports: list[tuple[str, Submission]] = []
            try:
                wanted = [outcome for outcome in outcomes if needs_report(outcome)]
                if wanted:
                    outcomes = await self._add_reports(outcomes, wanted, reports)
                # Claimed anew while it was tried: only the newest epoch counts.
                fenced = [_refence(outcome, self._hand) for outcome in outcomes]
                committed = await self._spool.record(fenced, [report for _, report in reports])
            except Exception as problem:
                for _, report in reports:
                    report.draft.abandon()
                if not isinstance(problem, Unavailable) and len(outcomes) > 1:
                    # One of them is what the store does not take; the others must not wait for it.
                    self.log.failure("a group of outcomes could not be recorded: trying one by one")
                    for outcome in outcomes:
                        await self._write([outcome])
                    return
                if not isinstance(problem, Unavailable):
                    # It stays in hand, so that nobody tries it again before an operator has looked, or until the restart.
                    self.log.failure("an outcome cannot be recorded", outcome=str(outcomes[0])[:500])
                    return
                if not await self._wait_for_spool(problem):
                    return
                continue
            self._publish(outcomes, reports, committed)
            return

    async def _add_reports(
        self, outcomes: list[Outcome], wanted: list[Outcome], reports: list[tuple[str, Submission]]
    ) -> list[Outcome]:
        """Fills `reports`, one for each message that needs one; returns the outcomes that can be recorded with them."""
        by_message: dict[str, list[Outcome]] = {}
        for outcome in wanted:
            by_message.setdefault(outcome.recipient.message.queue_id, []).append(outcome)
        postponed: set[int] = set()
        for queue_id, about in by_message.items():
            try:
                report = await self._compose(about)
            except Exception as problem:
                # What only an operator can change must not hold up all mail: anybody can name such an alias as the sender.
                if isinstance(problem, Unavailable) and not isinstance(problem, TooManyTargets):
                    raise
                self.log.failure("{queue_id}: its DSN cannot be written", queue_id=queue_id)
                postponed |= {id(outcome) for outcome in about if not is_owed_success(outcome)}
                continue
            if report is not None:
                reports.append((queue_id, evolve(report, about=queue_id)))
        if not postponed:
            return outcomes
        later = self._now() + _UNWRITABLE_REPORT_SECONDS
        return [
            evolve(outcome, state=RecipientState.QUEUED, next_attempt=later, warned=False)
            if id(outcome) in postponed
            else outcome
            for outcome in outcomes
        ]

    async def _wait_for_spool(self, problem: Exception) -> bool:
        if self._stopping:
            return False
        if not self.suspended:
            self.suspended = True
            self._listener.suspended()
            self.log.critical("nothing is delivered: outcomes cannot be recorded: {problem}", problem=str(problem))
        await deferLater(self._reactor, self._retry_seconds, lambda: None)
        return not self._stopping

    def _publish(
        self, outcomes: list[Outcome], reports: list[tuple[str, Submission]], committed: list[Committed]
    ) -> None:
        about = {report.draft.queue_id: queue_id for queue_id, report in reports}
        for each in committed:
            queue_id = about.get(each.message.queue_id, "")
            self._record_event("bounced", {"queue_id": queue_id, "report": each.message.queue_id})
        was_suspended, self.suspended = self.suspended, False
        self._listener.recorded(outcomes, committed)
        if was_suspended:
            self.log.warn("outcomes can be recorded again: delivery goes on")
            self._listener.resumed()


def _refence(outcome: Outcome, hand: Hand) -> Outcome:
    newest = hand.newest(outcome.recipient)
    return outcome if newest is outcome.recipient else evolve(outcome, recipient=newest)
