# SPDX-License-Identifier: MIT
"""One SMTP session: asks the reception about each event of the engine and says what it answered.

Guarantees: exactly one reply for each command; every wait for the client has an absolute deadline; whatever breaks is told
to the client as 4yz and ends the session. The parts are smtp_conversation (replies and budgets), smtp_login (TLS and AUTH),
smtp_transaction (mail) and smtp_front_end (XCLIENT and XFORWARD); smtp_lmtp is what LMTP does otherwise.
RFC 5321 §4.1, HOSTILE F12.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic, time
from typing import Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from polarismail.net.listeners import is_front_end
from polarismail.net.transport import Connection
from polarismail.serve.smtp_context import SessionSettings, SmtpContext
from polarismail.serve.smtp_front_end import FrontEndConversation
from polarismail.values import reply as replies
from polarismail.values.reply import Reply
from polarismail.wire import sasl, smtp_events
from polarismail.wire.smtp_server import SmtpServer
from polarismail.wire.smtp_states import CONTENT_STATES, State

_PATIENCE = 30.0
"""Who has not brought a message for so long is behind as who has not sent a command for a second."""


class SmtpSession(FrontEndConversation):
    """See the module. `net.contracts.Session` for SMTP."""

    def __init__(self, context: SmtpContext) -> None:
        super().__init__(context)
        self._waiting_since: float | None = None

    # -- net.contracts.Session ---------------------------------------------------------------------------------------

    def connected(self, connection: Connection) -> None:
        engine = connection.engine
        assert isinstance(engine, SmtpServer)
        self._connection, self._engine = connection, engine
        self._progress = monotonic()
        self._note_facts()
        self._meet_client()
        engine.is_front_end = is_front_end(self._context.listener, self._peer_address)
        connection.send(self._engine.answer(self._context.banner))

    def do(self, event: Any) -> Deferred[None] | None:
        if type(event) is not smtp_events.Content:
            self._waiting_since = None
        return _PERFORM[type(event)](self, event)

    def waiting(self) -> float:
        # Asked after each octet of a command that is not complete: the deadline must not move with them (HOSTILE F12).
        now = monotonic()
        since, settings, state = self._waiting_since, self._settings, self._engine.state
        if since is None:
            since = self._waiting_since = now
        if state not in CONTENT_STATES:
            return max(0.0, since + settings.command_seconds - now)
        # It grows with what arrives, so that a whole content, in chunks or not, comes with at least so many octets a second;
        # but not for ever: 50 MB at the least rate would be a day.
        begun = since if self._chunks_since is None else self._chunks_since
        allowed = settings.content_seconds + self._engine.content_octets / settings.min_octets_per_second
        until = begun + min(allowed, settings.max_content_seconds)
        if state is State.BDAT:
            until = min(until, since + settings.command_seconds)
        return max(0.0, until - now)

    def behind(self) -> float:
        if self._account or self._waiting_since is None:
            return -1.0
        now = monotonic()
        waited = now - self._waiting_since
        if self._draft is not None:
            if self._chunks_since is not None:
                waited = now - self._chunks_since
            return waited - self._engine.content_octets / self._settings.min_octets_per_second
        # A command now and then is no progress: mail is.
        return max(waited, (now - self._progress) / _PATIENCE)

    def stays(self) -> bool:
        return bool(self._account)

    def change_settings(self, settings: SessionSettings) -> None:
        self._strangers_settings = settings
        if not self._account:
            self._settings = settings

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
        self._engine.auth_mechanisms = sasl.no_mechanisms  # it knows this session, and this session knows it

    # -- commands that are no mail --------------------------------------------------------------------------------------

    def _do_refused(self, event: smtp_events.Refused) -> Deferred[None] | None:
        waits = (self._answer_at_once if event.junk else self._answer)(event.reply)
        if event.closes:
            self._connection.close(lingers=True)
        return waits

    def _do_hello(self, event: smtp_events.Hello) -> Deferred[None] | None:
        self._forget_transaction()
        # The first, and the first inside TLS, are needed: under stress one command without use is too many already.
        answer = self._answer if self._hello is None else self._answer_junk
        self._hello = event
        self._note_facts()
        if event.verb == "HELO":
            return answer(self._context.helo_reply)
        return answer(self._engine.ehlo_reply(f"{self._context.hostname} greets {self._facts.client_address}", time()))

    def _do_rset(self, event: smtp_events.Rset) -> Deferred[None] | None:
        self._forget_transaction()
        return self._answer_junk(replies.OK)

    def _do_noop(self, event: smtp_events.Noop) -> Deferred[None] | None:
        return self._answer_at_once(replies.OK)

    def _do_vrfy(self, event: smtp_events.Vrfy) -> Deferred[None] | None:
        return self._answer_at_once(replies.CANNOT_VERIFY)

    def _do_help(self, event: smtp_events.Help) -> Deferred[None] | None:
        return self._answer_junk(Reply(214, (2, 0, 0), "See RFC 5321, and postmaster for people"))

    def _do_quit(self, event: smtp_events.Quit) -> None:
        self._connection.send(self._engine.answer(replies.GOODBYE))
        self._connection.close()


_PERFORM: dict[type, Callable[[SmtpSession, Any], Deferred[None] | None]] = {
    smtp_events.Refused: SmtpSession._do_refused,
    smtp_events.Hello: SmtpSession._do_hello,
    smtp_events.Mail: SmtpSession._do_mail,
    smtp_events.Rcpt: SmtpSession._do_rcpt,
    smtp_events.Data: SmtpSession._do_data,
    smtp_events.Bdat: SmtpSession._do_bdat,
    smtp_events.Content: SmtpSession._do_content,
    smtp_events.EndOfChunk: SmtpSession._do_end_of_chunk,
    smtp_events.EndOfData: SmtpSession._do_end_of_data,
    smtp_events.Rset: SmtpSession._do_rset,
    smtp_events.Noop: SmtpSession._do_noop,
    smtp_events.Vrfy: SmtpSession._do_vrfy,
    smtp_events.Help: SmtpSession._do_help,
    smtp_events.Quit: SmtpSession._do_quit,
    smtp_events.StartTls: SmtpSession._do_starttls,
    smtp_events.Auth: SmtpSession._do_auth,
    smtp_events.AuthResponse: SmtpSession._do_auth_response,
    smtp_events.XClient: SmtpSession._do_xclient,
    smtp_events.XForward: SmtpSession._do_xforward,
}
