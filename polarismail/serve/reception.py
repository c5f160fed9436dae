# SPDX-License-Identifier: MIT
"""From MAIL to the promise: judges each stage of a mail transaction and puts the message into the spool.

Guarantees: the one positive reply to the end of data is given after `spool.commit`, never before; a refusal leaves nothing
behind; every unknown failure is a 451. A Reception is the avatar that the realm hands out, for an account or for nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import define, field, frozen
from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from polarismail.auth.interfaces import IReception
from polarismail.message.headers import count_received
from polarismail.message.trace import delivery_fields, received_field
from polarismail.policy.relaying import check_recipient, expand_recipient
from polarismail.policy.verdict import Accept, Verdict
from polarismail.store.interfaces import (
    Account,
    Committed,
    IDirectory,
    IDraft,
    ISpool,
    Refused,
    Resolution,
    Submission,
)
from polarismail.values.address import Mailbox
from polarismail.values.envelope import LOCAL, Envelope, Recipient, SessionFacts
from polarismail.values.errors import SpoolFull, Unavailable
from polarismail.values.network import LOCAL_CLIENT
from polarismail.values.reply import (
    NO_ROOM,
    NOT_QUEUED,
    RECIPIENT_OK,
    SENDER_OK,
    TOO_MANY_HOPS,
    TOO_MANY_RECIPIENTS,
    TRY_AGAIN,
    Reply,
    queued_as,
)

RecordEvent = Callable[[str, dict[str, Any]], None]
# (client address, reverse-path, forward-path, now) -> verdict
CheckGreylist = Callable[[str, Mailbox | None, Mailbox, float], Verdict | Deferred[Verdict]]


@frozen
class ReceptionSettings:
    """Bounds of a mail transaction beyond those of the engine."""

    max_hops: int = 50  # Received fields (HOSTILE 0)
    max_expanded_recipients: int = 5000  # after aliases
    header_octets: int = 65536  # how far trace fields are looked for


@define
class Desk:
    """What every reception shares: the parts that it works with, chosen by service.py."""

    hostname: str
    spool: ISpool
    directory: IDirectory
    accepted: Callable[[Committed], None]
    record_event: RecordEvent
    now: Callable[[], float]
    check_greylist: CheckGreylist | None = None
    settings: ReceptionSettings = field(factory=ReceptionSettings)


@implementer(IReception)
class Reception:
    """Takes mail in for one login (`account`), or for a stranger (`account` is None)."""

    log = Logger()

    def __init__(self, desk: Desk, account: Account | None = None) -> None:
        self.account = account
        self._desk = desk

    def check_mail(self, facts: SessionFacts, mail: Any) -> Reply | Deferred[Reply]:
        """Whether this reverse-path may begin a transaction."""
        return SENDER_OK

    def check_rcpt(
        self, facts: SessionFacts, envelope: Envelope, rcpt: Any
    ) -> tuple[Reply, tuple[Recipient, ...]] | Deferred[tuple[Reply, tuple[Recipient, ...]]]:
        """Whether, and to whom, mail for this forward-path goes: relaying first, then the greylist for strangers."""
        resolution = self._desk.directory.resolve(rcpt.forward_path)
        if type(resolution) is not Resolution and isinstance(resolution, Deferred):
            resolution.addCallback(self._check_resolved, facts, envelope, rcpt)
            return resolution.addErrback(self._unavailable, (TRY_AGAIN, ()))
        return self._check_resolved(resolution, facts, envelope, rcpt)

    def begin_content(self, facts: SessionFacts, envelope: Envelope) -> IDraft:
        """Where the content goes. Raises SpoolUnhealthy."""
        recipients = envelope.recipients
        if not all(recipient.next_hop == LOCAL for recipient in recipients):
            return self._desk.spool.draft()
        if len(recipients) != 1:
            return self._desk.spool.draft(lambda queue_id: (b"", b""))
        only = recipients[0]

        def front(queue_id: str) -> tuple[bytes, bytes]:
            trace = received_field(facts, self._desk.hostname, queue_id, only.original, self._desk.now())
            return delivery_fields(envelope.reverse_path, only.forward_path), trace

        return self._desk.spool.draft(front)

    def end_of_data(self, facts: SessionFacts, envelope: Envelope, draft: IDraft, end: Any) -> Deferred[Reply]:
        """Judge the whole message, then commit it; the reply is positive only when it is on stable storage."""
        problem = end.problem
        if (
            problem is None
            and count_received(draft.head(self._desk.settings.header_octets)) > self._desk.settings.max_hops
        ):
            problem = TOO_MANY_HOPS
        if problem is not None:
            draft.abandon()
            self._record_refusal(facts, envelope, problem, "end-of-data")
            return succeed(problem)
        desk = self._desk
        now = desk.now()
        only = envelope.recipients[0].original if len(envelope.recipients) == 1 else None
        trace = draft.trace or received_field(facts, desk.hostname, draft.queue_id, only, now)
        done = desk.spool.commit(Submission(draft=draft, envelope=envelope, facts=facts, trace=trace))
        return done.addCallbacks(self._committed, self._doubtful, (facts, envelope, end.bare), {}, (draft,), {})

    # -- steps -------------------------------------------------------------------------------------------------------

    def _check_resolved(
        self, resolution: Resolution, facts: SessionFacts, envelope: Envelope, rcpt: Any
    ) -> tuple[Reply, tuple[Recipient, ...]] | Deferred[tuple[Reply, tuple[Recipient, ...]]]:
        verdict = check_recipient(resolution, rcpt.forward_path, account=self.account, relay_network=facts.may_relay)
        if not isinstance(verdict, Accept):
            self._record_refusal(facts, envelope, verdict.reply, "rcpt", rcpt.forward_path)
            return verdict.reply, ()
        recipients = expand_recipient(resolution, rcpt.forward_path, rcpt.dsn)
        if len(envelope.recipients) + len(recipients) > self._desk.settings.max_expanded_recipients:
            return TOO_MANY_RECIPIENTS, ()
        if self.account is not None or self._desk.check_greylist is None:
            return RECIPIENT_OK, recipients
        if facts.may_relay or facts.client_address == LOCAL_CLIENT:
            return RECIPIENT_OK, recipients  # no stranger
        judged = self._desk.check_greylist(
            facts.client_address, envelope.reverse_path, rcpt.forward_path, self._desk.now()
        )
        if isinstance(judged, Deferred):
            judged.addCallback(self._greylisted, facts, envelope, rcpt, recipients)
            return judged.addErrback(self._unavailable, (TRY_AGAIN, ()))
        return self._greylisted(judged, facts, envelope, rcpt, recipients)

    def _greylisted(
        self, verdict: Verdict, facts: SessionFacts, envelope: Envelope, rcpt: Any, recipients: tuple[Recipient, ...]
    ) -> tuple[Reply, tuple[Recipient, ...]]:
        if isinstance(verdict, Accept):
            return RECIPIENT_OK, recipients
        self._record_refusal(facts, envelope, verdict.reply, "greylist", rcpt.forward_path)
        return verdict.reply, ()

    def _committed(self, result: Committed | Refused, facts: SessionFacts, envelope: Envelope, bare: int) -> Reply:
        if isinstance(result, Refused):
            self._record_refusal(facts, envelope, result.reply, "end-of-data")
            return result.reply
        message = result.message
        fields: dict[str, Any] = {
            "queue_id": message.queue_id,
            "client": facts.client_address,
            "helo": facts.helo,
            "protocol": facts.protocol,
            "listener": facts.listener,
            "reverse_path": str(message.reverse_path or ""),
            "size": message.size,
            "recipients": len(result.recipients),
        }
        if facts.account:
            fields["account"] = facts.account
        if bare:
            fields["bare_line_ends"] = bare
        self._desk.record_event("received", fields)
        try:
            self._desk.accepted(result)
        except Exception:
            # The promise is kept already, and the queue is looked through: anything but 250 would make a second copy.
            self.log.failure("{queue_id}: nobody was told of it", queue_id=message.queue_id)
        return queued_as(message.queue_id)

    def _doubtful(self, failure: Failure, draft: IDraft) -> Reply:
        # The message may be on disk all the same: 451 makes the client come again, and the copy is counted (DURABILITY).
        draft.abandon()
        if failure.check(SpoolFull) is not None:
            self.log.warn("{queue_id}: {problem}", queue_id=draft.queue_id, problem=failure.getErrorMessage())
            return NO_ROOM
        self.log.failure("{queue_id}: commit failed", failure, queue_id=draft.queue_id)
        return NOT_QUEUED

    def _unavailable(self, failure: Failure, answer: tuple[Reply, tuple[Recipient, ...]]) -> Any:
        if failure.check(Unavailable) is None:
            self.log.failure("a recipient could not be judged", failure)
        else:
            self.log.warn("a recipient could not be judged: {problem}", problem=failure.getErrorMessage())
        return answer

    def _record_refusal(
        self, facts: SessionFacts, envelope: Envelope, reply: Reply, stage: str, forward_path: Mailbox | None = None
    ) -> None:
        self._desk.record_event(
            "rejected" if reply.is_permanent else "tempfailed",
            {
                "stage": stage,
                "client": facts.client_address,
                "helo": facts.helo,
                "listener": facts.listener,
                "reverse_path": str(envelope.reverse_path or ""),
                "recipient": str(forward_path or ""),
                "reply": str(reply),
            },
        )
