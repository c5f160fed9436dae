# SPDX-License-Identifier: MIT
"""The gate with real sockets: who waits, who is turned away, how many may, and what a waiter costs."""

from __future__ import annotations

import contextlib
import resource
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock

from polarismail.net import listeners
from polarismail.net.dnsbl import DnsList, DnsLists, DnsListSettings
from polarismail.net.gate import Gate, WaitSettings
from polarismail.policy.gate import GateSettings
from polarismail.policy.gatekeeper import Gatekeeper
from polarismail.store.known_clients import KnownClients
from polarismail.values.reply import Reply
from tests.reactor import reactor, run

GREETING = b"220 hello\r\n"
LISTED = Reply(554, (5, 7, 1), "Client is listed by bl.test")


class Greeter(Protocol):
    def connectionMade(self) -> None:
        self.transport.write(GREETING)  # type: ignore[union-attr]


class Keeper:
    """Says what the test says."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.listed: set[str] = set()
        self.looked_into: list[str] = []
        self.judged: list[tuple[str, float]] = []
        self.problem: Exception | None = None

    def passes(self, address: str) -> bool:
        if self.problem:
            raise self.problem
        return address in self.known

    def look_into(self, address: str) -> None:
        self.looked_into.append(address)

    def judge(self, address: str, waited_seconds: float) -> tuple[Reply, str] | None:
        self.judged.append((address, waited_seconds))
        return (LISTED, "listed") if address in self.listed else None


class Door:
    """A listening socket behind a gate, whose time is the test's."""

    def __init__(self, **settings: Any) -> None:
        self.clock, self.keeper = Clock(), Keeper()
        self.stressed = False
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.gate = Gate(
            self.clock,
            self.keeper,
            WaitSettings(**settings),
            record_event=lambda name, fields: self.events.append((name, fields)),
            is_stressed=lambda: self.stressed,
        )
        bound = socket.create_server(("127.0.0.1", 0))
        self.port: int = bound.getsockname()[1]
        factory: Any = Factory.forProtocol(Greeter)
        (self.acceptor,) = run(listeners.serve, reactor, [bound], factory, None, [self.gate])
        self.clients: list[socket.socket] = []

    def connect(self, address: str = "127.1.2.3") -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), 10, (address, 0))
        self.clients.append(client)
        return client

    def hold(self, address: str = "127.1.2.3", waiting: int = 1) -> socket.socket:
        """A client that waits; `waiting` is how many do then."""
        client = self.connect(address)
        self.until(lambda: self.counts["waiting"] == waiting)
        return client

    def advance(self, seconds: float) -> None:
        run(self.clock.pump, [seconds, 0.0])

    @property
    def counts(self) -> dict[str, int]:
        return run(self.gate.statistics)

    def until(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < until, self.counts
            time.sleep(0.002)

    def close(self) -> None:
        run(self.acceptor.stopListening)
        run(self.gate.stop)
        for client in self.clients:
            client.close()


@pytest.fixture
def door() -> Iterator[Door]:
    with contextlib.closing(Door()) as made:
        yield made


def read_all(client: socket.socket) -> bytes:
    """Until the server closes. A reset is a failure: it may take a reply away."""
    octets = b""
    while piece := client.recv(1000):
        octets += piece
    return octets


def is_silent(client: socket.socket) -> bool:
    """Nothing has come from the server, and it has not closed."""
    client.setblocking(False)
    try:
        client.recv(1)
    except BlockingIOError:
        return True
    finally:
        client.settimeout(10)
    return False


def test_a_stranger_is_greeted_after_the_wait_and_not_before(door: Door) -> None:
    client = door.hold()
    assert door.keeper.looked_into == ["127.1.2.3"]
    door.advance(5.9)
    assert is_silent(client) and door.keeper.judged == []
    door.advance(0.1)
    assert client.recv(100) == GREETING
    assert door.keeper.judged == [("127.1.2.3", 6.0)]
    assert door.counts["patient"] == 1 and door.counts["waiting"] == 0
    client.sendall(b"EHLO x\r\n")  # the connection is in use
    assert run(door.clock.getDelayedCalls) == []  # nobody waits, and nothing ticks


def test_who_need_not_wait_does_not(door: Door) -> None:
    door.keeper.known.add("127.1.2.3")
    assert door.connect().recv(100) == GREETING
    door.gate.settings = WaitSettings(enabled=False)
    assert door.connect("127.9.9.9").recv(100) == GREETING
    assert door.keeper.looked_into == []


def test_a_unix_socket_has_no_address_and_does_not_wait() -> None:
    passed: list[Any] = []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        Gate(Clock(), Keeper()).take(ours, (), lambda accepted, client: passed.append((accepted, client)))
        Gate(Clock(), Keeper()).take(ours, ("",), lambda accepted, client: passed.append((accepted, client)))
    assert passed == [(ours, ()), (ours, ("",))]


@pytest.mark.parametrize("said", [b"EHLO early\r\n", b"\x16\x03\x01", b"x" * 60_000])
def test_who_talks_before_the_greeting_is_turned_away(door: Door, said: bytes) -> None:
    client = door.hold()
    client.sendall(said)
    door.advance(6)
    assert read_all(client) == b"554 5.5.0 Protocol synchronisation error\r\n"
    assert door.keeper.judged == [] and door.counts["early_talkers"] == 1
    assert door.events == [
        (
            "gate-refused",
            {
                "client": "127.1.2.3",
                "why": "talked before the greeting",
                "reply": "554 5.5.0 Protocol synchronisation error",
            },
        )
    ]


def test_who_is_gone_is_forgotten(door: Door) -> None:
    door.hold().close()
    reset = door.hold("127.1.2.4", 2)
    reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    reset.close()
    door.advance(6)
    assert door.counts["gone"] == 2 and door.keeper.judged == [] and door.events == []


def test_who_is_listed_is_told_so(door: Door) -> None:
    door.keeper.listed.add("127.1.2.3")
    client, other = door.hold(), door.hold("127.1.2.4", 2)
    door.advance(6)
    assert read_all(client) == LISTED.octets
    assert other.recv(100) == GREETING
    assert [fields["why"] for _, fields in door.events] == ["listed"]


def test_what_is_found_out_meanwhile_ends_the_wait_of_that_client_alone(door: Door) -> None:
    one, two, other = door.hold(), door.hold(waiting=2), door.hold("127.1.2.4", 3)
    run(door.gate.let_in, "127.1.2.3")
    assert one.recv(100) == two.recv(100) == GREETING
    assert is_silent(other) and door.counts["waiting"] == 1
    run(door.gate.let_in, "192.0.2.1")


def test_stress_makes_the_wait_shorter_also_for_those_who_wait_already(door: Door) -> None:
    client = door.hold()
    door.advance(2.5)
    assert is_silent(client)
    door.stressed = True
    door.advance(1)
    assert client.recv(100) == GREETING


def test_one_address_cannot_fill_the_gate() -> None:
    with contextlib.closing(Door(max_waiting_per_address=3)) as door:
        held = [door.hold(waiting=number + 1) for number in range(3)]
        assert read_all(door.connect()).startswith(b"421 4.7.0 Too many connections")
        other = door.hold("127.1.2.4", 4)
        door.advance(6)
        assert [each.recv(100) for each in (*held, other)] == [GREETING] * 4
        door.hold()  # there is room again
        assert door.counts["too_many"] == 1


def test_a_crowd_makes_the_wait_shorter_and_shuts_nobody_out() -> None:
    with contextlib.closing(Door(max_waiting=10)) as door:
        clients = [door.hold(f"127.1.3.{number}", number + 1) for number in range(10)]
        door.advance(1)
        clients += [door.connect(f"127.1.4.{number}") for number in range(10)]
        for client in clients[:10]:
            assert client.recv(100) == GREETING
        assert [waited for _, waited in door.keeper.judged] == [1.0] * 10
        assert door.counts["waiting"] == 10 and door.counts["hurried"] == 10
        clients.append(door.connect("127.1.5.1"))
        clients[10].sendall(b"early")  # who is hurried is looked at all the same
        door.advance(6)
        assert all(client.recv(100) == GREETING for client in clients[12:])


def test_half_of_the_descriptors_are_not_for_waiters(door: Door) -> None:
    door.gate._descriptors = 2
    first = door.hold()
    door.hold("127.1.2.4", 2)
    door.connect("127.1.2.5")
    assert first.recv(100) == GREETING


def test_who_waits_at_the_stop_is_told_to_come_again(door: Door) -> None:
    client = door.hold()
    client.sendall(b"EHLO early\r\n")
    run(door.gate.stop)
    assert read_all(client) == b"421 4.3.2 Service is shutting down, try again later\r\n"
    assert run(door.clock.getDelayedCalls) == []


def test_a_keeper_that_breaks_turns_nobody_away(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    client = door.hold()
    door.keeper.judged = None  # type: ignore[assignment]
    door.advance(6)
    assert client.recv(100) == GREETING
    door.keeper.problem = RuntimeError("broken")
    assert door.connect("127.1.2.4").recv(100) == GREETING


def test_a_flood_of_refusals_is_counted_and_not_all_told(door: Door) -> None:
    for number in range(30):
        door.hold(f"127.1.6.{number}", number + 1).sendall(b"x")
    door.advance(6)
    assert door.counts["early_talkers"] == 30 and len(door.events) == 20
    door.hold().sendall(b"x")
    door.advance(6)
    assert len(door.events) == 21


# -- what it costs ---------------------------------------------------------------------------------------------------------


class SilentDatabase:
    """Never answers, so that everything that waits for it is there to be weighed."""

    def read(self, job: Any) -> Any:
        return Deferred()

    write = read


def test_five_thousand_waiters_cost_less_than_2_kb_each() -> None:
    """With everything that is looked up for them under way, in line, and never answered."""
    count = 5000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * count + 500
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"needs {wanted} file descriptors, may have {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        clock = Clock()
        settings = GateSettings(dns=DnsListSettings((DnsList("one.test"), DnsList("two.test"))), allow_networks=())
        known = KnownClients(SilentDatabase(), clock, settings.known)
        questions: list[Deferred[tuple[str, ...]]] = []

        def find(name: str) -> Deferred[tuple[str, ...]]:
            questions.append(Deferred())
            return questions[-1]

        keeper = Gatekeeper(known, DnsLists(find, clock, settings.dns), settings, now=lambda: 1_800_000_000.0)
        gate = Gate(clock, keeper, WaitSettings(max_waiting=count))
        stack.callback(gate.stop)
        clients = [stack.enter_context(socket.socket()) for _ in range(count)]
        passed: list[Any] = []

        def go_on(accepted: socket.socket, client: Any) -> None:
            passed.append(accepted)

        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        before = tracemalloc.get_traced_memory()[0]
        for number, client in enumerate(clients):
            client.bind((f"127.7.{number >> 8}.{number & 255}", 0))
            client.connect(listening.getsockname())
            gate.take(*listening.accept(), go_on)
            if number == 100:
                clock.advance(0)  # the look-up begins, and the others wait for it
        each = (tracemalloc.get_traced_memory()[0] - before) / count
        assert gate.statistics()["waiting"] == count and not passed
        assert len(questions) == 2 * settings.dns.lists_at_once
        assert 400 < each < 2048, each  # a socket object alone is some 100
