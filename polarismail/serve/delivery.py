# SPDX-License-Identifier: MIT
"""Other people's IMessageDelivery behind our server: any Twisted portal that knows twisted.mail's contract can be given.

The contract's IMessage takes a line at a time; it is fed from the finished draft, so that nothing reaches it of a message
that was cut off, too big or malformed. Its answer decides ours: the promise of the 250 is the avatar's to keep.
"""

from __future__ import annotations

import tempfile
from typing import Any

from twisted.internet.defer import Deferred, DeferredList, ensureDeferred, maybeDeferred, succeed
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from polarismail.auth.interfaces import IReception
from polarismail.store.interfaces import IDraft
from polarismail.values.address import Mailbox
from polarismail.values.envelope import Envelope, Recipient, SessionFacts
from polarismail.values.reply import NOT_QUEUED, OK, RECIPIENT_OK, SENDER_OK, Reply

_MEMORY_OCTETS = 65536
_LINES_A_TURN = 1000
# Legal, but not in the words that the contract's Address has.
NOT_EXPRESSIBLE = Reply(553, (5, 1, 3), "Address not supported here")


@implementer(IDraft)
class TemporaryDraft:
    """Content that nobody has promised to keep: in memory, above 64 KB in a temporary file."""

    queue_id = ""
    trace = b""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_MEMORY_OCTETS)
        self.size = 0

    def write(self, octets: bytes) -> Deferred[None] | None:
        self._file.write(octets)
        self.size += len(octets)
        return None

    def head(self, octets: int) -> bytes:
        self._file.seek(0)
        head = self._file.read(octets)
        self._file.seek(0, 2)
        return head

    def abandon(self) -> None:
        self._file.close()

    def lines(self) -> Any:
        """Every line without its line end."""
        self._file.seek(0)
        return (line.rstrip(b"\r\n") for line in self._file)


@implementer(IReception)
class DeliveryReception:
    """An IMessageDelivery as a reception. `reactor` gives others a turn while a long message is fed to it."""

    log = Logger()
    account = None

    def __init__(self, delivery: Any, reactor: Any) -> None:
        self._delivery, self._reactor = delivery, reactor
        self._makers: dict[Mailbox, Any] = {}

    def check_mail(self, facts: SessionFacts, mail: Any) -> Deferred[Reply]:
        """`validateFrom` with the contract's (host name, address) pair and its Address."""
        from twisted.mail.smtp import Address, AddressError

        self._makers = {}
        try:
            # The contract's Address is ASCII: its listeners do not offer SMTPUTF8 unless somebody wants these refusals.
            origin = Address(str(mail.reverse_path or ""))
        except (AddressError, UnicodeError):
            return succeed(NOT_EXPRESSIBLE)
        d = maybeDeferred(self._delivery.validateFrom, _helo(facts), origin)
        return d.addCallbacks(lambda _: SENDER_OK, self._refusal)

    def check_rcpt(
        self, facts: SessionFacts, envelope: Envelope, rcpt: Any
    ) -> Deferred[tuple[Reply, tuple[Recipient, ...]]]:
        """`validateTo`; what it returns makes the IMessage later."""
        from twisted.mail.smtp import AddressError, User

        try:
            user = User(str(rcpt.forward_path), _helo(facts), None, str(envelope.reverse_path or ""))
        except (AddressError, UnicodeError):
            return succeed((NOT_EXPRESSIBLE, ()))
        d = maybeDeferred(self._delivery.validateTo, user)

        def accepted(maker: Any) -> tuple[Reply, tuple[Recipient, ...]]:
            self._makers[rcpt.forward_path] = maker
            path = rcpt.forward_path
            return RECIPIENT_OK, (Recipient(path, path, path.domain, None, rcpt.dsn),)

        return d.addCallbacks(accepted, lambda failure: (self._refusal(failure), ()))

    def begin_content(self, facts: SessionFacts, envelope: Envelope) -> TemporaryDraft:
        """A draft of our own; the avatar sees nothing before it is complete."""
        return TemporaryDraft()

    def end_of_data(self, facts: SessionFacts, envelope: Envelope, draft: Any, end: Any) -> Deferred[Any]:
        """Feed every IMessage, then ask each for its `eomReceived`; one failure is a 451 for the whole message, but over
        LMTP for its recipient alone."""
        if end.problem is not None:
            draft.abandon()
            return succeed(end.problem)
        return ensureDeferred(self._deliver(facts, envelope, draft))

    async def _deliver(self, facts: SessionFacts, envelope: Envelope, draft: Any) -> Reply | tuple[Reply, ...]:
        from twisted.mail.smtp import User

        messages = []
        try:
            messages = [self._makers[recipient.forward_path]() for recipient in envelope.recipients]
            users = [User(str(r.forward_path), _helo(facts), None, "") for r in envelope.recipients]
            received = self._delivery.receivedHeader(_helo(facts), str(envelope.reverse_path or ""), users)
            for message in messages:
                if received:
                    message.lineReceived(received)
            for number, line in enumerate(draft.lines(), 1):
                if number % _LINES_A_TURN == 0:
                    await deferLater(self._reactor, 0)
                for message in messages:
                    message.lineReceived(line)
            results: Any = await DeferredList(
                [maybeDeferred(message.eomReceived) for message in messages], consumeErrors=True
            )
        except Exception:
            self.log.failure("an IMessageDelivery failed")
            for message in messages:
                try:
                    message.connectionLost()
                except Exception:
                    self.log.failure("an IMessage failed")
            return NOT_QUEUED
        finally:
            draft.abandon()
        for done, result in results:
            if not done:
                self.log.failure("an IMessage failed", result)
        if facts.is_lmtp:
            return tuple(OK if done else NOT_QUEUED for done, _ in results)
        return OK if all(done for done, _ in results) else NOT_QUEUED

    def _refusal(self, failure: Failure) -> Reply:
        """The contract refuses by raising SMTPServerError or a subclass, which carries a code."""
        from twisted.mail.smtp import SMTPServerError

        if failure.check(SMTPServerError) is None:
            self.log.failure("an IMessageDelivery failed", failure)
            return NOT_QUEUED
        problem: Any = failure.value
        if not 400 <= problem.code <= 599:
            self.log.failure("an IMessageDelivery refuses with a code that is no refusal", failure)
            return NOT_QUEUED
        text = problem.resp.decode("utf-8", "replace") if isinstance(problem.resp, bytes) else str(problem.resp)
        return Reply(problem.code, (problem.code // 100, 0, 0), text)


def _helo(facts: SessionFacts) -> tuple[bytes, bytes]:
    return facts.helo.encode("utf-8", "replace"), facts.client_address.encode("ascii", "replace")
