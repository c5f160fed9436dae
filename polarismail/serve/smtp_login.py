# SPDX-License-Identifier: MIT
"""Who the client is: STARTTLS, AUTH, and the avatar that the portal gives for it.

Guarantees: what was said in clear is forgotten when TLS begins, a login not excepted; the avatar is let go of once, however
the session ends; a portal that cannot answer is 454, never a wrong password.
RFC 3207 (STARTTLS), RFC 4954 (AUTH).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import evolve
from twisted.cred.error import LoginFailed, UnauthorizedLogin
from twisted.internet.defer import Deferred
from twisted.mail.interfaces import IMessageDelivery
from twisted.python.failure import Failure

from polarismail.auth.interfaces import IReception
from polarismail.auth.portal import credentials_for
from polarismail.net import tls
from polarismail.net.listeners import permits_plaintext
from polarismail.serve.delivery import DeliveryReception
from polarismail.serve.exchange import SaslExchange
from polarismail.serve.smtp_context import SmtpContext
from polarismail.serve.smtp_conversation import Conversation
from polarismail.values import reply as replies
from polarismail.values.errors import Unavailable
from polarismail.values.reply import Reply
from polarismail.wire import sasl, smtp_events


class LoginConversation(Conversation, SaslExchange):
    """A conversation with somebody, or with nobody yet."""

    _forget_transaction: Callable[[], None]

    def __init__(self, context: SmtpContext) -> None:
        super().__init__(context)
        self._reception: Any = None
        self._logout: Callable[[], None] | None = None
        self._auth_failures = 0

    def auth_mechanisms(self, tls_active: bool) -> tuple[str, ...]:
        """What AUTH offers this client now: nothing in clear unless the listener says so (RFC 4954 §4)."""
        if not tls_active and not permits_plaintext(self._context.listener, self._peer_address):
            return ()
        return tuple(sasl.MECHANISMS)

    def secured(self) -> None:
        """See net.contracts.Session."""
        self._tls = tls.describe(self._connection.transport)
        self._note_facts()

    def _do_starttls(self, event: smtp_events.StartTls) -> Deferred[None] | None:
        options = self._context.tls_options()
        if options is None:
            return self._answer(replies.TLS_UNAVAILABLE)
        if not self._connection.may_start_tls():
            return self._answer(replies.TOO_MANY_HANDSHAKES)
        self._connection.send(self._engine.answer(replies.READY_FOR_TLS))
        if self._engine.out_of_step:
            return None  # octets behind the command: the next event refuses them and ends the session
        self._connection.start_tls(options)
        # RFC 3207 §4.2: what was said in clear is forgotten, by the engine and here, a login not excepted.
        self._engine.tls_started()
        self._forget_transaction()
        self._log_out()
        self._hello, self._account, self._exchange = None, "", None
        if self._claims.login:
            self._claims = evolve(self._claims, login=None)
        self._settings = self._strangers_settings
        self._note_facts()
        return None

    def _cancelled(self) -> Deferred[None] | None:
        return self._answer(replies.AUTH_CANCELLED)

    def _malformed(self, reason: str) -> Deferred[None] | None:
        return self._answer(Reply(501, (5, 5, 2), reason))

    def _log_in(self, name: str, password: bytes, authzid: str) -> Deferred[None] | None:
        if self._limited is not None:
            refusal = self._limited.check_login()
            if refusal is not None:
                return self._answer(refusal)
        portal = self._context.portal
        try:
            credentials = credentials_for(portal, name, password, authzid)
        except UnauthorizedLogin:
            return self._login_failed(Failure(), name)
        d: Deferred[Any] = portal.login(credentials, None, IReception, IMessageDelivery)
        return d.addCallbacks(self._logged_in, self._login_failed, (), {}, (name,), {})

    def _logged_in(self, login: tuple[Any, Any, Callable[[], None]]) -> Deferred[None] | None:
        self._welcomed(login)
        account = getattr(self._reception, "account", None)
        self._account = str(account.address) if account is not None else "?"
        self._settings = self._context.calm_settings
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
        delay_seconds = self._limited.login_failed(name) if self._limited is not None else 0.0
        if self._auth_failures >= self._settings.max_auth_failures:
            self._connection.send(self._engine.answer(replies.BAD_CREDENTIALS))
            self._connection.close(lingers=True)
            return None
        return self._answer(replies.BAD_CREDENTIALS, delay_seconds)

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

    def _account_id(self) -> int | None:
        account = getattr(self._reception, "account", None)
        return account.id if account is not None else None
