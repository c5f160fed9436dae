# SPDX-License-Identifier: MIT
"""Accepting: in fair shares, not into the last descriptors, and without losing a client over either."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from twisted.internet.protocol import Factory, Protocol

from polarismail.net import accepting, listeners
from polarismail.net.accepting import RESERVED_DESCRIPTORS, Acceptor
from tests.reactor import reactor, run


class Greeter(Protocol):
    def connectionMade(self) -> None:
        self.transport.write(b"220 hello\r\n")  # type: ignore[union-attr]


class Shares:
    """Says what the test says."""

    def __init__(self) -> None:
        self.more = False
        self.asked = 0

    def has_more_than_its_share(self) -> bool:
        self.asked += 1
        return self.more


class Door:
    def __init__(self) -> None:
        self.shares = Shares()
        bound = socket.create_server(("127.0.0.1", 0))
        self.port: int = bound.getsockname()[1]
        factory: Any = Factory.forProtocol(Greeter)
        (self.acceptor,) = run(listeners.serve, reactor, [bound], factory, self.shares)

    def greets(self, seconds: float = 10) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), 10) as client:
            client.settimeout(seconds)
            try:
                return client.recv(4) == b"220 "
            except TimeoutError:
                return False


@pytest.fixture
def door() -> Iterator[Door]:
    made = Door()
    yield made
    run(made.acceptor.stopListening)


def test_says_where_it_listens(door: Door) -> None:
    assert door.greets()
    assert run(door.acceptor.getHost).port == door.port


def test_who_has_more_than_its_share_leaves_a_client_to_others_and_takes_it_in_the_end(door: Door) -> None:
    door.shares.more = True
    assert door.greets()  # there is nobody else
    assert door.shares.asked >= 1


def test_the_last_descriptors_are_not_for_clients(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until there is room again, clients wait in the kernel's line; none is refused."""
    monkeypatch.setattr(accepting, "_BACK_OFF_SECONDS", 0.05)
    lowest = os.dup(0)
    os.close(lowest)
    taken = [os.dup(0) for _ in range(20)]
    door.acceptor._limit = lowest + 20 + RESERVED_DESCRIPTORS
    try:
        assert door.greets()  # the one that shows how near the limit is
        assert not door.greets(0.5)
    finally:
        for each in taken:
            os.close(each)
    until = time.monotonic() + 10
    while not door.greets(0.5):
        assert time.monotonic() < until
    assert not door.acceptor._told


@pytest.mark.parametrize(
    ("error", "pauses"), [(OSError(24, "too many"), True), (ConnectionAbortedError(103, "x"), False)]
)
def test_an_error_of_the_machine_pauses_and_one_of_a_client_does_not(
    error: OSError, pauses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Listening:
        family = socket.AF_INET
        answers = [error, BlockingIOError()]

        def setblocking(self, flag: bool) -> None: ...
        def setsockopt(self, *args: Any) -> None: ...
        def close(self) -> None: ...

        def fileno(self) -> int:
            return 0

        def accept(self) -> Any:
            raise self.answers.pop(0)

    class Reactor:
        calls: list[float] = []
        readers: set[Any] = set()
        addReader, removeReader = readers.add, readers.discard

        def callLater(self, seconds: float, function: Any) -> None:
            self.calls.append(seconds)

    fake = Reactor()
    Acceptor(fake, Listening(), Factory()).doRead()  # type: ignore[arg-type]
    assert bool(fake.calls) is pauses
    assert bool(fake.readers) is not pauses
    fake.calls.clear()
    fake.readers.clear()


class Waiting:
    """A porch that keeps clients until it is told, and then says that they are somebody else."""

    def __init__(self) -> None:
        self.held: list[Any] = []

    def take(self, accepted: socket.socket, client: Any, go_on: Any) -> None:
        self.held.append((accepted, go_on))

    def release(self) -> None:
        for accepted, go_on in self.held:
            go_on(accepted, ("192.0.2.1", 1234))

    def stop(self) -> None: ...


class PeerTeller(Protocol):
    def connectionMade(self) -> None:
        peer: Any = self.transport.getPeer()  # type: ignore[union-attr]
        self.transport.write(f"{peer.host} {peer.port}\r\n".encode())  # type: ignore[union-attr]


def test_a_connection_goes_through_the_porches_in_their_order() -> None:
    bound = socket.create_server(("127.0.0.1", 0))
    first, second = Waiting(), Waiting()
    factory: Any = Factory.forProtocol(PeerTeller)
    (acceptor,) = run(listeners.serve, reactor, [bound], factory, None, [first, second])
    try:
        with socket.create_connection(bound.getsockname(), 10) as client:
            until = time.monotonic() + 10
            while not first.held:
                assert time.monotonic() < until
            assert not second.held
            run(first.release)
            run(second.release)
            assert client.recv(100) == b"192.0.2.1 1234\r\n"
    finally:
        run(acceptor.stopListening)


def test_a_long_line_is_taken_in_longer_turns_until_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Acceptor, "startListening", lambda self: None)
    bound = socket.create_server(("127.0.0.1", 0), backlog=400)
    taken: list[str] = []

    class Factory:
        def buildProtocol(self, address: Any) -> None:
            taken.append(address.host)

    acceptor = Acceptor(object(), bound, Factory())
    clients = [socket.create_connection(bound.getsockname()) for _ in range(300)]
    try:
        turns = []
        for _ in range(6):
            acceptor.doRead()
            turns.append(len(taken))
            taken.clear()
        assert turns == [16, 32, 64, 128, 60, 0]
        clients += [socket.create_connection(bound.getsockname()) for _ in range(20)]
        acceptor.doRead()
        assert len(taken) == 16
    finally:
        for client in clients:
            client.close()
        bound.close()
