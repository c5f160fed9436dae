# SPDX-License-Identifier: MIT
"""Streams over real sockets: every octet in order, one goodbye, and nothing waits in memory that the kernel would take."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure

from polarismail.net import listeners
from polarismail.net.stream import Stream
from tests import reactor

LARGE = os.urandom(3_000_000)


class Peer(Protocol):
    """Does what the test says with what it receives."""

    def __init__(self, received: Callable[[Peer, bytes], None]) -> None:
        self._received = received
        self.lost: list[str] = []
        self.gone = threading.Event()

    def dataReceived(self, data: bytes) -> None:
        self._received(self, data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        assert reason.type is not None
        self.lost.append(reason.type.__name__)
        self.gone.set()


class Door:
    """A listening port whose connections are Streams."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self.received: Callable[[Peer, bytes], None] = lambda peer, data: None
        factory = Factory()
        factory.buildProtocol = self._build  # type: ignore[method-assign]
        bound = socket.create_server(("127.0.0.1", 0))
        bound.setblocking(False)
        self.port: int = bound.getsockname()[1]
        self.ports: list[Any] = reactor.run(listeners.serve, reactor.reactor, [bound], factory)

    def _build(self, address: Any) -> Peer:
        peer = Peer(lambda peer, data: self.received(peer, data))
        self.peers.append(peer)
        return peer

    def connect(self) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), 10)
        client.settimeout(10)
        return client


@pytest.fixture
def door() -> Iterator[Door]:
    made = Door()
    yield made
    for port in made.ports:
        reactor.run(port.stopListening)


def read_all(client: socket.socket) -> bytes:
    pieces = []
    while piece := client.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


def test_more_than_the_kernel_takes_arrives_in_order(door: Door) -> None:
    def answer(peer: Peer, data: bytes) -> None:
        peer.transport.write(b"first ")  # type: ignore[union-attr]
        peer.transport.write(LARGE)  # type: ignore[union-attr]
        peer.transport.write(b" last")  # type: ignore[union-attr]
        peer.transport.finish()  # type: ignore[union-attr]

    door.received = answer
    with door.connect() as client:
        client.sendall(b"go")
        assert read_all(client) == b"first " + LARGE + b" last"
    assert isinstance(door.peers[0].transport, Stream)
    assert door.peers[0].gone.wait(10)
    assert door.peers[0].lost == ["ConnectionDone"]


def test_what_is_read_is_what_was_sent(door: Door) -> None:
    received: list[bytes] = []
    door.received = lambda peer, data: received.append(data)
    with door.connect() as client:
        client.sendall(LARGE)
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b""
    assert b"".join(received) == LARGE
    assert door.peers[0].gone.wait(10)
    assert door.peers[0].lost == ["ConnectionDone"]


def test_finish_says_goodbye_inside_the_call_and_once(door: Door) -> None:
    lost_inside: list[list[str]] = []
    answered = threading.Event()

    def answer(peer: Peer, data: bytes) -> None:
        transport: Any = peer.transport
        transport.write(b"bye")
        transport.finish()
        lost_inside.append(list(peer.lost))
        transport.finish()
        transport.write(b"more")
        transport.loseConnection()
        answered.set()

    door.received = answer
    with door.connect() as client:
        client.sendall(b"x")
        assert read_all(client) == b"bye"
    assert answered.wait(10)
    assert lost_inside == [["ConnectionDone"]]
    assert door.peers[0].lost == ["ConnectionDone"]


def test_a_client_that_resets_is_lost_and_writing_to_it_raises_nothing(door: Door) -> None:
    written = threading.Event()

    def answer(peer: Peer, data: bytes) -> None:
        def write() -> None:
            peer.transport.write(b"a")  # type: ignore[union-attr]
            peer.transport.write(b"b")  # type: ignore[union-attr]
            written.set()

        peer.transport.pauseProducing()  # type: ignore[union-attr]
        reactor.reactor.callLater(0.2, write)

    door.received = answer
    client = door.connect()
    client.sendall(b"x")
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    assert written.wait(10)
    assert door.peers[0].gone.wait(10)
    assert door.peers[0].lost == ["ConnectionLost"]


def test_abort_resets(door: Door) -> None:
    door.received = lambda peer, data: peer.transport.abortConnection()  # type: ignore[union-attr]
    with door.connect() as client:
        client.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            read_all(client)
    assert door.peers[0].gone.wait(10)
    assert door.peers[0].lost == ["ConnectionAborted"]


def test_accepted_sockets_do_not_delay_small_writes(door: Door) -> None:
    delays: list[bool] = []
    door.received = lambda peer, data: delays.append(not peer.transport.getTcpNoDelay()) or peer.transport.finish()  # type: ignore
    with door.connect() as client:
        client.sendall(b"x")
        read_all(client)
    assert door.peers[0].gone.wait(10)
    assert delays == [False]
