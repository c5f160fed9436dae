# SPDX-License-Identifier: MIT
"""Octets that are written at once: in order, each once, and the transport's way where something waits."""

from __future__ import annotations

import socket

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import StringTransport
from twisted.internet.threads import deferToThread

from polarismail.net.writing import write_now, writes_directly
from tests.reactor import reactor, run


class Talker(Protocol):
    """Knows when it has lost its connection."""

    def connectionMade(self) -> None:
        self.lost: Deferred[None] = Deferred()

    def connectionLost(self, *_: object) -> None:
        self.lost.callback(None)


def drain(connection: socket.socket) -> bytes:
    out = b""
    while piece := connection.recv(65536):
        out += piece
    return out


@pytest.mark.parametrize("size", [1, 20_000_000])
def test_octets_arrive_in_order_whatever_the_kernel_takes(size: int) -> None:
    """20 MB fit no socket's buffer: the rest goes the transport's way, and what is written behind it waits for it."""
    pieces = [b"a" * size, b"b" * 10, b"c" * size, b"d"]

    async def check() -> bytes:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            talker = await TCP4ClientEndpoint(reactor, "127.0.0.1", port).connect(Factory.forProtocol(Talker))
            peer, _ = listener.accept()
        peer.settimeout(20)
        transport = talker.transport
        assert writes_directly(transport)
        for piece in pieces:
            write_now(transport, piece)
            assert size == 1 or transport.dataBuffer or transport._tempDataBuffer
        assert size > 1 or not transport._tempDataBuffer
        transport.loseConnection()
        with peer:
            everything = await deferToThread(drain, peer)
        await talker.lost
        write_now(transport, b"nobody hears this")
        return everything

    assert run(check) == b"".join(pieces)


def test_other_transports_are_left_alone() -> None:
    assert not writes_directly(StringTransport())
