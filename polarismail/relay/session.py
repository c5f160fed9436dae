# SPDX-License-Identifier: MIT
"""One connection to one address of a next hop: from `connect` over any number of transactions to `quit`.

RFC 5321 §4.5.3.2 (time-outs), RFC 3207 (STARTTLS), RFC 4954 (AUTH), RFC 6152 (8BITMIME), RFC 1870 (SIZE), RFC 9422.

Guarantees: `Session.send` fires with one reply for each recipient, whatever the next hop does, within the
time-outs of relay/dialogue.py; content goes out as it is stored or not at all (what cannot be read to its end is never
finished with a dot); large content waits while the next hop does not read. Text that came behind the 220 of STARTTLS
breaks the connection, it is never taken for TLS's. A password is never said in plain text unless `tls="none"` was asked.

Never: retries, other addresses, a fall back to plain text on its own: the caller judges (`ConnectFailed.tls_broken`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from twisted.python.failure import Failure

from polarismail.net.outgoing import endpoint
from polarismail.net.tls import client_options, describe
from polarismail.relay.clients import (
    ClientSettings,
    ConnectFailed,
    RemoteHost,
    connect_reply,
    local_reply,
)
from polarismail.relay.dialogue import Dialogue
from polarismail.relay.looking import Read, has_utf8_fields, is_ascii
from polarismail.relay.resumption import Resumption
from polarismail.relay.transactions import (
    CONTENT_UNREADABLE,
    HEADER_NEEDS_SMTPUTF8,
    INTERNAL_PROBLEM,
    RecipientPath,
    needs_smtputf8,
    plan_recipients,
    plan_sender,
    split_off,
    too_big,
)
from polarismail.store.interfaces import QueuedMessage, QueuedRecipient
from polarismail.values.reply import Reply
from polarismail.wire.smtp_client import Step, Transaction, read_limits

__all__ = ["ClientSettings", "ConnectFailed", "RemoteHost", "Session", "connect"]


async def connect(
    reactor: Any,
    host: RemoteHost,
    settings: ClientSettings,
    *,
    bind_address: str | None = None,
    credentials: tuple[str, str] | None = None,
    tls: str = "opportunistic",
    verify: bool = False,
    resumption: Resumption | None = None,
) -> Session:
    """Open a session that is ready for `send`.

    `tls`: "none"; "opportunistic" (STARTTLS where offered, any certificate); "required" (STARTTLS or nothing); "implicit"
    (TLS at once, port 465). `verify`: the certificate must be valid for `host.name`. `credentials`: user and password
    for AUTH. `bind_address`: our address, the egress source. `resumption`: keeps TLS sessions from one connection to the
    next. Raises ConnectFailed only.
    """
    way = endpoint(reactor, host.address, host.port, settings.connect_seconds, bind_address)
    try:
        session = await way.connect(Factory.forProtocol(lambda: Session(reactor, host, settings, resumption)))
        assert isinstance(session, Session)
    except Exception as problem:
        raise ConnectFailed(connect_reply(problem)) from problem
    try:
        await session.open(tls, verify, credentials)
    except ConnectFailed:
        session.quit()  # nobody waits for the answer (RFC 5321 §4.1.1.10)
        raise
    except BaseException:  # a caller that does not wait any more
        session.abort()
        raise
    return session


class Session(Dialogue):
    """A connection that has introduced itself. One `send` at a time.

    `tls` is e.g. "TLSv1.3 TLS_AES_256_GCM_SHA384", or "". `transactions` counts those that were begun; `max_transactions` and
    `max_recipients` (of one) are what the next hop's LIMITS allow, and our own settings. `stale` is true when
    a connection that had been used before was lost before it answered anything of the next transaction: nothing of it
    can have been delivered, and a fresh connection may be tried at once.
    """

    log = Logger()

    def __init__(
        self, reactor: Any, host: RemoteHost, settings: ClientSettings, resumption: Resumption | None = None
    ) -> None:
        super().__init__(reactor, settings)
        self.host = host
        self.tls = ""
        self._keeps: Resumption | None = None
        self.transactions = 0
        self.max_recipients, self.max_transactions = settings.max_recipients, _UNLIMITED
        self.stale = False
        self._max_domains: int | None = None
        self._resumption = resumption
        self._content: tuple[QueuedMessage, Read] | None = None

    # -- what the relay asks -------------------------------------------------------------------------------------------

    @property
    def usable(self) -> bool:
        """Whether `send` may be called now."""
        return self._ready and not self._closed and self._waiter is None and self._engine.is_idle

    @property
    def remote_name(self) -> str:
        """What the next hop calls itself in its EHLO reply."""
        return self._engine.remote_name

    @property
    def extensions(self) -> dict[str, str]:
        """What the last EHLO offered: keyword in upper case -> parameters."""
        return self._engine.extensions

    def describe(self) -> str:
        """`mx.example.org[192.0.2.1]:25`."""
        return str(self.host)

    async def send(self, message: QueuedMessage, recipients: Sequence[QueuedRecipient], read: Read) -> list[Reply]:
        """Offer one message; returns the final verdict for each recipient, in their order, and never raises.

        `message.inline` is used where present, else `read(offset, octets)`.
        """
        verdicts: list[Reply | None] = [None] * len(recipients)
        try:
            await self._transact(message, recipients, read, verdicts)
        except Exception:
            # A defect of ours, not the next hop's: the mail waits, and the connection's state is unknown.
            self.log.failure("{queue_id}: cannot be sent to {host}", queue_id=message.queue_id, host=str(self.host))
            self.abort()
        return [verdict or INTERNAL_PROBLEM for verdict in verdicts]

    def quit(self) -> Deferred[None]:
        """Say goodbye and close, at once where nobody listens; fires when that is done, after `quit_seconds` at the latest.
        May be left alone."""
        if self._closed or self._waiter is not None or not self._engine.is_idle:
            self.abort()
            return succeed(None)
        self._ready = False
        if self._keeps is not None:
            self._keeps.keep(self.host, self.transport.getHandle())
        self._engine.quit()
        return self._wait().addBoth(lambda _: self._close())

    def _close(self) -> None:
        """Close in good order; at once where the other side does not take part."""
        if not self._closed:
            self.transport.loseConnection()
            self._deadline.allow(self._settings.quit_seconds)

    # -- the beginning -------------------------------------------------------------------------------------------------

    async def open(self, tls: str, verify: bool, credentials: tuple[str, str] | None) -> None:
        """Greeting, EHLO, STARTTLS, AUTH as asked. Raises ConnectFailed. For `connect` only."""
        if tls == "implicit":
            await self._handshake(verify)
        greeting = (await self._wait()).reply
        if not greeting.is_positive:
            raise ConnectFailed(greeting)
        await self._introduce()
        if tls in ("opportunistic", "required") and "STARTTLS" in self._engine.extensions:
            try:
                await self._start_tls(tls, verify)
            except ConnectFailed as problem:
                raise ConnectFailed(problem.reply, tls_broken=not problem.resumed, resumed=problem.resumed) from problem
        elif tls == "required":
            raise ConnectFailed(local_reply(4, 7, 0, "TLS is required, and the server does not offer STARTTLS"))
        if credentials is not None:
            if not self.tls and tls != "none":
                raise ConnectFailed(local_reply(4, 7, 0, "No TLS: the password is not sent in plain text"))
            await self._authenticate(*credentials)
        self._ready = True

    async def _start_tls(self, tls: str, verify: bool) -> None:
        self._engine.starttls()
        answer = (await self._wait()).reply
        if answer.is_positive:
            if not self._engine.is_clean:
                # Believing it inside TLS would let anybody on the way speak for the server (HOSTILE 2).
                raise ConnectFailed(local_reply(4, 7, 0, "The server sent plain text behind its 220 to STARTTLS"))
            await self._handshake(verify)
            self._engine.tls_started()
            await self._introduce()
        elif tls == "required":
            raise ConnectFailed(local_reply(4, 7, 0, f"TLS is required, and STARTTLS was answered: {answer}"))

    async def _introduce(self) -> None:
        self._engine.ehlo()
        answer = (await self._wait()).reply
        if answer.is_permanent:
            self._engine.helo()
            answer = (await self._wait()).reply
        if not answer.is_positive:
            raise ConnectFailed(answer)
        limits = read_limits(self._engine.extensions)
        self.max_recipients = min(self._settings.max_recipients, limits.get("RCPTMAX", _UNLIMITED))
        self.max_transactions = limits.get("MAILMAX", _UNLIMITED)
        self._max_domains = limits.get("RCPTDOMAINMAX")

    async def _handshake(self, verify: bool) -> None:
        try:
            options = client_options(self.host.name, verify, self._settings.ca_path)
            resumption = None if verify else self._resumption
            is_offered = resumption is not None and self.host in resumption
            if resumption is not None:
                options = resumption.options(self.host, options)
            self._handshaking = True
            waiter: Deferred[None] = Deferred()  # fires in handshakeCompleted
            self._waiter = waiter
            self._deadline.allow(self._settings.handshake_seconds)
            self.transport.startTLS(options)
        except Exception as problem:
            self._handshaking, self._waiter = False, None
            self.log.failure("TLS with {host} could not begin", host=str(self.host))
            raise ConnectFailed(local_reply(4, 7, 5, f"TLS could not begin: {type(problem).__name__}")) from problem
        try:
            await waiter
        except ConnectFailed as problem:
            if resumption is None or not is_offered:
                raise
            resumption.drop(self.host)
            raise ConnectFailed(problem.reply, resumed=True) from problem
        self.tls = describe(self.transport)
        self._keeps = resumption

    async def _authenticate(self, user: str, password: str) -> None:
        offered = self._engine.extensions.get("AUTH", "").upper().split()
        engine, name, secret = self._engine, user.encode(), password.encode()
        if "PLAIN" in offered:
            engine.auth("PLAIN", b"\0" + name + b"\0" + secret)
            steps: list[bytes] = []
        elif "LOGIN" in offered:
            engine.auth("LOGIN")
            steps = [name, secret]
        else:
            raise ConnectFailed(local_reply(4, 7, 0, "The server offers neither AUTH PLAIN nor AUTH LOGIN"))
        answer = (await self._wait()).reply
        while answer.code == 334 and steps:
            engine.auth_response(steps.pop(0))
            answer = (await self._wait()).reply
        if answer.code != 235:
            raise ConnectFailed(
                answer if not answer.is_positive else local_reply(4, 7, 0, f"AUTH was answered: {answer}")
            )

    # -- transactions --------------------------------------------------------------------------------------------------

    async def _transact(
        self,
        message: QueuedMessage,
        recipients: Sequence[QueuedRecipient],
        read: Read,
        verdicts: list[Reply | None],
    ) -> None:
        extensions = self._engine.extensions
        sender: bytes | Reply | None = too_big(message, extensions)
        waiting: list[RecipientPath] = []
        if sender is None:
            plain = message.inline.isascii() if message.inline is not None else None
            if plain is None and "8BITMIME" not in extensions:
                plain = await is_ascii(message, read, self._settings.piece_octets)
            utf8 = "SMTPUTF8" in extensions and needs_smtputf8(message, recipients)
            if (
                message.smtputf8
                and not (utf8 or plain)
                and await has_utf8_fields(message, read, self._settings.piece_octets)
            ):
                sender = HEADER_NEEDS_SMTPUTF8
            else:
                sender = plan_sender(message, extensions, plain, utf8=utf8)
                waiting = plan_recipients(recipients, verdicts, extensions, utf8=utf8)
        if isinstance(sender, Reply):
            _decide_rest(verdicts, sender)
            return
        while waiting:
            if not self.usable:
                _decide_rest(verdicts, local_reply(4, 4, 2, "The connection is not usable any more"))
                return
            group, waiting = split_off(waiting, self.max_recipients, self._max_domains)
            transaction = Transaction(sender, [path.octets for path in group])
            await self._run(transaction, message, read)
            again: list[RecipientPath] = []
            for place, (path, verdict) in enumerate(zip(group, transaction.verdicts, strict=True)):
                # "Too many recipients" is about this transaction: the rest goes in another one at once
                # (RFC 5321 §4.5.3.1.10), and as one recipient at least was accepted this ends.
                accepted = transaction.accepted
                if (
                    accepted
                    and place not in accepted
                    and verdict
                    and verdict.code == 452
                    and verdict.status in _TOO_MANY
                ):
                    again.append(path)
                else:
                    verdicts[path.number] = verdict
            waiting = again + waiting

    async def _run(self, transaction: Transaction, message: QueuedMessage, read: Read) -> None:
        reused, self.transactions = self.transactions > 0, self.transactions + 1
        self._content = message, read
        self._engine.begin(transaction)
        try:
            await self._wait()
        except ConnectFailed:
            self.stale = reused and not transaction.answered_any  # its verdicts are complete all the same
        self._content = None

    def _begin_content(self) -> None:
        assert self._content is not None
        if not self._engine.is_clean:
            return  # its verdict came with the 354: a yes breaks the connection, a no is believed
        message, read = self._content
        if message.inline is not None:
            engine = self._engine
            self._write(engine.content(message.inline) + engine.end_content())
        else:
            Deferred.fromCoroutine(self._stream(message, read)).addErrback(self._content_failed, message)

    async def _stream(self, message: QueuedMessage, read: Read) -> None:
        """Send stored content piece by piece, as fast as the next hop reads."""
        self.transport.registerProducer(self, True)
        self._streaming = True
        try:
            offset = 0
            while offset < message.size:
                self._deadline.allow(self._settings.block_seconds)
                piece = await read(offset, min(self._settings.piece_octets, message.size - offset))
                if not piece:
                    raise EOFError(f"content ends at {offset} of {message.size} octets")
                offset += len(piece)
                if not await self._write_piece(piece):
                    return  # broken meanwhile: the verdicts are given
            self._write(self._engine.end_content())
        finally:
            self._streaming = False
            if not self._closed:
                self.transport.unregisterProducer()
        self._allow_next()

    async def _write_piece(self, piece: bytes) -> bool:
        """Write one piece, and wait until the next hop has room for more; False when it does not want it any more."""
        if not self._engine.wants_content:
            return False
        self._write(self._engine.content(piece))
        while self._writable is not None:
            await self._writable
        return self._engine.expects is Step.CONTENT

    def _content_failed(self, failure: Failure, message: QueuedMessage) -> None:
        """Our own spool could not give all octets: without a final dot, nobody takes the half for the whole."""
        self.log.failure("{queue_id}: content cannot be read", failure, queue_id=message.queue_id)
        self._end(CONTENT_UNREADABLE)
        self.abort()


_UNLIMITED = 1_000_000
# A 452 with one of these speaks of the transaction, not of the recipient.
_TOO_MANY = (None, (4, 5, 3))


def _decide_rest(verdicts: list[Reply | None], reply: Reply) -> None:
    verdicts[:] = [verdict or reply for verdict in verdicts]
