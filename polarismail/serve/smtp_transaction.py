# SPDX-License-Identifier: MIT
"""The mail transaction of an SMTP session: MAIL, RCPT, the content, and the one reply to its end.

Guarantees: the transaction's state lives here and in the engine only, and is forgotten at RSET, EHLO, STARTTLS and the end
of data; a content that cannot be kept is read to its end and then refused; on doubt the connection ends (DURABILITY).
RFC 5321 §4.1.1, RFC 3030 §2 (BDAT).
"""

from __future__ import annotations

from time import monotonic
from typing import Any

from twisted.cred.credentials import Anonymous
from twisted.internet.defer import Deferred
from twisted.mail.interfaces import IMessageDelivery
from twisted.python.failure import Failure

from polarismail.auth.interfaces import IReception
from polarismail.serve.smtp_context import SmtpContext
from polarismail.serve.smtp_conversation import then
from polarismail.serve.smtp_login import LoginConversation
from polarismail.store.interfaces import IDraft
from polarismail.values import reply as replies
from polarismail.values.address import Mailbox
from polarismail.values.envelope import NO_OPTIONS, Envelope, MailOptions, Recipient
from polarismail.values.errors import SpoolFull, SpoolUnhealthy, Unavailable
from polarismail.values.reply import Reply
from polarismail.wire import smtp_events
from polarismail.wire.smtp_xclient import NO_CLAIMS

_UNKNOWN = replies.UNKNOWN_RECIPIENT.status
_NO_ENVELOPE = Envelope(None, ())
# Each chunk costs us what a command does: below this much, more of them than junk are an attack (HOSTILE F14).
_SMALL_CHUNK_OCTETS = 512


class TransactionConversation(LoginConversation):
    """A conversation in which mail is handed over."""

    def __init__(self, context: SmtpContext) -> None:
        super().__init__(context)
        self._mail: smtp_events.Mail | None = None
        self._recipients: dict[Mailbox, Recipient] = {}  # by forward-path: aliases may lead to the same one twice
        self._envelope = _NO_ENVELOPE
        self._options = NO_OPTIONS
        self._draft: IDraft | None = None
        self._draft_failed = self._no_room = False
        self._chunks_since: float | None = None  # when the first BDAT of this message came
        self._chunk_refused = False

    def _do_mail(self, event: smtp_events.Mail) -> Deferred[None] | None:
        if self._limited is not None and not self._account:
            refusal = self._limited.check_mail()
            if refusal is not None:
                return self._answer(refusal)
        if self._reception is None:
            d: Deferred[Any] = self._context.portal.login(Anonymous(), None, IReception, IMessageDelivery)
            return d.addCallbacks(self._welcomed_to_mail, self._not_welcomed, (event,))
        return self._check_mail(event)

    def _welcomed_to_mail(self, login: Any, event: smtp_events.Mail) -> Deferred[None] | None:
        self._welcomed(login)
        return self._check_mail(event) if self._reception is not None else None

    def _check_mail(self, event: smtp_events.Mail) -> Deferred[None] | None:
        return then(self._reception.check_mail(self._facts, event), self._mail_checked, event)

    def _mail_checked(
        self, result: Reply | tuple[Reply, MailOptions], event: smtp_events.Mail
    ) -> Deferred[None] | None:
        if type(result) is tuple:
            reply, self._options = result
        else:
            assert isinstance(result, Reply)
            reply, self._options = result, NO_OPTIONS
        if reply.is_positive:
            self._mail = event
            self._recipients = {}
            self._envelope = self._make_envelope(event)
        return self._answer(reply)

    def _make_envelope(self, mail: smtp_events.Mail) -> Envelope:
        """The mail transaction so far."""
        return Envelope(
            mail.reverse_path,
            tuple(self._recipients.values()),
            mail.ret,
            mail.envid,
            mail.body,
            mail.smtputf8,
            self._account_id(),
            self._options,
        )

    def _do_rcpt(self, event: smtp_events.Rcpt) -> Deferred[None] | None:
        if self._limited is not None and not self._account:
            refusal = self._limited.check_rcpt()
            if refusal is not None:
                return self._answer(refusal)
        return then(self._reception.check_rcpt(self._facts, self._envelope, event), self._rcpt_checked)

    def _rcpt_checked(self, result: tuple[Reply, tuple[Recipient, ...]]) -> Deferred[None] | None:
        reply, recipients = result
        mail = self._mail
        if reply.is_positive and mail is not None:
            for recipient in recipients:
                self._recipients.setdefault(recipient.forward_path, recipient)
            self._envelope = self._make_envelope(mail)
        elif reply.status == _UNKNOWN and not self._account:
            return self._answer_guess(reply)
        return self._answer(reply)

    def _do_data(self, event: smtp_events.Data) -> Deferred[None] | None:
        refusal = self._open_draft()
        if refusal is not None:
            self._forget_transaction()
            return self._answer(refusal)
        return self._answer(replies.GO_AHEAD)

    def _do_bdat(self, event: smtp_events.Bdat) -> Deferred[None] | None:
        refusal = self._open_draft()
        if refusal is replies.UNHEALTHY:
            return self._answer(refusal)  # which ends the session: its octets need not be waited for
        self._chunks_since, self._chunk_refused = monotonic(), False
        self._engine.read_chunks(refusal)
        return None

    def _open_draft(self) -> Reply | None:
        """Begin to keep a content; why not, where that cannot be."""
        self._draft_failed = self._no_room = False
        try:
            self._draft = self._reception.begin_content(self._facts, self._envelope)
        except SpoolFull:
            return replies.NO_ROOM
        except SpoolUnhealthy:
            return replies.UNHEALTHY
        return None

    def _do_end_of_chunk(self, event: smtp_events.EndOfChunk) -> Deferred[None] | None:
        reply = event.problem
        if reply is None and self._draft_failed:
            reply = replies.NO_ROOM if self._no_room else replies.NOT_QUEUED
        refused = reply is not None
        if reply is None:
            reply = Reply(250, (2, 0, 0), f"{event.octets} octets received")
        if event.octets < _SMALL_CHUNK_OCTETS:
            return self._answer_junk(reply)
        if refused and self._chunk_refused:
            # It was in the pipeline already (RFC 3030 §2): one message that cannot be kept is one error.
            self._connection.send(self._engine.answer(reply))
            return None
        self._chunk_refused = refused
        return self._answer(reply)

    def _do_content(self, event: smtp_events.Content) -> Deferred[None] | None:
        if self._draft_failed or self._draft is None:
            return None  # swallowed up to its end; the reply to the end of data says what happened
        try:
            waits = self._draft.write(event.octets)
        except Unavailable as problem:
            self._content_lost(Failure(problem))
            return None
        return waits.addErrback(self._content_lost) if waits is not None else None

    def _content_lost(self, failure: Failure) -> None:
        if self._draft is None:
            return  # the client left, and the draft was abandoned while it was being written
        if failure.check(Unavailable) is None:
            self.log.failure("the content of a message could not be written", failure)
        else:
            self.log.warn("the content of a message could not be written: {why}", why=failure.getErrorMessage())
        self._draft_failed = True
        self._no_room = failure.check(SpoolFull) is not None
        self._draft.abandon()

    def _do_end_of_data(self, event: smtp_events.EndOfData) -> Deferred[None] | None:
        draft, self._draft = self._draft, None
        facts, envelope = self._facts, self._envelope
        self._forget_transaction()
        if draft is None or self._draft_failed:
            problem = event.problem if draft is None else None
            return self._ended(problem or (replies.NO_ROOM if self._no_room else replies.NOT_QUEUED), event)
        done = self._reception.end_of_data(facts, envelope, draft, event)
        return then(done, self._ended, event)

    def _ended(self, reply: Reply, event: smtp_events.EndOfData) -> Deferred[None] | None:
        if reply.is_positive:
            # Whoever brings mail may go on: budgets are for those who do not.
            self._errors = self._deferrals = self._junk = 0
            self._progress = monotonic()
        waits = self._answer(reply)
        if event.closes or reply is replies.NOT_QUEUED:
            # On doubt the connection goes too: nobody may take a later reply for this one (DURABILITY).
            self._connection.close(lingers=True)
        return waits

    def _forget_transaction(self) -> None:
        self._mail, self._recipients, self._envelope = None, {}, _NO_ENVELOPE
        self._chunks_since = None
        if self._forwarded is not NO_CLAIMS:
            self._forwarded = NO_CLAIMS  # XFORWARD is in effect until the end of the transaction
            self._note_facts()
        draft, self._draft = self._draft, None
        if draft is not None:
            draft.abandon()
