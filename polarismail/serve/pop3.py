# SPDX-License-Identifier: MIT
"""Pop3Factory: the POP3 server (RFC 1939) as a factory on a `twisted.cred` portal.

Give it a portal whose avatars provide IMaildropAvatar and listen. It installs no reactor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import evolve
from twisted.internet.protocol import Factory, Protocol

from polarismail.net.limits import ConnectionCounter, ConnectionLimits
from polarismail.net.listeners import Listener
from polarismail.net.transport import DEFAULT_SETTINGS, CountedConnection, Refusal, TransportSettings
from polarismail.serve.maildrop_door import MaildropDoor, MaildropDoors
from polarismail.serve.pop3_session import Pop3Context, Pop3Session, Pop3SessionSettings
from polarismail.values.network import NetworkList
from polarismail.wire.pop3_events import SHUTTING_DOWN, TOO_MANY_CONNECTIONS
from polarismail.wire.pop3_server import Pop3Server, Pop3Settings

__all__ = ["MaildropDoor", "MaildropDoors", "Pop3Factory", "Pop3SessionSettings", "Pop3Settings"]


def _no_event(name: str, fields: dict[str, Any]) -> None:
    """Where nobody keeps a log of events."""


def _no_tls() -> None:
    return None


class Pop3Factory(Factory):
    """Builds one POP3 connection for each client.

    `portal` is asked for IMaildropAvatar at each login. `tls_options` returns the context factory for STLS, or None while
    there is none.
    """

    noisy = False

    def __init__(
        self,
        portal: Any,
        *,
        listener: Listener,
        hostname: str,
        reactor: Any,
        tls_options: Callable[[], Any] = _no_tls,
        record_event: Callable[[str, dict[str, Any]], None] = _no_event,
        settings: Pop3Settings | None = None,
        session_settings: Pop3SessionSettings | None = None,
        transport_settings: TransportSettings = DEFAULT_SETTINGS,
        counter: ConnectionCounter | None = None,
    ) -> None:
        self.engine_settings = settings or Pop3Settings()
        self.context = Pop3Context(
            hostname=hostname,
            listener=listener,
            portal=portal,
            reactor=reactor,
            tls_options=tls_options,
            record_event=record_event,
            settings=session_settings or Pop3SessionSettings(),
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
        session = Pop3Session(self.context)
        engine = Pop3Server(
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
        self, settings: Pop3Settings, session_settings: Pop3SessionSettings, transport_settings: TransportSettings
    ) -> None:
        """Other limits, for connections from now on."""
        self.engine_settings, self._transport_settings = settings, transport_settings
        self.context = evolve(self.context, settings=session_settings)

    def forget(self, connection: CountedConnection) -> None:
        """A connection is gone."""
        self.connections.discard(connection)
        self._counter.leave(connection.address)

    def shut_down(self) -> None:
        """Tell clients that wait for nothing of ours to come again later. Nothing of theirs is deleted."""
        for connection in list(self.connections):
            connection.retire(SHUTTING_DOWN.octets)
