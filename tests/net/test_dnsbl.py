# SPDX-License-Identifier: MIT
"""DNS lists, asked of a DNS server: names, answers that count, lists that fail, floods."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from polarismail.net.dnsbl import DnsList, DnsLists, DnsListSettings, Hit, Listing, parse_pattern, query_name
from polarismail.net.resolver import Resolver, ResolverSettings
from polarismail.testing import DnsServer
from tests.reactor import reactor, run


class Asking:
    """DNS lists behind a real resolver and a DNS server."""

    def __init__(self) -> None:
        self.server = DnsServer()
        self.port = run(self.server.listen, reactor)
        self.known: dict[str, Listing] = {}

    def lists(self, *lists: DnsList, allow: tuple[DnsList, ...] = (), **settings: Any) -> DnsLists:
        resolver = Resolver(
            reactor, ResolverSettings(servers=(("127.0.0.1", self.port),), timeout_seconds=0.3, tries=1)
        )
        made = DnsLists(resolver.ipv4_addresses, reactor, DnsListSettings(lists=lists, allow_lists=allow, **settings))
        made.when_known = self.known.__setitem__
        return made

    def find(self, lists: DnsLists, address: str) -> Listing:
        run(lists.ask, address)
        self.settle(lists)
        return run(lists.look, address)

    def settle(self, lists: DnsLists) -> None:
        until = time.monotonic() + 20
        while run(lambda: bool(lists._running or lists._line)):
            assert time.monotonic() < until
            time.sleep(0.01)


@pytest.fixture
def asking() -> Iterator[Asking]:
    made = Asking()
    yield made
    run(made.server.stop)


def test_the_name_that_is_asked_for() -> None:
    assert query_name("192.0.2.99", "bl.test") == "99.2.0.192.bl.test"
    assert query_name("::ffff:192.0.2.99", "bl.test") == "99.2.0.192.bl.test"
    assert query_name("2001:db8:1:2:3:4:567:89ab%eth0", "bl.test") == (
        "b.a.9.8.7.6.5.0.4.0.0.0.3.0.0.0.2.0.0.0.1.0.0.0.8.b.d.0.1.0.0.2.bl.test"
    )
    assert query_name("unix", "bl.test") is None


@given(st.tuples(*[st.integers(0, 255)] * 4), st.tuples(*[st.integers(0, 255)] * 4))
def test_a_pattern_is_four_ranges(low: tuple[int, ...], high: tuple[int, ...]) -> None:
    ends = [sorted(pair) for pair in zip(low, high, strict=True)]
    parsed = parse_pattern(".".join(f"{first}..{last}" for first, last in ends))
    assert [(each[0], each[-1]) for each in parsed] == [tuple(pair) for pair in ends]
    assert parse_pattern("127.*.0.2") == (range(127, 128), range(256), range(1), range(2, 3))


@pytest.mark.parametrize(
    "text", ["", "127.0.0", "127.0.0.256", "127.0.0.9..2", "127.0.0.2..", "127.0.0.2-5", "a.b.c.d"]
)
def test_what_is_no_pattern(text: str) -> None:
    with pytest.raises(ValueError, match=r"answers: expected four octets as"):
        DnsList("bl.test", answers=(text,))


def test_a_list_has_a_domain_name() -> None:
    for name in ("", "bl..test", "[192.0.2.1]"):
        with pytest.raises(ValueError, match="name: expected a domain name"):
            DnsList(name)


def test_each_list_that_has_the_client_counts_once_by_its_weight(asking: Asking) -> None:
    asking.server.zone |= {
        "1.2.0.192.bl.test": {"A": ["127.0.0.2", "127.0.0.4"]},
        "1.2.0.192.wl.test": {"A": ["127.0.5.1"]},
        "1.2.0.192.quiet.test": {"A": ["127.0.0.9"]},
    }
    lists = asking.lists(
        DnsList("bl.test", 3),
        DnsList("bl.test", 7, answers=("127.0.0.4..5",)),
        DnsList("quiet.test", answers=("127.0.0.2..8",)),
        allow=(DnsList("wl.test", 2, answers=("127.0.*.1..3",)),),
    )
    found = asking.find(lists, "192.0.2.1")
    assert found.complete
    assert sorted(found.hits, key=lambda hit: hit.weight) == [Hit("wl.test", -2), Hit("bl.test", 3), Hit("bl.test", 7)]
    assert asking.known == {"192.0.2.1": found}
    assert len(asking.server.queries) == 3  # a zone that is there twice is asked once
    assert run(lists.ask, "192.0.2.1") == found
    assert len(asking.server.queries) == 3  # remembered
    assert asking.find(lists, "192.0.2.2") == Listing((), True)


def test_a_list_that_says_it_does_not_answer_us_lists_nobody(asking: Asking) -> None:
    asking.server.zone["1.2.0.192.bl.test"] = {"A": ["127.255.255.254"]}
    assert asking.find(asking.lists(DnsList("bl.test")), "192.0.2.1") == Listing((), True)


@pytest.mark.parametrize("fault", ["SERVFAIL", "REFUSED", "TIMEOUT"])
def test_a_list_that_fails_counts_nothing_and_the_others_do(asking: Asking, fault: str) -> None:
    asking.server.zone |= {"1.2.0.192.bad.test": fault, "1.2.0.192.bl.test": {"A": ["127.0.0.2"]}}
    lists = asking.lists(DnsList("bad.test", 5), DnsList("bl.test"))
    assert asking.find(lists, "192.0.2.1") == Listing((Hit("bl.test", 1),), False)
    assert asking.known == {}  # nobody knows, so nobody is told
    assert lists.statistics()["lists_failed"] == 1


def test_what_has_come_so_far_can_be_seen_while_others_are_awaited() -> None:
    late: Deferred[tuple[str, ...]] = Deferred()

    async def find(name: str) -> tuple[str, ...]:
        return ("127.0.0.2",) if name.endswith("quick.test") else await late

    lists = DnsLists(find, reactor, DnsListSettings((DnsList("late.test"), DnsList("quick.test"))))
    run(lists.ask, "192.0.2.1")
    assert run(lists.look, "192.0.2.1") == Listing((Hit("quick.test", 1),), False)
    run(late.callback, ("127.0.0.2",))
    assert run(lists.look, "192.0.2.1").complete


def test_under_a_flood_few_are_asked_at_a_time_and_the_newest_first() -> None:
    waiting: list[tuple[str, Deferred[tuple[str, ...]]]] = []

    def find(name: str) -> Deferred[tuple[str, ...]]:
        waiting.append((name, Deferred()))
        return waiting[-1][1]

    clock = Clock()
    lists = DnsLists(find, clock, DnsListSettings((DnsList("bl.test"),), lists_at_once=2))
    for number in range(10_010):
        lists.ask(f"10.0.{number >> 8}.{number & 255}")
    assert [name for name, _ in waiting] == ["0.0.0.10.bl.test", "1.0.0.10.bl.test"]
    assert lists.statistics()["lists_not_asked"] == 8
    waiting[0][1].callback(())
    clock.advance(0)
    assert [name for name, _ in waiting[2:]] == [f"{10_009 & 255}.{10_009 >> 8}.0.10.bl.test"]


def test_other_lists_after_a_reload_and_old_answers_are_not_used(asking: Asking) -> None:
    asking.server.zone |= {"1.2.0.192.bl.test": {"A": ["127.0.0.2"]}}
    lists = asking.lists(DnsList("bl.test"))
    assert asking.find(lists, "192.0.2.1").hits
    run(lists.reconfigure, DnsListSettings((DnsList("other.test"),)))
    assert asking.find(lists, "192.0.2.1") == Listing((), True)


def test_answers_are_forgotten(asking: Asking) -> None:
    lists = asking.lists(DnsList("bl.test"), lists_cache_seconds=0.0)
    assert asking.find(lists, "192.0.2.1") == Listing()
