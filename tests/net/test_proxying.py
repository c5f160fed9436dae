# SPDX-License-Identifier: MIT
"""Waiting for a PROXY header: one timer for all, one log line a second, and nothing is left behind."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from twisted.internet.task import Clock

from polarismail.net.listeners import Listener, StrangersOnly
from polarismail.net.proxying import ProxyPorch, ProxySettings
from tests.proxies import render_block, render_line

LISTENER = Listener("door", 25, "mx", proxy_networks=("192.0.2.0/24",))
PROXY = ("192.0.2.9", 999)


class Reactor(Clock):
    """Time that the test moves, and readers that it wakes."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: set[Any] = set()
        self.addReader, self.removeReader = self.readers.add, self.readers.discard


class World:
    def __init__(self) -> None:
        self.reactor = Reactor()
        self.events: list[dict[str, Any]] = []
        self.begun: list[tuple[socket.socket, Any]] = []
        self.theirs: list[socket.socket] = []
        settings = ProxySettings(header_seconds=5.0, waiting=2)
        self.porch = ProxyPorch(self.reactor, LISTENER, settings, self.record)

    def record(self, name: str, fields: dict[str, Any]) -> None:
        assert name == "proxy-refused"
        self.events.append(fields)

    def come(self, octets: bytes = b"", client: Any = PROXY) -> socket.socket:
        ours, theirs = socket.socketpair()
        theirs.settimeout(5)
        self.theirs.append(theirs)
        theirs.sendall(octets)
        self.porch.take(ours, client, lambda accepted, who: self.begun.append((accepted, who)))
        return theirs

    def wake(self) -> None:
        for each in list(self.reactor.readers):
            each.doRead()

    def is_idle(self) -> bool:
        return not (self.reactor.readers or self.reactor.getDelayedCalls())


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    for each in (*made.theirs, *(accepted for accepted, _ in made.begun)):
        each.close()


def test_a_header_that_is_there_already_waits_for_nothing(world: World) -> None:
    world.come(render_line("203.0.113.1", 7) + b"EHLO x\r\n")
    ((accepted, client),) = world.begun
    assert client == ("203.0.113.1", 7)
    assert accepted.recv(100) == b"EHLO x\r\n"
    assert world.is_idle()
    world.come(render_block("2001:db8::1", 8), ("::ffff:192.0.2.9", 999, 0, 0))
    assert world.begun[1][1] == ("2001:db8::1", 8, 0, 0)


def test_what_has_come_is_taken_so_that_nothing_wakes_us_without_end(world: World) -> None:
    theirs = world.come(b"PROXY UNK")
    (waiting,) = world.reactor.readers
    with pytest.raises(BlockingIOError):
        waiting.accepted.recv(1, socket.MSG_PEEK)
    theirs.sendall(b"NOWN\r\nEHLO x\r\n")
    world.wake()
    ((accepted, client),) = world.begun
    assert client == PROXY
    assert accepted.recv(100) == b"EHLO x\r\n"
    world.reactor.advance(10)
    assert world.is_idle() and not world.events


def test_each_has_its_time_from_when_it_came(world: World) -> None:
    first = world.come(b"PROXY ")
    world.reactor.advance(3)
    second = world.come(b"PROXY ")
    world.reactor.advance(1.9)
    assert len(world.reactor.readers) == 2
    world.reactor.advance(0.2)
    assert first.recv(1) == b""
    assert len(world.reactor.readers) == 1
    world.reactor.advance(3)
    assert second.recv(1) == b""
    assert world.is_idle()
    assert [each["problem"] for each in world.events] == ["no complete PROXY header in time"] * 2


def test_a_flood_is_a_line_a_second(world: World) -> None:
    for _ in range(50):
        world.come(b"", ("198.51.100.1", 1))
    world.reactor.advance(1.5)
    world.come(b"EHLO x\r\n")
    assert [(each["proxy"], each["problem"], each["refused"]) for each in world.events] == [
        ("198.51.100.1", "not in proxy_networks", 1),
        ("192.0.2.9", "expected a PROXY header, found something else", 50),
    ]


@pytest.mark.parametrize("first", [b"", b"PROXY TCP4"])
def test_who_goes_before_the_header_is_complete_is_forgotten(world: World, first: bytes) -> None:
    world.come(first).close()
    world.wake()
    assert not world.begun and not world.reactor.readers
    assert world.events[0]["problem"] == "closed before the PROXY header was complete"


def test_what_waits_is_closed_at_the_stop(world: World) -> None:
    waiting = [world.come(), world.come(b"PROXY ")]
    world.porch.stop()
    world.porch.stop()
    assert [each.recv(1) for each in waiting] == [b"", b""]
    assert world.is_idle() and not world.events


def test_the_oldest_of_too_many_makes_room(world: World) -> None:
    first, second, third = world.come(), world.come(), world.come()
    assert first.recv(1) == b""
    for each in (second, third):
        each.sendall(b"PROXY UNKNOWN\r\n")
    world.wake()
    assert len(world.begun) == 2
    assert world.events[0]["problem"] == "too many wait"


def test_machines_of_ours_pass_by_what_is_for_strangers(world: World) -> None:
    class Wall:
        def take(self, accepted: socket.socket, client: Any, go_on: Any) -> None:
            accepted.close()

        def stop(self) -> None: ...

    porch = StrangersOnly(Wall(), ("192.0.2.0/24", "local"))
    for client, passes in (
        ((), True),
        (("192.0.2.7", 1), True),
        (("198.51.100.7", 1), False),
        (("2001:db8::7", 1, 0, 0), False),
    ):
        ours, theirs = socket.socketpair()
        went: list[Any] = []
        porch.take(ours, client, lambda accepted, who, went=went: went.append(who))
        assert went == ([client] if passes else [])
        ours.close()
        theirs.close()
