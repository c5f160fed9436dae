# SPDX-License-Identifier: MIT
"""Mail exchangers, judged from what DNS says; the resolver here is a dict, the real one has its own tests."""

from __future__ import annotations

import random
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from polarismail.net.resolver import Resolver, ResolverSettings
from polarismail.relay.mx import (
    Exchanger,
    MxSettings,
    find_exchangers,
    is_local_address,
    is_own_endpoint,
    is_public,
    order_addresses,
)
from polarismail.testing import DnsServer
from polarismail.values.reply import Reply
from tests.reactor import reactor, run

OPEN = MxSettings(allow_private_targets=True)


def find(
    zone: dict[str, Any], domain: str = "example.org", settings: MxSettings = OPEN
) -> tuple[Exchanger, ...] | Reply:
    """Through the real resolver and a real DNS server."""

    async def look() -> tuple[Exchanger, ...] | Reply:
        server = DnsServer(zone)
        port = server.listen(reactor)
        try:
            options = ResolverSettings(servers=(("127.0.0.1", port),), timeout_seconds=0.3, tries=1)
            return await find_exchangers(domain, Resolver(reactor, options), settings)
        finally:
            await server.stop()

    return run(look)


def names(found: tuple[Exchanger, ...] | Reply) -> list[str]:
    assert not isinstance(found, Reply), found
    return [exchanger.name for exchanger in found]


def verdict(found: tuple[Exchanger, ...] | Reply) -> tuple[int, str]:
    assert isinstance(found, Reply), found
    return found.code, found.dotted


def test_exchangers_by_preference_with_all_addresses() -> None:
    zone = {
        "example.org": {"MX": [[20, "Backup.Example.ORG."], [10, "mx.example.org"]]},
        "mx.example.org": {"A": ["192.0.2.1"], "AAAA": ["2001:db8::1"]},
        "backup.example.org": {"CNAME": "real.example.net"},
        "real.example.net": {"A": ["192.0.2.2", "192.0.2.3"]},
    }
    assert find(zone) == (
        Exchanger(10, "mx.example.org", ("2001:db8::1", "192.0.2.1")),
        Exchanger(20, "backup.example.org", ("192.0.2.2", "192.0.2.3")),
    )


def test_implicit_mx() -> None:
    assert find({"example.org": {"A": ["192.0.2.1"]}}) == (Exchanger(0, "example.org", ("192.0.2.1",)),)


@pytest.mark.parametrize(
    ("zone", "expected"),
    [
        ({}, (550, "5.1.2")),
        ({"example.org": {"MX": [[0, "."]]}}, (556, "5.1.10")),
        ({"example.org": {"TTL": 60}}, (550, "5.4.4")),
        ({"example.org": {"MX": [[10, "gone.example"]]}}, (550, "5.4.4")),
        ({"example.org": {"MX": [[10, "192.0.2.1"]]}}, (451, "4.4.4")),
        ({"example.org": "SERVFAIL"}, (451, "4.4.3")),
        ({"example.org": "TIMEOUT"}, (451, "4.4.3")),
        ({"example.org": {"MX": "SERVFAIL", "A": ["192.0.2.1"]}}, (451, "4.4.3")),
        ({"example.org": {"MX": [[10, "mx.example"]]}, "mx.example": "SERVFAIL"}, (451, "4.4.3")),
        ({"example.org": {"MX": [[10, "mx.example"], [20, "gone.example"]]}, "mx.example": "TIMEOUT"}, (451, "4.4.3")),
    ],
)
def test_no_exchanger(zone: dict[str, Any], expected: tuple[int, str]) -> None:
    assert verdict(find(zone)) == expected


def test_one_exchanger_that_answers_is_enough() -> None:
    zone = {
        "example.org": {"MX": [[10, "mx1.example"], [15, "gone.example"], [20, "mx2.example"], [30, "192.0.2.7"]]},
        "mx1.example": "SERVFAIL",
        "mx2.example": {"A": ["192.0.2.2"]},
    }
    assert names(find(zone)) == ["mx2.example"]


def test_a_null_mx_among_others_is_no_host() -> None:
    zone = {"example.org": {"MX": [[0, "."], [10, "mx.example"]]}, "mx.example": {"A": ["192.0.2.2"]}}
    assert names(find(zone)) == ["mx.example"]


THREE = {
    "example.org": {"MX": [[10, "first.example"], [20, "us.example"], [20, "equal.example"], [30, "last.example"]]},
    "first.example": {"A": ["192.0.2.1"]},
    "us.example": {"A": ["192.0.2.25"]},
    "equal.example": {"A": ["192.0.2.2"]},
    "last.example": {"A": ["192.0.2.3"]},
}


@pytest.mark.parametrize(
    "settings",
    [evolve(OPEN, own_names=frozenset({"us.example"})), evolve(OPEN, own_endpoints=frozenset({("192.0.2.25", 25)}))],
)
def test_our_own_preference_and_worse_are_dropped(settings: MxSettings) -> None:
    assert names(find(THREE, settings=settings)) == ["first.example"]
    first = {**THREE, "example.org": {"MX": [[10, "us.example"], [20, "last.example"]]}}
    assert verdict(find(first, settings=settings)) == (554, "5.4.6")


def test_the_better_host_is_unknown_for_now_and_we_are_the_backup() -> None:
    zone = {**THREE, "first.example": "SERVFAIL"}
    for settings in (
        evolve(OPEN, own_names=frozenset({"us.example"})),
        evolve(OPEN, own_endpoints=frozenset({("192.0.2.25", 25)})),
    ):
        assert verdict(find(zone, settings=settings)) == (451, "4.4.3")


def test_private_targets_are_refused_unless_allowed() -> None:
    zone = {"example.org": {"MX": [[10, "mx.example"]]}, "mx.example": {"A": ["127.0.0.1"], "AAAA": ["::1"]}}
    assert verdict(find(zone, settings=MxSettings())) == (550, "5.4.4")
    assert names(find(zone)) == ["mx.example"]
    mixed = {**zone, "mx.example": {"A": ["10.0.0.1", "8.8.8.8"]}}
    assert find(mixed, settings=MxSettings()) == (Exchanger(10, "mx.example", ("8.8.8.8",)),)


PRIVATE = """
127.0.0.1 0.0.0.0 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 224.0.0.1 240.0.0.1 255.255.255.255
:: ::1 fe80::1 fc00::1 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::7f00:1 64:ff9b::a00:1 2002:7f00:1::
"""


@pytest.mark.parametrize("address", PRIVATE.split())
def test_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"])
def test_public(address: str) -> None:
    assert is_public(address)


def test_own_endpoints() -> None:
    assert is_local_address("127.0.0.1") and not is_local_address("192.0.2.1")
    wild = frozenset({("0.0.0.0", 25)})
    assert is_own_endpoint("127.0.0.1", 25, wild)
    assert not is_own_endpoint("127.0.0.1", 26, wild)
    assert not is_own_endpoint("192.0.2.1", 25, wild)
    assert is_own_endpoint("192.0.2.1", 25, frozenset({("192.0.2.1", 25)}))


def test_equal_preferences_are_shuffled_and_unequal_ones_are_not() -> None:
    hosts = [Exchanger(10, "a", ("192.0.2.1",)), Exchanger(10, "b", ("192.0.2.2",)), Exchanger(20, "c", ("192.0.2.3",))]
    orders = {tuple(h.name for h in order_addresses(hosts, 25, 5, random.Random(seed))) for seed in range(50)}
    assert orders == {("a", "b", "c"), ("b", "a", "c")}


def test_many_addresses_of_the_first_do_not_hide_the_second() -> None:
    hosts = [
        Exchanger(10, "a", tuple(f"192.0.2.{n}" for n in range(1, 9))),
        Exchanger(20, "b", ("198.51.100.1", "198.51.100.2")),
    ]
    ordered = order_addresses(hosts, 2525, 5, random.Random(1))
    assert [h.name for h in ordered] == ["a", "a", "a", "b", "b"]
    assert ordered[0].port == 2525


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=8),
    st.integers(1, 8),
    st.integers(0, 1000),
)
def test_order_is_bounded_and_by_preference(shape: list[tuple[int, int]], limit: int, seed: int) -> None:
    hosts = [
        Exchanger(preference, f"h{at}", tuple(f"10.{at}.0.{n}" for n in range(many)))
        for at, (preference, many) in enumerate(shape)
    ]
    ordered = order_addresses(hosts, 25, limit, random.Random(seed))
    assert len(ordered) == min(limit, sum(many for _, many in shape))
    assert len({host.address for host in ordered}) == len(ordered)
    preference = {host.name: host.preference for host in hosts}
    assert [preference[h.name] for h in ordered] == sorted(preference[h.name] for h in ordered)
