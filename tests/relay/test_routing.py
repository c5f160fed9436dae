# SPDX-License-Identifier: MIT
"""Routes: smarthosts by domain, address literals, sites."""

from __future__ import annotations

import random

import pytest

from polarismail.relay.routing import Destination, Router, RoutingSettings, Smarthost
from polarismail.values.errors import LookupFailed, NoSuchName
from polarismail.values.reply import Reply
from tests.reactor import run


class Names:
    """What DNS holds, as a dict; the string "fails" is SERVFAIL."""

    def __init__(self, mx: dict[str, object] | None = None, addresses: dict[str, object] | None = None) -> None:
        self.records, self.hosts = mx or {}, addresses or {}

    async def mx(self, domain: str) -> tuple[tuple[int, str], ...]:
        return self._get(self.records, domain)  # type: ignore[return-value]

    async def addresses(self, host: str) -> tuple[str, ...]:
        return self._get(self.hosts, host)  # type: ignore[return-value]

    def _get(self, table: dict[str, object], name: str) -> object:
        if name not in table:
            raise NoSuchName(name)
        if table[name] == "fails":
            raise LookupFailed(name)
        return table[name]


NAMES = Names(
    {"one.example": ((10, "mx.test"),), "two.example": ((5, "mx.test"),), "three.example": ((10, "other.test"),)},
    {"mx.test": ("8.8.8.8",), "other.test": ("8.8.4.4",), "relay.test": ("10.0.0.1",), "broken.test": "fails"},
)


def find(settings: RoutingSettings, next_hop: str) -> Destination | Reply:
    return run(Router(NAMES, settings, random.Random(1)).find, next_hop)


def found(settings: RoutingSettings, next_hop: str) -> Destination:
    destination = find(settings, next_hop)
    assert isinstance(destination, Destination), destination
    return destination


def test_domains_behind_the_same_hosts_are_one_site() -> None:
    settings = RoutingSettings()
    assert found(settings, "one.example").site == found(settings, "Two.Example.").site == "mx.test:25"
    assert found(settings, "three.example").site == "other.test:25"
    assert find(settings, "none.example") == Reply(550, (5, 1, 2), "No such domain: none.example")


def test_smarthost_for_all_but_some() -> None:
    relay = Smarthost("relay.test", 587, "we", "secret", tls="required")
    settings = RoutingSettings(
        smarthost=relay, domains={"one.example": None, "two.example": Smarthost("127.0.0.1", 2525)}
    )
    everything = found(settings, "unknown.example")
    assert everything.exchangers[0].addresses == ("10.0.0.1",)  # private, and wanted
    assert (everything.port, everything.tls, everything.credentials) == (587, "required", ("we", "secret"))
    assert everything.is_explicit and "secret" not in repr(everything) and "secret" not in repr(settings)
    assert found(settings, "[192.0.2.1]").site == everything.site
    assert found(settings, "one.example").site == "mx.test:25"
    direct = found(settings, "TWO.example")
    assert (direct.exchangers[0].addresses, direct.port, direct.credentials) == (("127.0.0.1",), 2525, None)


@pytest.mark.parametrize("host", ["broken.test", "gone.test"])
def test_a_smarthost_that_cannot_be_found_is_a_deferral(host: str) -> None:
    reply = find(RoutingSettings(smarthost=Smarthost(host)), "one.example")
    assert isinstance(reply, Reply) and reply.is_transient


def test_address_literals() -> None:
    assert found(RoutingSettings(), "[8.8.8.8]").exchangers[0].addresses == ("8.8.8.8",)
    assert found(RoutingSettings(), "[IPv6:2606:4700::1111]").exchangers[0].addresses == ("2606:4700::1111",)
    for literal in ("[127.0.0.1]", "[IPv6:::1]", "[10.0.0.1]"):
        reply = find(RoutingSettings(), literal)
        assert isinstance(reply, Reply) and reply.dotted == "5.4.4"
    assert found(RoutingSettings(allow_private_targets=True), "[127.0.0.1]").port == 25
    own = RoutingSettings(allow_private_targets=True, own_endpoints=frozenset({("0.0.0.0", 25)}))
    reply = find(own, "[127.0.0.1]")
    assert isinstance(reply, Reply) and reply.dotted == "5.4.6"


def test_addresses_are_ordered_for_each_connection() -> None:
    names = Names({"x.example": ((10, "a.test"), (10, "b.test"))}, {"a.test": ("8.8.8.8",), "b.test": ("8.8.4.4",)})
    router = Router(names, RoutingSettings(port=2525), random.Random(3))
    destination = run(router.find, "x.example")
    assert isinstance(destination, Destination)
    first = {router.order(destination)[0].address for _ in range(40)}
    assert first == {"8.8.8.8", "8.8.4.4"}
    assert {host.port for host in router.order(destination)} == {2525}


def test_a_destination_is_known_for_a_moment_under_the_same_settings() -> None:
    seconds = [100.0]
    router = Router(NAMES, RoutingSettings(), random.Random(1), lambda: seconds[0])
    assert router.known("one.example") is None
    destination = run(router.find, "one.example")
    assert router.known("one.example") is destination and router.known("two.example") is None
    seconds[0] += 4.9
    assert router.known("one.example") is destination
    seconds[0] += 0.2
    assert router.known("one.example") is None
    run(router.find, "one.example")
    router.settings = RoutingSettings(port=26)
    assert router.known("one.example") is None, "it was found under other settings"
    run(router.find, "none.example")
    assert router.known("none.example") is None, "what could not be found is asked again"
