# SPDX-License-Identifier: MIT
"""The resolver against a real DNS server on loopback."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import Clock

from polarismail.net.resolver import Answer, Cache, Resolver, ResolverSettings, fold_name, system_servers
from polarismail.testing import DnsServer, Zone
from polarismail.values.errors import LookupFailed, NoSuchName
from tests.reactor import reactor, run


@contextlib.asynccontextmanager
async def serving(zone: Zone, **settings: object) -> AsyncIterator[tuple[DnsServer, Resolver]]:
    server = DnsServer(zone)
    port = server.listen(reactor)
    options = {"timeout_seconds": 0.3, "servers": (("127.0.0.1", port),), **settings}
    try:
        yield server, Resolver(reactor, ResolverSettings(**options))  # type: ignore[arg-type]
    finally:
        await server.stop()


def test_mx_is_ordered_and_folded() -> None:
    async def look() -> None:
        zone = {"example.org": {"MX": [[20, "B.Example.ORG."], [10, "a.example.org"]]}}
        async with serving(zone) as (server, resolver):
            expected = ((10, "a.example.org"), (20, "b.example.org"))
            assert await resolver.mx("Example.ORG.") == expected
            assert await resolver.mx("example.org") == expected
            assert len(server.queries) == 1  # one cache entry for all spellings

    run(look)


def test_null_mx_is_an_empty_host_and_absent_mx_an_empty_answer() -> None:
    async def look() -> None:
        zone: Zone = {"nomail.test": {"MX": [[0, "."]]}, "plain.test": {"A": ["192.0.2.1"]}}
        async with serving(zone) as (_, resolver):
            assert await resolver.mx("nomail.test") == ((0, ""),)
            assert await resolver.mx("plain.test") == ()

    run(look)


def test_addresses_of_both_families_in_turns() -> None:
    async def look() -> None:
        zone: Zone = {
            "mx.test": {"A": ["192.0.2.1", "192.0.2.2"], "AAAA": ["2001:db8::1"]},
            "half.test": {"A": ["192.0.2.3"], "AAAA": "SERVFAIL"},
            "none.test": {"MX": [[1, "x.test"]]},
        }
        async with serving(zone) as (_, resolver):
            assert await resolver.addresses("mx.test") == ("2001:db8::1", "192.0.2.1", "192.0.2.2")
            assert await resolver.addresses("half.test") == ("192.0.2.3",)
            assert await resolver.addresses("none.test") == ()
        async with serving(zone, ipv6=False) as (_, resolver):
            assert await resolver.addresses("mx.test") == ("192.0.2.1", "192.0.2.2")

    run(look)


@pytest.mark.parametrize("fault", ["SERVFAIL", "REFUSED", "TIMEOUT"])
def test_a_failure_never_says_no(fault: str) -> None:
    async def look() -> None:
        async with serving({"broken.test": fault, "half.test": {"A": fault}}, tries=2) as (server, resolver):
            with pytest.raises(LookupFailed):
                await resolver.mx("broken.test")
            assert len(server.queries) == 2
            with pytest.raises(LookupFailed):
                await resolver.mx("broken.test")
            assert len(server.queries) == 2  # failures are kept, for seconds
            with pytest.raises(LookupFailed):
                await resolver.addresses("half.test")  # empty AAAA, broken A: not "there is none"

    run(look)


def test_nxdomain_is_final_and_cached() -> None:
    async def look() -> None:
        async with serving({}) as (server, resolver):
            for _ in range(3):
                with pytest.raises(NoSuchName):
                    await resolver.mx("gone.test")
            assert len(server.queries) == 1
            with pytest.raises(NoSuchName):
                await resolver.addresses("gone.test")

    run(look)


def test_a_dead_server_is_passed_over_at_once() -> None:
    async def look() -> None:
        async with serving({"example.org": {"MX": [[1, "mx.test"]]}}) as (server, _):
            dead = DnsServer()
            gone = dead.listen(reactor)
            await dead.stop()
            servers = (("127.0.0.1", gone), ("127.0.0.1", server.port))
            resolver = Resolver(reactor, ResolverSettings(servers=servers, timeout_seconds=30, tries=1))
            assert await resolver.mx("example.org") == ((1, "mx.test"),)
            alone = Resolver(reactor, ResolverSettings(servers=servers[:1], timeout_seconds=30, tries=2))
            with pytest.raises(LookupFailed):
                await alone.mx("example.org")

    run(look)


def test_cnames_are_followed_and_bounded() -> None:
    async def look() -> None:
        zone: Zone = {
            "a.test": {"CNAME": "b.test"},
            "b.test": {"CNAME": "c.test", "chase": False},
            "c.test": {"A": ["192.0.2.9"]},
            "loop.test": {"CNAME": "pool.test", "chase": False},
            "pool.test": {"CNAME": "loop.test", "chase": False},
            "dangling.test": {"CNAME": "nowhere.test"},
            **{f"n{at}.test": {"CNAME": f"n{at + 1}.test"} for at in range(12)},
            "n12.test": {"A": ["192.0.2.8"]},
        }
        async with serving(zone) as (_, resolver):
            assert await resolver.addresses("a.test") == ("192.0.2.9",)
            assert await resolver.addresses("n4.test") == ("192.0.2.8",)  # eight of them
            for name in ("loop.test", "n3.test", "n0.test"):
                with pytest.raises(LookupFailed):
                    await resolver.addresses(name)
            with pytest.raises(NoSuchName):
                await resolver.addresses("dangling.test")

    run(look)


def test_truncated_answers_come_over_tcp_and_are_bounded() -> None:
    async def look() -> None:
        zone = {"many.test": {"MX": [[at, f"mail-exchanger-{at}.many.test"] for at in range(150)]}}
        async with serving(zone) as (server, resolver):
            found = await resolver.mx("many.test")
            assert len(found) == 100
            assert [kind for _, _, kind in server.queries] == ["udp", "tcp"]

    run(look)


def test_the_same_question_is_asked_once() -> None:
    async def look() -> None:
        async with serving({"example.org": {"MX": [[1, "mx.test"]]}}) as (server, resolver):
            asked = [Deferred.fromCoroutine(resolver.mx("example.org")) for _ in range(20)]
            assert await gatherResults(asked) == [((1, "mx.test"),)] * 20
            assert len(server.queries) == 1
            bad = [Deferred.fromCoroutine(resolver.mx("gone.test")) for _ in range(5)]
            for one in bad:
                with pytest.raises(NoSuchName):
                    await one
            assert len(server.queries) == 2

    run(look)


def test_names_that_dns_cannot_carry() -> None:
    async def look() -> None:
        async with serving({}) as (server, resolver):
            for name in ("", "a" * 300, "dömain.test"):
                with pytest.raises(NoSuchName):
                    await resolver.mx(name)
            assert server.queries == []

    run(look)


def test_cache_is_bounded_in_entries_and_time() -> None:
    clock = Clock()
    clock.advance(1000)
    cache = Cache(3, clock.seconds)
    for at in range(10):
        cache.put((f"n{at}", 1), Answer(values=(at,), ttl=100 if at != 8 else 5))
    assert len(cache) == 3
    assert cache.get(("n0", 1)) is None
    assert cache.get(("n9", 1)) is not None
    clock.advance(6)
    assert cache.get(("n8", 1)) is None
    clock.advance(100)
    assert cache.get(("n9", 1)) is None
    cache.put(("future", 1), Answer(ttl=100))
    clock.rightNow -= 500  # the clock was set back: believe nothing from the future
    assert cache.get(("future", 1)) is None


def test_ttls_are_clamped() -> None:
    async def look() -> None:
        zone = {
            "short.test": {"MX": [[1, "mx.test"]], "TTL": 0},
            "long.test": {"MX": [[1, "mx.test"]], "TTL": 10_000_000},
        }
        async with serving(zone) as (_, resolver):
            for name, ttl in (("short.test", 60), ("long.test", 86_400)):
                await resolver.mx(name)
                answer = resolver._cache.get((name, 15))
                assert answer is not None and answer.ttl == ttl
            with pytest.raises(NoSuchName):
                await resolver.mx("gone.test")
            answer = resolver._cache.get(("gone.test", 15))
            assert answer is not None and answer.ttl == 60

    run(look)


def test_resolv_conf(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "resolv.conf"
    path.write_text("# x\nsearch a b\nnameserver 192.0.2.53\nnameserver\nnameserver 2001:db8::53 \n")
    assert system_servers(str(path)) == (("192.0.2.53", 53), ("2001:db8::53", 53))
    assert system_servers(str(tmp_path / "absent")) == (("127.0.0.1", 53),)


def test_fold_name() -> None:
    assert fold_name(b"MX.Example.ORG.") == "mx.example.org"
    assert fold_name(b"\xff.test") == "\\xff.test"
