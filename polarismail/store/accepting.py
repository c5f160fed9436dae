# SPDX-License-Identifier: MIT
"""Puts new messages into the accept transaction: all that wait with two statements, each with an outcome of its own.

A message without effects costs its share of two inserts. One with effects gets a savepoint, so that the reply of an effect
refuses it alone. Where the common way fails (one row that the database does not take), the group is rolled back and each of
its messages is tried in a savepoint of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, select

from polarismail.store import schema
from polarismail.store.committer import DoApart, Job, run_in_savepoint
from polarismail.store.content import CHUNKS, INLINE, Draft
from polarismail.store.dialects import is_lost
from polarismail.store.interfaces import Committed, Effect, QueuedMessage, QueuedRecipient, Refused, Submission
from polarismail.store.statements import Driver, Statements, render_facts, render_path
from polarismail.values.envelope import NO_OPTIONS
from polarismail.values.errors import Unavailable
from polarismail.values.reply import Reply


class Accept:
    """One message on its way into the spool: its rows, and what its committer will be told."""

    __slots__ = (
        "about",
        "committed",
        "effects",
        "held",
        "incarnation",
        "message",
        "number",
        "options",
        "owner",
        "recipients",
        "storage",
        "undone",
    )

    def __init__(self, submission: Submission, draft: Draft, owner: int, now: float, expires_seconds: float) -> None:
        """Raises ValueError where there is no recipient: such a message would never leave."""
        envelope, trace = submission.envelope, submission.trace
        if not envelope.recipients:
            raise ValueError("a message has at least one recipient")
        self.number, self.owner, self.incarnation = draft.number, owner, draft.incarnation
        self.effects: Sequence[Effect] = submission.effects
        self.about, self.storage = submission.about, draft.storage
        self.undone = False  # it was rolled back by itself: certainly not stored
        inline = draft.octets(trace) if self.storage == INLINE else None
        size = len(trace) + draft.size
        count = len(envelope.recipients)
        life = expires_seconds if submission.expires_seconds is None else submission.expires_seconds
        options, due = envelope.options, now
        self.options: tuple[Any, ...] | None = None
        self.held = False
        if options is not NO_OPTIONS:
            self.options = (
                options.flags, options.priority, options.hold_until, options.deliver_by, draft.number
            )  # fmt: skip
            if options.hold_until > now:
                # Nobody's until then: found by the index of what is due, after a restart as well.
                self.held, due, owner = True, options.hold_until, 0
        expires = due + life
        message = QueuedMessage(
            draft.queue_id,
            envelope.reverse_path,
            now,
            size,
            envelope.account_id,
            envelope.ret,
            envelope.envid,
            envelope.body,
            envelope.smtputf8,
            inline,
            count,
            self.storage,
            options,
        )
        self.message: tuple[Any, ...] = (
            draft.number,
            render_path(envelope.reverse_path),
            envelope.account_id,
            render_facts(submission.facts),
            now,
            size,
            envelope.ret,
            envelope.envid,
            envelope.body,
            envelope.smtputf8,
            count,
            self.storage,
            draft.render_head(trace) if inline is None else inline,
        )
        rows: list[tuple[Any, ...]] = []
        queued: list[QueuedRecipient] = []
        for at, recipient in enumerate(envelope.recipients):
            path, original, dsn = recipient.forward_path, recipient.original, recipient.dsn
            rows.append(
                (
                    draft.number,
                    at,
                    render_path(path),
                    "" if original is path or original == path else render_path(original),
                    recipient.account_id,
                    dsn.orcpt,
                    dsn.notify,
                    recipient.next_hop,
                    due,
                    expires,
                    owner,
                )
            )
            queued.append(
                QueuedRecipient(
                    message, at, path, original, recipient.next_hop, recipient.account_id, 0, due, expires, 0, dsn
                )
            )
        self.recipients = rows
        self.committed = Committed(message, () if self.held else tuple(queued))

    def belong_to(self, owner: int) -> None:
        """Change the owner: the process has joined anew since."""
        self.owner = owner
        if not self.held:
            self.recipients = [(*row[:-1], owner) for row in self.recipients]


class RefusedByEffect(Exception):
    """Carries an effect's reply out of the savepoint that is undone."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(str(reply))
        self.reply = reply


class AcceptLane:
    """The committer's lane of new messages. A job's payload is an Accept; its value Committed or Refused."""

    name = "accept"
    needs_room = True
    patient = False

    def __init__(self, statements: Statements, incarnation: Callable[[], int]) -> None:
        self._statements, self._incarnation = statements, incarnation

    def run(self, connection: Connection, jobs: Sequence[Job], together: bool) -> None:
        owner = self._incarnation()
        alone: list[Job] = []
        plain: list[Job] = []
        for job in jobs:
            accept: Accept = job.payload
            if accept.owner != owner:
                accept.belong_to(owner)
            (alone if accept.effects or accept.storage == CHUNKS or not together else plain).append(job)
        self._insert_together(connection, plain)
        for job in alone:
            run_in_savepoint(connection, job, self.insert)
            job.payload.undone = job.error is not None
            if isinstance(job.error, RefusedByEffect):
                job.value, job.error = Refused(job.error.reply), None

    def _insert_together(self, connection: Connection, jobs: Sequence[Job]) -> None:
        """Raises DoApart where one of them is not taken."""
        if not jobs:
            return
        driver = Driver(connection)
        try:
            self.insert_many(driver, [job.payload for job in jobs])
        except Exception as error:
            if is_lost(error):
                raise
            raise DoApart from error
        finally:
            driver.close()
        for job in jobs:
            job.value = job.payload.committed

    def insert_many(self, driver: Driver, accepts: Sequence[Accept]) -> None:
        """The rows of several messages. Raises what the driver raises."""
        driver.run_rows(self._statements.insert_message, [accept.message for accept in accepts])
        driver.run_rows(self._statements.insert_recipient, [row for accept in accepts for row in accept.recipients])
        # Beside the insert, so that the messages without any pay nothing for their columns.
        driver.run_many(self._statements.set_options, [accept.options for accept in accepts if accept.options])

    def insert(self, connection: Connection, accept: Accept) -> Committed:
        """The rows of one message, and its effects. Raises RefusedByEffect, Unavailable, or what the driver raises."""
        if accept.storage == CHUNKS:
            check_still_here(connection, accept.incarnation)
        driver = Driver(connection)
        try:
            self.insert_many(driver, [accept])
        finally:
            driver.close()
        for effect in accept.effects:
            reply = effect(connection, accept.number)
            if reply is not None:
                raise RefusedByEffect(reply)
        return accept.committed


def check_still_here(connection: Connection, incarnation: int) -> None:
    """Raise Unavailable where this incarnation was declared dead: others may have swept the chunks of its drafts.

    Until the transaction ends nobody can declare it dead.
    """
    nodes = schema.nodes
    here = select(nodes.c.incarnation).where(nodes.c.incarnation == incarnation, nodes.c.ended.is_(False))
    if connection.execute(here.with_for_update(read=True)).first() is None:
        raise Unavailable("this process slept past its lease while the message came in")
