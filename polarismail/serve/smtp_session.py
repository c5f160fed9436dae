# SPDX-License-Identifier: MIT
"""One SMTP session: asks the reception about each event of the engine and says what it answered.

Guarantees: exactly one reply for each command; the mail transaction's state lives here and in the engine only, and is
forgotten at RSET, EHLO, STARTTLS and the end of data; errors slow the client down and then end the session (HOSTILE 0).
RFC 5321 §4.1, RFC 3207 (STARTTLS), RFC 4954 (AUTH).
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any

from attrs import field, frozen
from twisted.cred.credentials import Anonymous
from twisted.cred.error import LoginFailed, UnauthorizedLogin
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.mail.interfaces import IMessageDelivery
from twisted.python.failure import Failure

from polarismail.auth.interfaces import IReception
from polarismail.auth.portal import credentials_for
from polarismail.net import tls
from polarismail.net.listeners import Listener, permits_plaintext
from polarismail.net.transport import Connection
from polarismail.serve.delivery import DeliveryReception
from polarismail.store.interfaces import IDraft
from polarismail.values import reply as replies
from polarismail.values.address import Mailbox
from polarismail.values.envelope import Envelope, Recipient, SessionFacts
from polarismail.values.errors import SpoolFull, SpoolUnhealthy, Unavailable
from polarismail.values.reply import Reply
from polarismail.wire import sasl, smtp_server
from polarismail.wire.sasl import Mechanism
from polarismail.wire.smtp_server import SmtpServer

_NO_ENVELOPE = Envelope(None, ())


@frozen
class SessionSettings:
    """Time-outs and budgets of one SMTP session (NUMBERS, HOSTILE 0)."""

    command_seconds: float = 300.0
    content_seconds: float = 300.0
    min_octets_per_second: int = 500
    soft_errors: int = 10
    soft_error_delay_seconds: float = 1.0
    hard_errors: int = 20
    max_junk_commands: int = 100
    max_auth_failures: int = 3


@frozen
class SmtpContext:
    """What all sessions of one listener share."""

    hostname: str
    listener: Listener
    portal: Any  # twisted.cred.portal.Portal
    reactor: Any
    tls_options: Callable[[], Any]  # the server's current TLS options, or None where TLS is not to be had
    record_event: Callable[[str, dict[str, Any]], None]
    settings: SessionSettings = field(factory=SessionSettings)
    banner: Reply = field(init=False)
    helo_reply: Reply = field(init=False)

    @banner.default
    def _make_banner(self) -> Reply:
        return Reply(220, None, f"{self.hostname} ESMTP polarismail")

    @helo_reply.default
    def _make_helo_reply(self) -> Reply:
        return Reply(250, None, self.hostname)


class SmtpSession:
    """See the module. `net.transport.Session` for SMTP."""

    log = Logger()

    def __init__(self, context: SmtpContext) -> None:
        self._context, self._settings = context, context.settings
        self._reception: Any = None
        self._logout: Callable[[], None] | None = None
        self._account = ""
        self._mail: smtp_server.Mail | None = None
        self._recipients: dict[Mailbox, Recipient] = {}  # by forward-path: aliases may lead to the same one twice
        self._envelope = _NO_ENVELOPE
        self._draft: IDraft | None = None
        self._draft_failed = self._no_room = False
        self._waiting_since: float | None = None
        self._exchange: Mechanism | None = None
        self._errors = self._deferrals = self._junk = self._auth_failures = 0
        self._hello: smtp_server.Hello | None = None
        self._tls = ""
        self._facts = SessionFacts()

    def auth_mechanisms(self, tls_active: bool) -> tuple[str, ...]:
        """What AUTH offers this client now: nothing in clear unless the listener says so (RFC 4954 §4)."""
        if not tls_active and not permits_plaintext(self._context.listener, self._facts.client_address):
            return ()
        return tuple(sasl.MECHANISMS)

    # -- net.transport.Session ---------------------------------------------------------------------------------------

    def connected(self, connection: Connection) -> None:
        engine = connection.engine
        assert isinstance(engine, SmtpServer)
        self._connection, self._engine = connection, engine
        self._note_facts()
        connection.send(self._engine.answer(self._context.banner))

    def secured(self) -> None:
        self._tls = tls.describe(self._connection.transport)
        self._note_facts()

    def do(self, event: Any) -> Deferred[None] | None:
        if type(event) is not smtp_server.Content:
            self._waiting_since = None
        return _PERFORM[type(event)](self, event)

    def waiting(self) -> float:
        # Asked after each octet of a command that is not complete: the deadline must not move with them (HOSTILE F12).
        now = monotonic()
        if self._waiting_since is None:
            self._waiting_since = now
            if self._draft is None:
                return self._settings.command_seconds
        allowed = self._settings.command_seconds
        if self._draft is not None:
            # It grows with what arrives, so that a whole content comes with at least so many octets a second.
            allowed = (
                self._settings.content_seconds + self._engine.content_octets / self._settings.min_octets_per_second
            )
        return max(0.0, self._waiting_since + allowed - now)

    def may_end(self) -> bool:
        return self._draft is None

    def timed_out(self) -> bytes:
        return replies.TOO_SLOW.octets

    def failed(self, problem: BaseException) -> bytes:
        self.log.failure("an SMTP session of {client} failed", Failure(problem), client=self._facts.client_address)
        self._forget_transaction()
        return self._engine.answer(replies.TRY_AGAIN)

    def lost(self) -> None:
        self._forget_transaction()
        self._log_out()

    # -- replies -----------------------------------------------------------------------------------------------------

    def _answer(self, reply: Reply) -> Deferred[None] | None:
        """Send the reply that the last event is owed; slow down, or end, a session full of errors."""
        self._connection.send(self._engine.answer(reply))
        if reply.code < 400:
            return None
        if reply.code == 421:
            self._connection.close(lingers=True)
            return None
        if reply.is_transient and self._deferrals < self._engine.settings.max_recipients:
            # "Try again later" is no fault of the client's, above all not for the recipients beyond the limit: those
            # before it must get their message (RFC 5321 §4.5.3.1.10). But it goes on for so long only.
            self._deferrals += 1
            return None
        self._errors += 1
        if self._errors >= self._settings.hard_errors:
            self._connection.send(replies.TOO_MANY_ERRORS.octets)
            self._connection.close(lingers=True)
        elif self._errors >= self._settings.soft_errors:
            return deferLater(self._context.reactor, self._settings.soft_error_delay_seconds, lambda: None)
        return None

    def _answer_junk(self, reply: Reply) -> Deferred[None] | None:
        """The same for commands that do nothing for mail: too many of them are an attack (HOSTILE F14)."""
        self._junk += 1
        if self._junk > self._settings.max_junk_commands:
            return self._answer(replies.TOO_MANY_ERRORS)
        return self._answer(reply)

    # -- commands ----------------------------------------------------------------------------------------------------

    def _do_refused(self, event: smtp_server.Refused) -> Deferred[None] | None:
        waits = (self._answer_junk if event.junk else self._answer)(event.reply)
        if event.closes:
            self._connection.close(lingers=True)
        return waits

    def _do_hello(self, event: smtp_server.Hello) -> Deferred[None] | None:
        self._forget_transaction()
        self._hello = event
        self._note_facts()
        if event.verb == "HELO":
            return self._answer_junk(self._context.helo_reply)
        return self._answer_junk(
            self._engine.ehlo_reply(f"{self._context.hostname} greets {self._facts.client_address}")
        )

    def _do_mail(self, event: smtp_server.Mail) -> Deferred[None] | None:
        if self._reception is None:
            d: Deferred[Any] = self._context.portal.login(Anonymous(), None, IReception, IMessageDelivery)
            return d.addCallbacks(self._welcomed_to_mail, self._not_welcomed, (event,))
        return self._check_mail(event)

    def _welcomed_to_mail(self, login: Any, event: smtp_server.Mail) -> Deferred[None] | None:
        self._welcomed(login)
        return self._check_mail(event) if self._reception is not None else None

    def _check_mail(self, event: smtp_server.Mail) -> Deferred[None] | None:
        return _then(self._reception.check_mail(self._facts, event), self._mail_checked, event)

    def _mail_checked(self, reply: Reply, event: smtp_server.Mail) -> Deferred[None] | None:
        if reply.is_positive:
            self._mail = event
            self._recipients = {}
            self._envelope = self._make_envelope(event)
        return self._answer(reply)

    def _make_envelope(self, mail: smtp_server.Mail) -> Envelope:
        """The mail transaction so far."""
        return Envelope(
            mail.reverse_path,
            tuple(self._recipients.values()),
            mail.ret,
            mail.envid,
            mail.body,
            mail.smtputf8,
            self._account_id(),
        )

    def _do_rcpt(self, event: smtp_server.Rcpt) -> Deferred[None] | None:
        return _then(self._reception.check_rcpt(self._facts, self._envelope, event), self._rcpt_checked)

    def _rcpt_checked(self, result: tuple[Reply, tuple[Recipient, ...]]) -> Deferred[None] | None:
        reply, recipients = result
        mail = self._mail
        if reply.is_positive and mail is not None:
            for recipient in recipients:
                self._recipients.setdefault(recipient.forward_path, recipient)
            self._envelope = self._make_envelope(mail)
        return self._answer(reply)

    def _do_data(self, event: smtp_server.Data) -> Deferred[None] | None:
        try:
            self._draft = self._reception.begin_content(self._facts, self._envelope)
        except SpoolFull:
            self._forget_transaction()
            return self._answer(replies.NO_ROOM)
        except SpoolUnhealthy:
            self._forget_transaction()
            return self._answer(replies.UNHEALTHY)
        self._draft_failed = self._no_room = False
        return self._answer(replies.GO_AHEAD)

    def _do_content(self, event: smtp_server.Content) -> Deferred[None] | None:
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

    def _do_end_of_data(self, event: smtp_server.EndOfData) -> Deferred[None] | None:
        draft, self._draft = self._draft, None
        envelope = self._envelope
        self._forget_transaction()
        if draft is None or self._draft_failed:
            return self._ended(replies.NO_ROOM if self._no_room else replies.NOT_QUEUED, event)
        done = self._reception.end_of_data(self._facts, envelope, draft, event)
        return _then(done, self._ended, event)

    def _ended(self, reply: Reply, event: smtp_server.EndOfData) -> Deferred[None] | None:
        if reply.is_positive:
            self._errors = self._deferrals = self._junk = (
                0  # whoever brings mail may go on: budgets are for those who do not
            )
        waits = self._answer(reply)
        if event.closes or reply is replies.NOT_QUEUED:
            # On doubt the connection goes too: nobody may take a later reply for this one (DURABILITY).
            self._connection.close(lingers=True)
        return waits

    def _do_rset(self, event: smtp_server.Rset) -> Deferred[None] | None:
        self._forget_transaction()
        return self._answer_junk(replies.OK)

    def _do_noop(self, event: smtp_server.Noop) -> Deferred[None] | None:
        return self._answer_junk(replies.OK)

    def _do_vrfy(self, event: smtp_server.Vrfy) -> Deferred[None] | None:
        return self._answer_junk(replies.CANNOT_VERIFY)

    def _do_help(self, event: smtp_server.Help) -> Deferred[None] | None:
        return self._answer_junk(Reply(214, (2, 0, 0), "See RFC 5321, and postmaster for people"))

    def _do_quit(self, event: smtp_server.Quit) -> None:
        self._connection.send(self._engine.answer(replies.GOODBYE))
        self._connection.close()

    # -- TLS and login -----------------------------------------------------------------------------------------------

    def _do_starttls(self, event: smtp_server.StartTls) -> Deferred[None] | None:
        options = self._context.tls_options()
        if options is None:
            return self._answer(replies.TLS_UNAVAILABLE)
        self._connection.send(self._engine.answer(replies.READY_FOR_TLS))
        if self._engine.out_of_step:
            return None  # octets behind the command: the next event refuses them and ends the session
        self._connection.start_tls(options)
        # RFC 3207 §4.2: what was said in clear is forgotten, by the engine and here, a login not excepted.
        self._engine.tls_started()
        self._forget_transaction()
        self._log_out()
        self._hello, self._account, self._exchange = None, "", None
        self._note_facts()
        return None

    def _do_auth(self, event: smtp_server.Auth) -> Deferred[None] | None:
        self._exchange = sasl.MECHANISMS[event.mechanism]()
        return self._step(event.initial)

    def _do_auth_response(self, event: smtp_server.AuthResponse) -> Deferred[None] | None:
        if event.octets is None:
            self._exchange = None
            return self._answer(replies.AUTH_CANCELLED)
        return self._step(event.octets)

    def _step(self, response: bytes | None) -> Deferred[None] | None:
        assert self._exchange is not None
        outcome = self._exchange.step(response)
        if isinstance(outcome, sasl.Challenge):
            self._connection.send(self._engine.challenge(outcome.octets))
            return None
        self._exchange = None
        if isinstance(outcome, sasl.Malformed):
            return self._answer(Reply(501, (5, 5, 2), outcome.reason))
        portal = self._context.portal
        try:
            credentials = credentials_for(portal, outcome.authcid, outcome.password.encode(), outcome.authzid)
        except UnauthorizedLogin:
            return self._login_failed(Failure(), outcome.authcid)
        d: Deferred[Any] = portal.login(credentials, None, IReception, IMessageDelivery)
        return d.addCallbacks(self._logged_in, self._login_failed, (), {}, (outcome.authcid,), {})

    def _logged_in(self, login: tuple[Any, Any, Callable[[], None]]) -> Deferred[None] | None:
        self._welcomed(login)
        account = getattr(self._reception, "account", None)
        self._account = str(account.address) if account is not None else "?"
        self._note_facts()
        return self._answer(replies.AUTHENTICATED)

    def _login_failed(self, failure: Failure, name: str) -> Deferred[None] | None:
        if failure.check(UnauthorizedLogin, LoginFailed) is None:
            if failure.check(Unavailable) is None:
                self.log.failure("a login could not be judged", failure)
            return self._answer(replies.AUTH_UNAVAILABLE)
        self._auth_failures += 1
        self._context.record_event(
            "login-failed",
            {"client": self._facts.client_address, "listener": self._context.listener.name, "login": name},
        )
        if self._auth_failures >= self._settings.max_auth_failures:
            self._connection.send(self._engine.answer(replies.BAD_CREDENTIALS))
            self._connection.close(lingers=True)
            return None
        return self._answer(replies.BAD_CREDENTIALS)

    def _welcomed(self, login: tuple[Any, Any, Callable[[], None]]) -> None:
        interface, avatar, logout = login
        self._log_out()
        self._logout = logout
        if interface is IMessageDelivery:
            avatar = DeliveryReception(avatar, self._context.reactor)
        self._reception = avatar
        if self._connection.closed:
            self._log_out()  # it left while the portal was asked: `lost` found nothing to let go of yet

    def _log_out(self) -> None:
        """Let go of the avatar."""
        self._reception = None
        logout, self._logout = self._logout, None
        if logout is not None:
            logout()

    def _not_welcomed(self, failure: Failure) -> Deferred[None] | None:
        """The portal takes nobody without a login."""
        if failure.check(UnauthorizedLogin, LoginFailed) is not None:
            return self._answer(replies.NEED_AUTH)
        self.log.failure("the portal could not say who may send", failure)
        return self._answer(replies.TRY_AGAIN)

    # -- state -------------------------------------------------------------------------------------------------------

    def _account_id(self) -> int | None:
        account = getattr(self._reception, "account", None)
        return account.id if account is not None else None

    def _forget_transaction(self) -> None:
        self._mail, self._recipients, self._envelope = None, {}, _NO_ENVELOPE
        draft, self._draft = self._draft, None
        if draft is not None:
            draft.abandon()

    def _note_facts(self) -> None:
        peer = self._connection.peer
        extended = self._hello is not None and self._hello.verb == "EHLO"
        protocol = "SMTP" if not extended else "ESMTP" + ("S" if self._tls else "") + ("A" if self._account else "")
        self._facts = SessionFacts(
            listener=self._context.listener.name,
            protocol=protocol,
            client_address=getattr(peer, "host", "") or "",
            client_port=getattr(peer, "port", 0) or 0,
            helo=self._hello.domain if self._hello is not None else "",
            account=self._account,
            tls=self._tls,
        )


def _then(result: Any, function: Callable[..., Deferred[None] | None], *args: Any) -> Deferred[None] | None:
    """Go on with a value now, or with a Deferred's value when it comes: the usual case costs no Deferred."""
    kind = type(result)
    if kind is not Reply and kind is not tuple and isinstance(result, Deferred):  # its isinstance takes a detour
        return result.addCallback(function, *args)
    return function(result, *args)


_PERFORM: dict[type, Callable[[SmtpSession, Any], Deferred[None] | None]] = {
    smtp_server.Refused: SmtpSession._do_refused,
    smtp_server.Hello: SmtpSession._do_hello,
    smtp_server.Mail: SmtpSession._do_mail,
    smtp_server.Rcpt: SmtpSession._do_rcpt,
    smtp_server.Data: SmtpSession._do_data,
    smtp_server.Content: SmtpSession._do_content,
    smtp_server.EndOfData: SmtpSession._do_end_of_data,
    smtp_server.Rset: SmtpSession._do_rset,
    smtp_server.Noop: SmtpSession._do_noop,
    smtp_server.Vrfy: SmtpSession._do_vrfy,
    smtp_server.Help: SmtpSession._do_help,
    smtp_server.Quit: SmtpSession._do_quit,
    smtp_server.StartTls: SmtpSession._do_starttls,
    smtp_server.Auth: SmtpSession._do_auth,
    smtp_server.AuthResponse: SmtpSession._do_auth_response,
}
