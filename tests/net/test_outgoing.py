# SPDX-License-Identifier: MIT
"""Octets that are written at once: in order, each once, and the transport's way where something waits."""

from __future__ import annotations

import socket
import struct

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone, ConnectionLost, ConnectionRefusedError
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.internet.task import deferLater
from twisted.internet.testing import MemoryReactor
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure

from polarismail.net.outgoing import Outgoing, endpoint
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
            talker = await endpoint(reactor, "127.0.0.1", port, 10.0).connect(Factory.forProtocol(Talker))
            peer, _ = listener.accept()
        peer.settimeout(20)
        transport = talker.transport
        assert isinstance(transport, Outgoing)
        for piece in pieces:
            transport.write_now(piece)
            assert size == 1 or transport.dataBuffer or transport._tempDataBuffer
        assert size > 1 or not transport._tempDataBuffer
        transport.loseConnection()
        with peer:
            everything = await deferToThread(drain, peer)
        await talker.lost
        transport.write_now(b"nobody hears this")
        return everything

    assert run(check) == b"".join(pieces)


class Echo(Protocol):
    """Keeps what comes."""

    def connectionMade(self) -> None:
        self.came = b""
        self.over: Deferred[type[BaseException]] = Deferred()

    def dataReceived(self, data: bytes) -> None:
        self.came += data

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.over.callback(type(reason.value))


@pytest.mark.parametrize(("resets", "expected"), [(False, ConnectionDone), (True, ConnectionLost)])
def test_what_comes_is_read_to_the_end(resets: bool, expected: type[BaseException]) -> None:
    everything = bytes(range(256)) * 4000

    def speak(peer: socket.socket) -> None:
        with peer:
            peer.sendall(everything)
            if resets:
                peer.recv(1)  # it has read all by then, or nearly
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def check() -> tuple[bytes, type[BaseException]]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = listener.getsockname()[1]
            echo = await endpoint(reactor, "127.0.0.1", address, 10.0).connect(Factory.forProtocol(Echo))
            peer, _ = listener.accept()
        peer.settimeout(20)
        spoken = deferToThread(speak, peer)
        while len(echo.came) < len(everything):
            await deferLater(reactor, 0.01)
        echo.transport.write_now(b"!")
        await spoken
        return echo.came, await echo.over

    assert run(check) == (everything, expected)


def test_nobody_there_is_refused_and_our_address_is_ours() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        async def check() -> str:
            way = endpoint(reactor, "127.0.0.1", port, 10.0, "127.0.0.77")
            echo = await way.connect(Factory.forProtocol(Echo))
            peer, (address, _) = listener.accept()
            peer.close()
            await echo.over
            return address

        assert run(check) == "127.0.0.77"
    with pytest.raises(ConnectionRefusedError):
        run(endpoint(reactor, "127.0.0.1", port, 10.0).connect, Factory.forProtocol(Echo))


def test_other_reactors_make_their_own() -> None:
    memory = MemoryReactor()
    endpoint(memory, "127.0.0.1", 25, 10.0).connect(Factory.forProtocol(Echo))
    assert [call[:2] for call in memory.tcpClients] == [("127.0.0.1", 25)]
