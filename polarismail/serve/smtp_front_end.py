# SPDX-License-Identifier: MIT
"""Front ends of ours: XCLIENT makes the session that of another client, XFORWARD tells where a message came from.

Guarantees: only clients of the listener's `xclient_networks` get here, and nobody becomes one by what XCLIENT says; the
client that is spoken for inherits nothing of the front end's own session but TLS, and nothing of the client before it; a
login that a front end vouches for is that of an account that exists.

What is said by XCLIENT stands for what we see ourselves, in every decision, limit and trace field. What is said by XFORWARD
is logged, and decides nothing.
"""

from __future__ import annotations

from typing import Any

from twisted.cred.error import LoginFailed, UnauthorizedLogin
from twisted.internet.defer import Deferred
from twisted.mail.interfaces import IMessageDelivery
from twisted.python.failure import Failure

from polarismail.auth.checker import VouchedCredentials
from polarismail.auth.interfaces import IReception, IVouchedCredentials
from polarismail.serve.smtp_transaction import TransactionConversation
from polarismail.values import reply as replies
from polarismail.wire import smtp_events
from polarismail.wire.smtp_xclient import Claims


class FrontEndConversation(TransactionConversation):
    """A conversation with somebody who may speak for others."""

    def _do_xclient(self, event: smtp_events.XClient) -> Deferred[None] | None:
        # Attributes may come in several commands, because lines are short.
        claims = self._claims.updated(event.claims)
        if not claims.login:
            return self._become(claims)
        portal = self._context.portal
        if IVouchedCredentials not in portal.listCredentialsInterfaces():
            return self._answer(replies.BAD_CREDENTIALS)
        d: Deferred[Any] = portal.login(VouchedCredentials(claims.login), None, IReception, IMessageDelivery)
        return d.addCallbacks(self._vouched_for, self._not_vouched_for, (claims,), {}, (claims,), {})

    def _vouched_for(self, login: Any, claims: Claims) -> Deferred[None] | None:
        self._welcomed(login)
        return self._become(claims) if self._reception is not None else None

    def _not_vouched_for(self, failure: Failure, claims: Claims) -> Deferred[None] | None:
        if failure.check(UnauthorizedLogin, LoginFailed) is None:
            return self._login_failed(failure, claims.login or "")
        # Not among the wrong passwords of this session: it is the front end's, and brings others.
        self._context.record_event(
            "login-failed",
            {
                "client": claims.address or self._peer_address,
                "listener": self._context.listener.name,
                "login": claims.login,
            },
        )
        return self._answer(replies.BAD_CREDENTIALS)

    def _become(self, claims: Claims) -> Deferred[None] | None:
        """The session is that of another client from now on, and begins anew."""
        if claims.address is not None and not self._connection.count_for(claims.address):
            return self._answer(replies.TOO_MANY_CONNECTIONS)
        if not claims.login:
            self._log_out()
        self._forget_transaction()
        self._claims, self._hello, self._exchange = claims, None, None
        account = getattr(self._reception, "account", None)
        self._account = str(account.address) if account is not None else "?" if claims.login else ""
        self._errors = self._deferrals = self._junk = self._guesses = self._auth_failures = 0
        self._note_facts()
        self._meet_client()
        self._settings = self._context.calm_settings if self._account else self._strangers_settings
        waits = self._answer(self._context.banner)
        self._engine.client_changed(authenticated=bool(claims.login))
        return waits

    def _do_xforward(self, event: smtp_events.XForward) -> Deferred[None] | None:
        self._forwarded = self._forwarded.updated(event.claims)
        self._note_facts()
        return self._answer_junk(replies.OK)
