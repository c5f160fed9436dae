# SPDX-License-Identifier: MIT
"""One POP3 session: answers the engine's events from a maildrop that a login has opened.

Guarantees: nothing is deleted unless QUIT is given in the TRANSACTION state (RFC 1939 §6); a message is sent only as fast as
the client reads it, in pieces read on a thread; a message that cannot be sent to its end ends the connection, so that no
client takes a part for the whole; a wrong password says [AUTH], a database that does not answer [SYS/TEMP].
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any

from attrs import Factory, evolve, field, frozen
from twisted.cred.error import LoginFailed, UnauthorizedLogin
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.mail.interfaces import IMailboxPOP3
from twisted.python.failure import Failure

from polarismail.auth.interfaces import IMaildropAvatar
from polarismail.auth.portal import credentials_for
from polarismail.net.contracts import Hurry
from polarismail.net.listeners import permits_plaintext
from polarismail.net.transport import Connection
from polarismail.policy.limits import LimitedClient
from polarismail.serve.context import ListenerContext
from polarismail.serve.exchange import SaslExchange
from polarismail.serve.mailbox_door import MailboxDoor
from polarismail.serve.maildrop_door import OpenMaildrop
from polarismail.store.maildir import MaildirRefused
from polarismail.store.maildrop import Entry, MaildropInUse, MessageGone
from polarismail.values.errors import Unavailable
from polarismail.wire import pop3_events as events
from polarismail.wire import sasl
from polarismail.wire.pop3_content import MessageEncoder
from polarismail.wire.pop3_events import Pop3Reply, err, ok
from polarismail.wire.pop3_server import Pop3Server


@frozen
class Pop3SessionSettings:
    """Time-outs and budgets of one POP3 session (RFC 1939 §3: at least ten minutes once logged in; HOSTILE 0)."""

    login_seconds: float = 60.0
    idle_seconds: float = 600.0
    soft_errors: int = 10
    soft_error_delay_seconds: float = 1.0
    hard_errors: int = 20
    max_idle_commands: int = 1000  # NOOP, CAPA and RSET: more of them are an attack (HOSTILE F14)
    max_auth_failures: int = 3

    def hurried(self, hurry: Hurry) -> Pop3SessionSettings:
        """The same under stress; who has logged in keeps the usual time."""
        return evolve(
            self,
            login_seconds=min(self.login_seconds, hurry.command_seconds),
            hard_errors=min(self.hard_errors, hurry.hard_errors),
        )


@frozen
class Pop3Context(ListenerContext):
    """What all sessions of one listener share."""

    settings: Pop3SessionSettings = field(factory=Pop3SessionSettings)
    calm_settings: Pop3SessionSettings = field(default=Factory(lambda self: self.settings, takes_self=True))


class Pop3Session(SaslExchange):
    """See the module. `net.contracts.Session` for POP3."""

    log = Logger()

    def __init__(self, context: Pop3Context) -> None:
        self._context, self._settings = context, context.settings
        self._maildrop: OpenMaildrop | None = None
        self._logout: Callable[[], None] | None = None
        self._client_address = ""
        self._limited: LimitedClient | None = None  # who counts and judges a stranger; nobody does where it is trusted
        self._errors = self._auth_failures = self._idle_commands = 0
        self._in_message = self._marked = False
        self._waiting_since: float | None = None

    def auth_mechanisms(self, tls_active: bool) -> tuple[str, ...]:
        """What AUTH offers this client now: nothing in clear unless the listener says so (RFC 2595 §2.3)."""
        if not tls_active and not permits_plaintext(self._context.listener, self._client_address):
            return ()
        return tuple(sasl.MECHANISMS)

    # -- net.contracts.Session ---------------------------------------------------------------------------------------

    def connected(self, connection: Connection) -> None:
        engine = connection.engine
        assert isinstance(engine, Pop3Server)
        self._connection, self._engine = connection, engine
        self._client_address = connection.client_address
        if self._context.limits is not None:
            self._limited = self._context.limits.client(self._client_address)
        transport: Any = connection.transport
        if hasattr(transport, "setTcpKeepAlive"):
            transport.setTcpKeepAlive(True)  # a client that vanished must not keep the lock for long
        connection.send(self._engine.answer(ok(f"{self._context.hostname} POP3 ready")))

    def secured(self) -> None:
        """Nothing depends on what was negotiated."""

    def do(self, event: Any) -> Deferred[None] | None:
        self._waiting_since = None
        return _PERFORM[type(event)](self, event)

    def waiting(self) -> float:
        # Asked after each octet of a command that is not complete: the deadline must not move with them (HOSTILE F12).
        now = monotonic()
        if self._waiting_since is None:
            self._waiting_since = now
        allowed = self._settings.login_seconds if self._maildrop is None else self._settings.idle_seconds
        return max(0.0, self._waiting_since + allowed - now)

    def behind(self) -> float:
        if self._maildrop is not None or self._waiting_since is None:
            return -1.0
        return monotonic() - self._waiting_since

    def stays(self) -> bool:
        return self._maildrop is not None

    def change_settings(self, settings: Pop3SessionSettings) -> None:
        if self._maildrop is None:
            self._settings = settings

    def may_end(self) -> bool:
        return True

    def timed_out(self) -> bytes:
        return b""  # RFC 1939 §3: closed without a word, and without UPDATE

    def failed(self, problem: BaseException) -> bytes:
        self.log.failure("a POP3 session of {client} failed", Failure(problem), client=self._client_address)
        # In the middle of a message there is nothing that a client would not take for a part of it.
        return b"" if self._in_message else self._engine.answer(events.TRY_AGAIN)

    def lost(self) -> None:
        self._leave()
        self._engine.auth_mechanisms = sasl.no_mechanisms  # it knows this session, and this session knows it

    def _leave(self) -> None:
        """Let go of the maildrop and the avatar."""
        self._maildrop = None
        if self._logout is not None:
            logout, self._logout = self._logout, None
            logout()

    # -- replies -----------------------------------------------------------------------------------------------------

    def _answer(self, reply: Pop3Reply) -> Deferred[None] | None:
        self._connection.send(self._engine.answer(reply))
        return None if reply.ok else self._count_error()

    def _count_error(self) -> Deferred[None] | None:
        """Slow down, then end, a session full of errors."""
        self._errors += 1
        if self._errors >= self._settings.hard_errors:
            self._connection.send(events.TOO_MANY_ERRORS.octets)
            self._connection.close()
        elif self._errors >= self._settings.soft_errors:
            return deferLater(self._context.reactor, self._settings.soft_error_delay_seconds, lambda: None)
        return None

    def _count_idle(self) -> None:
        self._idle_commands += 1
        if self._idle_commands > self._settings.max_idle_commands:
            self._connection.send(events.TOO_MANY_ERRORS.octets)
            self._connection.close()

    def _do_known(self, event: events.Known) -> Deferred[None] | None:
        self._connection.send(self._engine.answer(event.reply))
        if event.closes:
            self._connection.close()
        self._exchange = None
        return self._count_error() if event.is_error else None

    # -- before the login --------------------------------------------------------------------------------------------

    def _do_capa(self, event: events.Capa) -> None:
        self._connection.send(self._engine.listing(ok("Capabilities follow"), self._engine.capabilities()))
        self._count_idle()

    def _do_list_mechanisms(self, event: events.ListMechanisms) -> None:
        self._connection.send(self._engine.listing(ok("Mechanisms follow"), self._engine.mechanisms()))
        self._count_idle()

    def _do_stls(self, event: events.Stls) -> Deferred[None] | None:
        options = self._context.tls_options()
        if options is None:
            return self._answer(events.NO_TLS)
        if not self._connection.may_start_tls():
            self._answer(events.NO_TLS)
            self._connection.close(lingers=True)
            return None
        self._connection.send(self._engine.answer(ok("Begin TLS")))
        self._connection.start_tls(options)
        self._engine.tls_started()
        self._exchange = None
        return None

    def _do_login(self, event: events.Login) -> Deferred[None]:
        return self._log_in(event.name, event.password, "")

    def _cancelled(self) -> Deferred[None] | None:
        return self._answer(events.AUTH_CANCELLED)

    def _malformed(self, reason: str) -> Deferred[None] | None:
        return self._answer(err(reason))

    def _log_in(self, name: str, password: bytes, authzid: str) -> Deferred[None]:
        return Deferred.fromCoroutine(self._log_in_and_open(name, password, authzid))

    async def _log_in_and_open(self, name: str, password: bytes, authzid: str) -> None:
        if self._limited is not None and self._limited.check_login() is not None:
            return await _done(self._answer(events.TOO_MANY_LOGINS))
        portal = self._context.portal
        try:
            credentials = credentials_for(portal, name, password, authzid)
            interface, avatar, self._logout = await portal.login(credentials, None, IMaildropAvatar, IMailboxPOP3)
        except (UnauthorizedLogin, LoginFailed):
            return await self._refuse_login(name)
        except Unavailable:
            return await _done(self._answer(events.TRY_AGAIN))
        if interface is IMailboxPOP3:
            avatar = MailboxDoor(avatar)
        try:
            maildrop = await avatar.open()
        except Exception as problem:
            self._leave()
            return await _done(self._answer(self._cannot_open(problem, name)))
        if self._connection.closed:
            # It left while we were busy: `lost` found nothing to let go of yet.
            return self._leave()
        self._maildrop = maildrop
        self._settings = self._context.calm_settings
        self._context.record_event(
            "login", {"client": self._client_address, "listener": self._context.listener.name, "login": name}
        )
        messages, octets = maildrop.totals()
        self._connection.send(self._engine.answer(ok(f"{messages} messages ({octets} octets)")))
        return None

    def _cannot_open(self, problem: Exception, name: str) -> Pop3Reply:
        if isinstance(problem, MaildropInUse):
            return events.IN_USE
        if isinstance(problem, MaildirRefused):
            self.log.error("the maildrop of {login} cannot be used: {why}", login=name, why=str(problem))
            return events.OUT_OF_ORDER
        if not self._connection.closed:
            self.log.failure("the maildrop of {login} cannot be opened", Failure(problem), login=name)
        return events.TRY_AGAIN

    async def _refuse_login(self, name: str) -> None:
        self._auth_failures += 1
        self._context.record_event(
            "login-failed", {"client": self._client_address, "listener": self._context.listener.name, "login": name}
        )
        delay_seconds = self._limited.login_failed(name) if self._limited is not None else 0.0
        if self._auth_failures >= self._settings.max_auth_failures:
            self._connection.send(self._engine.answer(events.BAD_CREDENTIALS))
            self._connection.close()
            return
        if delay_seconds:
            await deferLater(self._context.reactor, delay_seconds, lambda: None)
        await _done(self._answer(events.BAD_CREDENTIALS))

    # -- with the maildrop open --------------------------------------------------------------------------------------

    @property
    def _open(self) -> OpenMaildrop:
        assert self._maildrop is not None  # the engine's table of states: only in TRANSACTION
        return self._maildrop

    def _do_stat(self, event: events.Stat) -> Deferred[None] | None:
        messages, octets = self._open.totals()
        return self._answer(ok(f"{messages} {octets}"))

    def _do_list(self, event: events.List) -> Deferred[None] | None:
        return self._list(event.number, lambda entry: str(entry.octets))

    def _do_uidl(self, event: events.Uidl) -> Deferred[None] | None:
        return self._list(event.number, lambda entry: entry.uidl)

    def _list(self, number: int | None, render: Callable[[Entry], str]) -> Deferred[None] | None:
        if number is None:
            lines = (f"{at} {render(entry)}" for at, entry in self._open.numbered())
            messages, octets = self._open.totals()
            self._connection.send(self._engine.listing(ok(f"{messages} messages ({octets} octets)"), lines))
            self._connection.flush()  # so that a client that asks without reading is noticed
            return None
        entry = self._open.get(number)
        return self._answer(events.NO_SUCH_MESSAGE if entry is None else ok(f"{number} {render(entry)}"))

    def _do_dele(self, event: events.Dele) -> Deferred[None] | None:
        entry = self._open.get(event.number)
        if entry is None:
            return self._answer(events.NO_SUCH_MESSAGE)
        entry.deleted = self._marked = True
        return self._answer(ok("Marked to be deleted"))

    def _do_rset(self, event: events.Rset) -> Deferred[None] | None:
        self._open.reset()
        self._count_idle()
        messages, octets = self._open.totals()
        return self._answer(ok(f"{messages} messages ({octets} octets)"))

    def _do_noop(self, event: events.Noop) -> Deferred[None] | None:
        waits = self._answer(ok())
        self._count_idle()
        return waits

    def _do_retr(self, event: events.Retr) -> Deferred[None] | None:
        return self._send_message(event.number, MessageEncoder(), whole=True)

    def _do_top(self, event: events.Top) -> Deferred[None] | None:
        return self._send_message(event.number, MessageEncoder(event.lines), whole=False)

    def _send_message(self, number: int, encoder: MessageEncoder, *, whole: bool) -> Deferred[None] | None:
        entry = self._open.get(number)
        if entry is None:
            return self._answer(events.NO_SUCH_MESSAGE)
        return Deferred.fromCoroutine(self._stream(entry, encoder, f"{entry.octets} octets" if whole else ""))

    async def _stream(self, entry: Entry, encoder: MessageEncoder, text: str) -> None:
        connection = self._connection
        try:
            reader = await self._open.read(entry)
        except MessageGone:
            return await _done(self._answer(events.NO_SUCH_MESSAGE))
        except OSError as problem:
            self.log.failure("a message cannot be opened", Failure(problem), file=entry.name)
            return await _done(self._answer(events.TRY_AGAIN))
        connection.send(self._engine.answer(ok(text)))
        self._in_message = True
        try:
            piece = reader.piece
            while piece and not connection.closed:
                connection.send(encoder.receive(piece))
                connection.flush()
                slow = connection.when_writable()
                if slow is not None:
                    await slow
                piece = await reader.next() if not encoder.done else b""
            connection.send(encoder.finish())
            self._in_message = False
        finally:
            reader.close()

    def _do_quit(self, event: events.Quit) -> Deferred[None] | None:
        if not event.update:
            self._connection.send(self._engine.answer(events.GOODBYE))
            self._connection.close()
            return None
        return Deferred.fromCoroutine(self._update())

    async def _update(self) -> None:
        """UPDATE: delete, let go of the lock, and only then answer (RFC 1939 §6)."""
        failed = 0
        try:
            if self._marked:
                failed = await self._open.commit()
        except OSError as problem:
            self.log.failure("deleting from a maildrop failed", Failure(problem))
            failed = 1
        self._leave()
        reply = err("Some deleted messages were not removed", "SYS/TEMP") if failed else events.GOODBYE
        self._connection.send(self._engine.answer(reply))
        self._connection.close()


async def _done(waits: Deferred[None] | None) -> None:
    if waits is not None:
        await waits


_PERFORM: dict[type, Callable[[Pop3Session, Any], Deferred[None] | None]] = {
    events.Known: Pop3Session._do_known,
    events.Capa: Pop3Session._do_capa,
    events.ListMechanisms: Pop3Session._do_list_mechanisms,
    events.Stls: Pop3Session._do_stls,
    events.Login: Pop3Session._do_login,
    events.Auth: Pop3Session._do_auth,
    events.AuthResponse: Pop3Session._do_auth_response,
    events.Stat: Pop3Session._do_stat,
    events.List: Pop3Session._do_list,
    events.Uidl: Pop3Session._do_uidl,
    events.Retr: Pop3Session._do_retr,
    events.Top: Pop3Session._do_top,
    events.Dele: Pop3Session._do_dele,
    events.Rset: Pop3Session._do_rset,
    events.Noop: Pop3Session._do_noop,
    events.Quit: Pop3Session._do_quit,
}
