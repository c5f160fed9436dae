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
from polarismail.message.inspection import author, has_been_in
from polarismail.message.trace import delivery_fields, received_field
from polarismail.policy.identity import check_identity
from polarismail.policy.relaying import check_recipient, expand_recipient
from polarismail.policy.verdict import Accept, Reject, Verdict
from polarismail.policy.wishes import WishSettings, grant
from polarismail.serve.incoming import IncomingDraft
from polarismail.store.interfaces import (
    Account,
    Committed,
    IDirectory,
    ISpool,
    Refused,
    Resolution,
    Submission,
)
from polarismail.store.space import Space
from polarismail.values.address import Mailbox
from polarismail.values.envelope import EXPANSION, LOCAL, NO_OPTIONS, Envelope, MailOptions, Recipient, SessionFacts
from polarismail.values.errors import SpoolFull, Unavailable
from polarismail.values.events import RecordEvent
from polarismail.values.network import LOCAL_CLIENT
from polarismail.values.reply import (
    HAS_BEEN_HERE,
    HEADER_TOO_BIG,
    NO_ROOM,
    NOT_QUEUED,
    NOT_YOUR_FROM,
    RECIPIENT_OK,
    SENDER_OK,
    TOO_MANY_HOPS,
    TOO_MANY_RECIPIENTS,
    TRY_AGAIN,
    Reply,
    queued_as,
)

# (client address, reverse-path, forward-path, now) -> verdict
CheckGreylist = Callable[[str, Mailbox | None, Mailbox, float], Verdict | Deferred[Verdict]]


@frozen
class ReceptionSettings:
    """Bounds of a mail transaction beyond those of the engine."""

    max_hops: int = 50  # Received fields (HOSTILE 0)
    max_expanded_recipients: int = 5000  # after aliases
    check_reverse_path: bool = True  # whoever has logged in sends under addresses of the account (HOSTILE A3)
    check_from: bool = False  # the address in From as well
    check_headers: bool = True  # a header section with defects is refused from who has logged in (HOSTILE 4)
    wishes: WishSettings = field(factory=WishSettings)


@define
class Desk:
    """What every reception shares: the parts that it works with, joined in parts.py."""

    hostname: str
    spool: ISpool
    directory: IDirectory
    accepted: Callable[[Committed], None]
    record_event: RecordEvent
    now: Callable[[], float]
    check_greylist: CheckGreylist | None = None
    space: Space | None = None
    settings: ReceptionSettings = field(factory=ReceptionSettings)


@implementer(IReception)
class Reception:
    """Takes mail in for one login (`account`), or for a stranger (`account` is None)."""

    log = Logger()

    def __init__(self, desk: Desk, account: Account | None = None) -> None:
        self.account = account
        self._desk = desk

    def check_mail(
        self, facts: SessionFacts, mail: Any
    ) -> Reply | tuple[Reply, MailOptions] | Deferred[Reply | tuple[Reply, MailOptions]]:
        """Whether this reverse-path may begin a transaction (any from a stranger, one of its own from an account) and there
        is room for what is announced (RFC 1870 §6.1); and what of its wishes is granted."""
        space = self._desk.space
        if space is not None and (space.is_short or (mail.size is not None and mail.size > space.free_octets)):
            return NO_ROOM
        account, reverse_path = self.account, mail.reverse_path
        if (
            account is None
            or reverse_path is None
            or reverse_path == account.address
            or not self._desk.settings.check_reverse_path
        ):
            return SENDER_OK if mail.wishes is None else self._grant(facts, mail)
        judged = self._judge_identity(reverse_path, account)
        if isinstance(judged, Deferred):
            return judged.addCallback(self._mail_judged, facts, mail).addErrback(self._unavailable, TRY_AGAIN)
        return self._mail_judged(judged, facts, mail)

    def check_rcpt(
        self, facts: SessionFacts, envelope: Envelope, rcpt: Any
    ) -> tuple[Reply, tuple[Recipient, ...]] | Deferred[tuple[Reply, tuple[Recipient, ...]]]:
        """Whether, and to whom, mail for this forward-path goes: relaying first, then the greylist for strangers."""
        resolution = self._desk.directory.resolve(rcpt.forward_path)
        if type(resolution) is not Resolution and isinstance(resolution, Deferred):
            resolution.addCallback(self._check_resolved, facts, envelope, rcpt)
            return resolution.addErrback(self._unavailable, (TRY_AGAIN, ()))
        return self._check_resolved(resolution, facts, envelope, rcpt)

    def begin_content(self, facts: SessionFacts, envelope: Envelope) -> IncomingDraft:
        """Where the content goes. Raises SpoolFull, SpoolUnhealthy."""
        spool, recipients = self._desk.spool, envelope.recipients
        local = all(recipient.next_hop == LOCAL for recipient in recipients)
        if not local:
            draft = spool.draft()
        elif len(recipients) != 1:
            draft = spool.draft(lambda queue_id: (b"", b""))
        else:
            only = recipients[0]

            def front(queue_id: str) -> tuple[bytes, bytes]:
                trace = self._received(facts, envelope, queue_id, only.original, self._desk.now())
                return delivery_fields(envelope.reverse_path, only.forward_path), trace

            draft = spool.draft(front)
        # An alias whose sender hears of it (EXPANSION) goes nowhere by itself.
        final = local or all(recipient.next_hop in (LOCAL, EXPANSION) for recipient in recipients)
        return IncomingDraft(draft, self._desk.hostname, final or self.account is not None)

    def end_of_data(self, facts: SessionFacts, envelope: Envelope, draft: Any, end: Any) -> Deferred[Reply]:
        """Judge the whole message, then commit it; the reply is positive only when it is on stable storage."""
        try:
            return self._judge_content(facts, envelope, draft, end)
        except BaseException:
            draft.abandon()  # where a commit has begun, this does nothing
            raise

    # -- steps -------------------------------------------------------------------------------------------------------

    def _judge_content(
        self, facts: SessionFacts, envelope: Envelope, draft: IncomingDraft, end: Any
    ) -> Deferred[Reply]:
        problem = end.problem or self._check_header_section(envelope, draft)
        account = self.account
        if problem is None and account is not None and self._desk.settings.check_from:
            written_by = author(draft.section)
            judged = Reject(NOT_YOUR_FROM) if written_by is None else self._judge_identity(written_by, account)
            if isinstance(judged, Deferred):
                answered: Deferred[Reply] = judged.addCallback(self._from_judged, facts, envelope, draft, end)
                return answered.addErrback(self._not_judged, draft)
            problem = None if isinstance(judged, Accept) else NOT_YOUR_FROM
        return self._end(problem, facts, envelope, draft, end)

    def _judge_identity(self, mailbox: Mailbox, account: Account) -> Verdict | Deferred[Verdict]:
        """Whether the account may send as `mailbox`."""
        resolution = self._desk.directory.resolve(mailbox)
        if isinstance(resolution, Deferred):
            return resolution.addCallback(check_identity, account)
        return check_identity(resolution, account)

    def _mail_judged(self, verdict: Verdict, facts: SessionFacts, mail: Any) -> Reply | tuple[Reply, MailOptions]:
        if isinstance(verdict, Accept):
            return SENDER_OK if mail.wishes is None else self._grant(facts, mail)
        self._record_refusal(facts, Envelope(mail.reverse_path, ()), verdict.reply, "mail")
        return verdict.reply

    def _grant(self, facts: SessionFacts, mail: Any) -> Reply | tuple[Reply, MailOptions]:
        desk = self._desk
        reply, options = grant(
            mail.wishes, is_known=self.account is not None, now=desk.now(), settings=desk.settings.wishes
        )
        if options is None:
            self._record_refusal(facts, Envelope(mail.reverse_path, ()), reply, "mail")
            return reply
        return reply, options

    def _received(
        self, facts: SessionFacts, envelope: Envelope, queue_id: str, recipient: Mailbox | None, now: float
    ) -> bytes:
        return received_field(
            facts,
            self._desk.hostname,
            queue_id,
            recipient,
            now,
            smtputf8=envelope.smtputf8,
            priority=envelope.options.priority,
        )

    def _check_header_section(self, envelope: Envelope, draft: IncomingDraft) -> Reply | None:
        found = draft.inspection()
        settings = self._desk.settings
        if draft.hides_claims:
            return HEADER_TOO_BIG
        if found.received > settings.max_hops:
            return TOO_MANY_HOPS
        # Of several recipients, the one that it has reached before fails alone, at delivery (HOSTILE 5).
        if found.claims and all(
            recipient.next_hop == LOCAL and has_been_in(draft.section, recipient.forward_path)
            for recipient in envelope.recipients
        ):
            return HAS_BEEN_HERE
        if found.defects and self.account is not None and settings.check_headers:
            return Reply(550, (5, 6, 0), f"Malformed header section: {'; '.join(found.defects)}")
        return None

    def _from_judged(
        self, verdict: Verdict, facts: SessionFacts, envelope: Envelope, draft: IncomingDraft, end: Any
    ) -> Deferred[Reply]:
        return self._end(None if isinstance(verdict, Accept) else NOT_YOUR_FROM, facts, envelope, draft, end)

    def _not_judged(self, failure: Failure, draft: IncomingDraft) -> Reply:
        draft.abandon()
        answer: Reply = self._unavailable(failure, TRY_AGAIN)
        return answer

    def _end(
        self, problem: Reply | None, facts: SessionFacts, envelope: Envelope, draft: IncomingDraft, end: Any
    ) -> Deferred[Reply]:
        if problem is not None:
            draft.abandon()
            self._record_refusal(facts, envelope, problem, "end-of-data")
            return succeed(problem)
        desk = self._desk
        only = envelope.recipients[0].original if len(envelope.recipients) == 1 else None
        trace = draft.trace or self._received(facts, envelope, draft.queue_id, only, desk.now())
        done = desk.spool.commit(Submission(draft=draft.draft, envelope=envelope, facts=facts, trace=trace))
        return done.addCallbacks(self._committed, self._doubtful, (facts, envelope, draft, end.bare), {}, (draft,), {})

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
        if self.account is not None or self._desk.check_greylist is None or facts.is_lmtp:
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

    def _committed(
        self, result: Committed | Refused, facts: SessionFacts, envelope: Envelope, draft: IncomingDraft, bare: int
    ) -> Reply:
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
            "recipients": message.recipient_count,
        }
        if facts.account:
            fields["account"] = facts.account
        if message.options is not NO_OPTIONS:
            fields |= _granted(message.options)
        if facts.origin:
            fields["origin"] = facts.origin
        if bare:
            fields["bare_line_ends"] = bare
        defects = draft.inspection().defects
        if defects:
            fields["header_defects"] = "; ".join(defects)
        if draft.removed:
            fields["removed_fields"] = draft.removed
        self._desk.record_event("received", fields)
        try:
            self._desk.accepted(result)
        except Exception:
            # The promise is kept already, and the queue is looked through: anything but 250 would make a second copy.
            self.log.failure("{queue_id}: nobody was told of it", queue_id=message.queue_id)
        return queued_as(message.queue_id)

    def _doubtful(self, failure: Failure, draft: IncomingDraft) -> Reply:
        # The message may be on disk all the same: 451 makes the client come again, and the copy is counted (DURABILITY).
        draft.abandon()
        if failure.check(SpoolFull) is not None:
            self.log.warn("{queue_id}: {problem}", queue_id=draft.queue_id, problem=failure.getErrorMessage())
            return NO_ROOM
        self.log.failure("{queue_id}: commit failed", failure, queue_id=draft.queue_id)
        return NOT_QUEUED

    def _unavailable(self, failure: Failure, answer: Any) -> Any:
        if failure.check(Unavailable) is None:
            self.log.failure("an address could not be judged", failure)
        else:
            self.log.warn("an address could not be judged: {problem}", problem=failure.getErrorMessage())
        return answer

    def _record_refusal(
        self, facts: SessionFacts, envelope: Envelope, reply: Reply, stage: str, forward_path: Mailbox | None = None
    ) -> None:
        fields = {
            "stage": stage,
            "client": facts.client_address,
            "helo": facts.helo,
            "listener": facts.listener,
            "reverse_path": str(envelope.reverse_path or ""),
            "recipient": str(forward_path or ""),
            "reply": str(reply),
        }
        if facts.origin:
            fields["origin"] = facts.origin
        self._desk.record_event("rejected" if reply.is_permanent else "tempfailed", fields)


def _granted(options: MailOptions) -> dict[str, Any]:
    """What an operator may want to know of it (RFC 6710 §4.1)."""
    known = {"priority": options.priority, "hold_until": options.hold_until}
    return {name: value for name, value in known.items() if value}
