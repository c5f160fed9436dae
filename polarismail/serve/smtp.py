# SPDX-License-Identifier: MIT
"""ESMTPFactory: the ESMTP server as Twisted users expect it, a factory on a `twisted.cred` portal.

It is a `twisted.mail.smtp.SMTPFactory` by contract: give it a portal whose avatars provide IMessageDelivery (or our own,
richer IReception) and listen. The protocol that it builds is ours.

This is the one module that may install a reactor on import: `twisted.mail.smtp` imports the global one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import evolve
from twisted.internet import reactor as global_reactor
from twisted.internet.protocol import Protocol
from twisted.mail.smtp import SMTPFactory

from polarismail.net.limits import ConnectionCounter, ConnectionLimits
from polarismail.net.listeners import Listener
from polarismail.net.transport import DEFAULT_SETTINGS, CountedConnection, Refusal, TransportSettings
from polarismail.serve.smtp_session import SessionSettings, SmtpContext, SmtpSession
from polarismail.values.network import NetworkList
from polarismail.values.reply import SHUTTING_DOWN, TOO_MANY_CONNECTIONS
from polarismail.wire.smtp_server import ServerSettings, SmtpServer


def _no_event(name: str, fields: dict[str, Any]) -> None:
    """Where nobody keeps a log of events."""


def _no_tls() -> None:
    return None


class ESMTPFactory(SMTPFactory):
    """Builds one ESMTP connection for each client.

    `portal` is asked for IReception or IMessageDelivery: with Anonymous credentials before the first MAIL, with
    PlainCredentials at AUTH. `tls_options` returns the context factory for STARTTLS, or None while there is none.
    """

    noisy = False

    def __init__(
        self,
        portal: Any,
        *,
        listener: Listener | None = None,
        hostname: str = "localhost",
        reactor: Any = None,
        tls_options: Callable[[], Any] = _no_tls,
        record_event: Callable[[str, dict[str, Any]], None] = _no_event,
        settings: ServerSettings | None = None,
        session_settings: SessionSettings | None = None,
        transport_settings: TransportSettings = DEFAULT_SETTINGS,
        counter: ConnectionCounter | None = None,
    ) -> None:
        SMTPFactory.__init__(self, portal)
        listener = listener or Listener("smtp", 25, "mx")
        self.domain = hostname  # type: ignore[assignment]  # Twisted uses both text and octets
        self.engine_settings = evolve(settings or ServerSettings(hostname=hostname), hostname=hostname)
        self.context = SmtpContext(
            hostname=hostname,
            listener=listener,
            portal=portal,
            reactor=reactor if reactor is not None else global_reactor,
            tls_options=tls_options,
            record_event=record_event,
            settings=session_settings or SessionSettings(),
            plaintext_networks=NetworkList(listener.plaintext_networks),
        )
        self._transport_settings = transport_settings
        self._counter = counter or ConnectionCounter(ConnectionLimits())
        self.connections: set[CountedConnection] = set()

    def buildProtocol(self, addr: Any) -> Protocol:
        """A connection, or a polite refusal where the client has too many."""
        address = getattr(addr, "host", "") or ""
        if not self._counter.admit(address):
            return Refusal(TOO_MANY_CONNECTIONS.octets)
        session = SmtpSession(self.context)
        engine = SmtpServer(
            self.engine_settings,
            tls_available=self.context.listener.tls == "starttls" and self.context.tls_options() is not None,
            tls_active=self.context.listener.tls == "implicit",
            auth_mechanisms=session.auth_mechanisms,
        )
        connection = CountedConnection(self.context.reactor, engine, session, self._transport_settings)
        connection.factory = self
        connection.address = address
        self.connections.add(connection)
        return connection

    def reconfigure(
        self, settings: ServerSettings, session_settings: SessionSettings, transport_settings: TransportSettings
    ) -> None:
        """Other limits, for connections from now on."""
        self.engine_settings, self._transport_settings = settings, transport_settings
        self.context = evolve(self.context, settings=session_settings)

    def forget(self, connection: CountedConnection) -> None:
        """A connection is gone."""
        self.connections.discard(connection)
        self._counter.leave(connection.address)

    def shut_down(self) -> None:
        """Tell clients that wait for nothing of ours to come again later (RFC 5321 §3.8)."""
        for connection in list(self.connections):
            connection.retire(SHUTTING_DOWN.octets)
