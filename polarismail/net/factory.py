# SPDX-License-Identifier: MIT
"""What the factories of all our protocols do alike: admit, count, refuse, reconfigure and retire connections.

Guarantees: every admitted connection leaves the count once; a client beyond the limits costs no timer and no handshake.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any

from attrs import evolve
from twisted.internet.interfaces import ISSLTransport
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure

from polarismail.net.contracts import Engine, Hurry, Session, TransportSettings
from polarismail.net.handshakes import HandshakeCounter
from polarismail.net.limits import ConnectionCounter, ConnectionLimits
from polarismail.net.transport import Connection
from polarismail.values.network import network_of


def no_tls() -> None:
    """For where there is no certificate."""
    return None


class CountingFactory:
    """The part of a factory that knows no protocol; mixed into one that does.

    `context` is what sessions share (an attrs value with `reactor`, `listener`, `tls_options` and `settings`).
    """

    noisy = False
    context: Any
    engine_settings: Any
    make_session: Callable[[], tuple[Engine, Session]]
    refusal: bytes  # to a client beyond the limits
    busy: bytes  # where all places are taken
    goodbye: bytes  # to everybody, when the server stops

    def count(self, counter: ConnectionCounter | None, transport_settings: TransportSettings) -> None:
        """Begin with no connections. A counter may be shared by several factories."""
        self._counter = counter or ConnectionCounter(ConnectionLimits())
        self._transport_settings = transport_settings
        self._handshakes = HandshakeCounter()
        self.connections: set[CountedConnection] = set()
        self._counter.factories.append(self)
        self._calm = (self.context.settings, transport_settings)
        self._hurry: Hurry | None = None

    def buildProtocol(self, addr: Any) -> Protocol:
        """A connection, or a polite refusal where the client has too many."""
        address = getattr(addr, "host", "") or ""
        if self.context.listener.tls == "implicit" and not self.admits_handshake(address):
            return Refusal(self.refusal)
        counter = self._counter
        if not counter.admit(address):
            return Refusal(self.busy if counter.refused_last in ("total", "memory") else self.refusal)
        engine, session = self.make_session()
        connection = CountedConnection(self.context.reactor, engine, session, self._transport_settings)
        connection.factory = self
        connection.address, connection.network = address, network_of(address)
        self.connections.add(connection)
        return connection

    @property
    def offers_tls(self) -> bool:
        """STARTTLS or STLS may be offered to the next client."""
        return bool(self.context.listener.tls == "starttls")

    def admits_handshake(self, address: str) -> bool:
        """Count a handshake that is to begin. False: there have been too many."""
        return self._handshakes.admit(address, self._transport_settings.handshakes_per_minute, monotonic())

    def reconfigure(self, settings: Any, session_settings: Any, transport_settings: TransportSettings) -> None:
        """Other limits, for connections from now on."""
        self.engine_settings = settings
        self._calm = (session_settings, transport_settings)
        self._settle_settings()

    def hurry(self, hurry: Hurry | None) -> None:
        """Under stress: shorter time-outs and smaller budgets for who comes. None: calm again."""
        self._hurry = hurry
        self._settle_settings()

    def apply_settings(self, connection: CountedConnection) -> None:
        """Have one that is here already take what new ones get."""
        if connection in self.connections:
            transport_settings = self._calm[1] if connection.stays else self._transport_settings
            connection.change_settings(self.context.settings, transport_settings)

    def _settle_settings(self) -> None:
        session, transport = self._calm
        if self._hurry is not None:
            session, transport = session.hurried(self._hurry), transport.hurried(self._hurry)
        self._transport_settings = transport
        self.context = evolve(self.context, settings=session, calm_settings=self._calm[0])

    def forget(self, connection: CountedConnection) -> None:
        """A connection is gone."""
        self.connections.discard(connection)
        self._counter.leave(connection.address)

    def move(self, connection: CountedConnection, address: str) -> bool:
        """A connection counts for another client address; False where that has too many."""
        if not self._counter.move(connection.address, address):
            return False
        connection.address, connection.network = address, network_of(address)
        return True

    def shut_down(self) -> None:
        """Tell clients that wait for nothing of ours to come again later; the others after their reply."""
        for connection in list(self.connections):
            connection.retire(self.goodbye)


class CountedConnection(Connection):
    """A Connection whose `factory` is told once that it is gone, whatever else went wrong."""

    factory: Any
    address = network = ""

    def may_start_tls(self) -> bool:
        """See Connection."""
        return bool(self.factory.admits_handshake(self.address))

    def count_for(self, address: str) -> bool:
        return bool(self.factory.move(self, address))

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        try:
            Connection.connectionLost(self, reason)
        finally:
            self.factory.forget(self)


class Refusal(Protocol):
    """Says one line and closes, for clients beyond the limits: it costs no timer and no handshake.

    Where TLS comes first it says nothing: the words would wait for a handshake that a client need never finish.
    """

    def __init__(self, words: bytes) -> None:
        self._words = words

    def connectionMade(self) -> None:
        transport: Any = self.transport
        if ISSLTransport.providedBy(transport):
            transport.abortConnection()
        else:
            transport.write(self._words)
            transport.loseConnection()
