# SPDX-License-Identifier: MIT
"""The ground that every part of an SMTP session stands on: who the client is, and how it is answered.

Guarantees: a reply goes out once for each command; errors slow the client down and then end the session; what is no fault
of the client's is not counted as one (HOSTILE 0, F14).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger

from polarismail.net.listeners import permits_relaying
from polarismail.net.transport import Connection
from polarismail.policy.limits import LimitedClient
from polarismail.serve.smtp_context import SmtpContext
from polarismail.values import reply as replies
from polarismail.values.envelope import SessionFacts
from polarismail.values.reply import Reply
from polarismail.wire.smtp_events import Hello
from polarismail.wire.smtp_server import SmtpServer
from polarismail.wire.smtp_xclient import NO_CLAIMS

_PROTOCOLS = {"HELO": "SMTP", "EHLO": "ESMTP", "LHLO": "LMTP"}  # RFC 3848


class Conversation:
    """One client and what it has been told."""

    log = Logger()
    _connection: Connection
    _engine: SmtpServer

    def __init__(self, context: SmtpContext) -> None:
        self._context, self._settings = context, context.settings
        self._strangers_settings = context.settings  # those of now, which under stress are not those of the beginning
        self._errors = self._deferrals = self._junk = self._guesses = 0
        self._limited: LimitedClient | None = None  # who counts and judges a stranger; nobody does where it is trusted
        self._progress = 0.0  # since the connection, or the last message
        self._hello: Hello | None = None
        self._account = ""
        self._tls = ""
        self._facts = SessionFacts()
        self._claims = NO_CLAIMS  # of XCLIENT: they stand for what we see ourselves
        self._forwarded = NO_CLAIMS  # of XFORWARD: they are told on, and decide nothing

    def _answer(self, reply: Reply, delay_seconds: float = 0.0) -> Deferred[None] | None:
        """Send the reply that the last event is owed; slow down, or end, a session full of errors. `delay_seconds`: how long
        the command behind a refusal waits at least."""
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
        if self._limited is not None and reply.is_permanent:
            self._limited.failed()
        if self._errors >= self._settings.hard_errors:
            self._connection.send(replies.TOO_MANY_ERRORS.octets)
            self._connection.close(lingers=True)
            return None
        if self._errors >= self._settings.soft_errors:
            delay_seconds = max(delay_seconds, self._settings.soft_error_delay_seconds)
        return deferLater(self._context.reactor, delay_seconds, lambda: None) if delay_seconds else None

    def _answer_guess(self, reply: Reply) -> Deferred[None] | None:
        """The same for a recipient that does not exist, named by a stranger: each answer waits longer than the last, then the
        session ends (HOSTILE A4)."""
        self._guesses += 1
        settings = self._settings
        if self._limited is not None:
            self._limited.guessed()
        if self._guesses >= settings.max_unknown_recipients:
            self._errors = settings.hard_errors
        beyond = self._guesses - settings.soft_unknown_recipients
        return self._answer(reply, settings.soft_error_delay_seconds * 2.0 ** min(beyond, 4) if beyond > 0 else 0.0)

    def _answer_junk(self, reply: Reply) -> Deferred[None] | None:
        """The same for commands that do nothing for mail: too many of them are an attack (HOSTILE F14)."""
        self._junk += 1
        if self._junk > self._settings.max_junk_commands:
            return self._answer(replies.TOO_MANY_ERRORS)
        return self._answer(reply)

    def _answer_at_once(self, reply: Reply) -> Deferred[None] | None:
        """The same for commands whose replies may not wait for those of others in their group (RFC 2920 §3.2)."""
        waits = self._answer_junk(reply)
        self._connection.flush()
        return waits

    def _meet_client(self) -> None:
        """Another client is judged from now on: the one of `_facts`."""
        limits = self._context.limits
        self._limited = limits.client(self._facts.client_address) if limits is not None else None

    def _note_facts(self) -> None:
        claims, hello = self._claims, self._hello
        protocol = _PROTOCOLS[hello.verb] if hello is not None else "SMTP"
        if claims.protocol in ("SMTP", "ESMTP") and protocol != "LMTP":
            protocol = claims.protocol  # the front end's own EHLO says nothing of the client that it speaks for
        if protocol != "SMTP":
            protocol += ("S" if self._tls else "") + ("A" if self._account else "")
        helo = hello.domain if hello is not None else ""
        client, listener = self._peer_address if claims.address is None else claims.address, self._context.listener
        self._facts = SessionFacts(
            listener=listener.name,
            protocol=protocol,
            client_address=client,
            client_port=(getattr(self._connection.peer, "port", 0) or 0) if claims.port is None else claims.port,
            helo=claims.helo or helo,
            client_name=claims.name or "",
            account=self._account,
            tls=self._tls,
            may_relay=permits_relaying(listener, client),
            origin=str(self._forwarded) if self._forwarded is not NO_CLAIMS else "",
        )

    @property
    def _peer_address(self) -> str:
        """Who is at the other end of the connection, whatever they say; "local" on a UNIX socket."""
        return self._connection.client_address


def then(result: Any, function: Callable[..., Deferred[None] | None], *args: Any) -> Deferred[None] | None:
    """Go on with a value now, or with a Deferred's value when it comes: the usual case costs no Deferred."""
    kind = type(result)
    if kind is not Reply and kind is not tuple and isinstance(result, Deferred):  # its isinstance takes a detour
        return result.addCallback(function, *args)
    return function(result, *args)
