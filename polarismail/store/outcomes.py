# SPDX-License-Identifier: MIT
"""Writes what became of recipients, and lets messages leave that have nobody left to serve.

The common case, every recipient of a message done in one group, is two fenced deletes. Whatever else happens is found by
counting rows: where a group changed fewer than it should have, somebody's outcome is stale, the group is rolled back, and
each outcome is written and counted by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection

from polarismail.store.accepting import Accept, AcceptLane, RefusedByEffect
from polarismail.store.committer import DoApart, Job, run_in_savepoint
from polarismail.store.content import CHUNKS
from polarismail.store.dialects import is_lost
from polarismail.store.interfaces import Committed, Outcome, QueuedMessage
from polarismail.store.statements import Driver, Statements, number_of
from polarismail.values.envelope import RecipientState

_FIRST_FINAL = RecipientState.DELIVERED
Fence = tuple[int, int, int, int]  # message, number, owner, epoch


class Record:
    """The outcomes of one call, and the reports that follow from them."""

    __slots__ = ("outcomes", "reports")

    def __init__(self, outcomes: Sequence[Outcome], reports: Sequence[Accept]) -> None:
        self.outcomes, self.reports = outcomes, reports


class Recorded:
    """What a Record came to: its committed reports; and messages that left with its group."""

    __slots__ = ("committed", "left")

    def __init__(self, committed: list[Committed]) -> None:
        self.committed = committed
        self.left: Sequence[QueuedMessage] = ()


class _Stale(Exception):
    """Fewer rows changed than there were outcomes."""


class RecordLane:
    """The committer's lane of outcomes. A job's payload is a Record; its value is Recorded."""

    name = "record"
    needs_room = False
    patient = True

    def __init__(self, statements: Statements, accepts: AcceptLane, incarnation: Callable[[], int]) -> None:
        self._statements, self._accepts, self._incarnation = statements, accepts, incarnation

    def run(self, connection: Connection, jobs: Sequence[Job], together: bool) -> None:
        owner = self._incarnation()
        plain: list[Job] = []
        alone: list[Job] = []
        for job in jobs:
            record: Record = job.payload
            for report in record.reports:
                if report.owner != owner:
                    report.belong_to(owner)
            special = any(report.effects or report.storage == CHUNKS for report in record.reports)
            (alone if special or not together else plain).append(job)
        self._record_together(connection, plain)
        for job in alone:
            run_in_savepoint(connection, job, self._record_one)

    # -- the common way

    def _record_together(self, connection: Connection, jobs: Sequence[Job]) -> None:
        """Raises DoApart where not every outcome counted."""
        if not jobs:
            return
        driver = Driver(connection)
        try:
            left = self._write_together(driver, [outcome for job in jobs for outcome in job.payload.outcomes])
            self._accepts.insert_many(driver, [report for job in jobs for report in job.payload.reports])
        except Exception as error:
            if is_lost(error):
                raise
            raise DoApart from error
        finally:
            driver.close()
        for job in jobs:
            job.value = Recorded([report.committed for report in job.payload.reports])
        jobs[0].value.left = left

    def _write_together(self, driver: Driver, outcomes: Sequence[Outcome]) -> list[QueuedMessage]:
        """Raises _Stale where not every outcome counted."""
        owner, statements = self._incarnation(), self._statements
        deferred: list[tuple[Any, ...]] = []
        released: dict[str, list[tuple[Outcome, Fence]]] = {}
        for outcome in outcomes:
            recipient = outcome.recipient
            fence = (number_of(recipient.message.queue_id), recipient.number, owner, recipient.epoch)
            if outcome.state >= _FIRST_FINAL:
                released.setdefault(recipient.message.queue_id, []).append((outcome, fence))
            else:
                deferred.append(_deferral(outcome, fence))
        whole: list[QueuedMessage] = []
        gone: list[Fence] = []
        finished: list[tuple[Any, ...]] = []
        doubtful: list[QueuedMessage] = []
        for done in released.values():
            message = done[0][0].recipient.message
            if len(done) == message.recipient_count:
                whole.append(message)
                gone.extend(fence for _, fence in done)
            else:
                doubtful.append(message)
                finished.extend(_finish(outcome, fence) for outcome, fence in done)
        changed = driver.run_rows(statements.delete_recipient, gone)
        changed += driver.run_many(statements.finish, finished) + driver.run_many(statements.defer, deferred)
        if changed != len(outcomes):
            raise _Stale
        if whole:
            keys = [(number_of(message.queue_id),) for message in whole]
            if driver.run_rows(statements.delete_message, keys) != len(keys):
                raise _Stale
            chunked = [key for key, message in zip(keys, whole, strict=True) if message.storage == CHUNKS]
            driver.run_many(statements.delete_chunks, chunked)
        return whole + [message for message in doubtful if self._leave(driver, message)]

    def _leave(self, driver: Driver, message: QueuedMessage) -> bool:
        """Remove the message if nobody of it is left."""
        key = (number_of(message.queue_id),)
        if driver.run(self._statements.delete_finished_message, key) != 1:
            return False
        driver.run(self._statements.delete_recipients, key)
        if message.storage == CHUNKS:
            driver.run(self._statements.delete_chunks, key)
        return True

    # -- one by one

    def _record_one(self, connection: Connection, record: Record) -> Recorded:
        owner, recorded, driver = self._incarnation(), Recorded([]), Driver(connection)
        left: list[QueuedMessage] = []
        counted: set[str] = set()
        try:
            for outcome in record.outcomes:
                recipient = outcome.recipient
                message = recipient.message
                fence = (number_of(message.queue_id), recipient.number, owner, recipient.epoch)
                if outcome.state >= _FIRST_FINAL:
                    changed = driver.run(self._statements.finish, _finish(outcome, fence))
                    if changed and self._leave(driver, message):
                        left.append(message)
                else:
                    changed = driver.run(self._statements.defer, _deferral(outcome, fence))
                if changed:
                    counted.add(message.queue_id)
        finally:
            driver.close()
        for report in record.reports:
            if report.about in counted or (not report.about and (counted or not record.outcomes)):
                self._commit_report(connection, report, recorded)
        recorded.left = left
        return recorded

    def _commit_report(self, connection: Connection, report: Accept, recorded: Recorded) -> None:
        savepoint = connection.begin_nested()
        try:
            recorded.committed.append(self._accepts.insert(connection, report))
            savepoint.commit()
        except RefusedByEffect:
            savepoint.rollback()


def _finish(outcome: Outcome, fence: Fence) -> tuple[Any, ...]:
    return (int(outcome.state), outcome.reply, outcome.remote, *fence)


def _deferral(outcome: Outcome, fence: Fence) -> tuple[Any, ...]:
    warned = outcome.warned or outcome.recipient.warned
    return (outcome.next_attempt, outcome.reply, outcome.remote, warned, *fence)
