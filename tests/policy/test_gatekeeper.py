# SPDX-License-Identifier: MIT
"""Who keeps the gate: known clients pass at once, lists speak behind their back, passes are earned and taken away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from twisted.internet.defer import Deferred

from polarismail.net.dnsbl import DnsList, DnsLists, DnsListSettings
from polarismail.policy.gate import GateSettings
from polarismail.policy.gatekeeper import Gatekeeper
from polarismail.store.known_clients import KnownClients
from polarismail.values.errors import NoSuchName
from tests.databases import open_database
from tests.reactor import reactor, run

T0 = 1_800_000_000.0
ANN = "192.0.2.1"
SETTINGS = GateSettings(
    dns=DnsListSettings(lists=(DnsList("bl.test"),), allow_lists=(DnsList("wl.test"),), lists_cache_seconds=3600.0)
)


class Gate:
    """A gatekeeper on a database, with lists whose answers are the test's."""

    def __init__(self, database: Any, settings: GateSettings = SETTINGS) -> None:
        self.listed: set[str] = set()  # names
        self.silent = False
        self.let_in: list[str] = []
        known = KnownClients(database, reactor, settings.known, now=lambda: T0)
        self.keeper = Gatekeeper(known, DnsLists(self.find, reactor, settings.dns), settings, now=lambda: T0)
        self.keeper.let_in = self.let_in.append

    async def find(self, name: str) -> tuple[str, ...]:
        if self.silent:
            await Deferred()
        if name not in self.listed:
            raise NoSuchName(name)
        return ("127.0.0.2",)

    def arrives(self, address: str = ANN) -> bool:
        """True: passes at once, or is let in by what is found out."""
        if run(self.keeper.passes, address):
            return True
        before = len(self.let_in)
        run(self.keeper.look_into, address)
        run(self.keeper.known.find, address, T0)  # behind the keeper's own question
        return address in self.let_in[before:]

    def waits(self, address: str = ANN, seconds: float = 6.0) -> str | None:
        refused = run(self.keeper.judge, address, seconds)
        return None if refused is None else str(refused[0])


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    directory: Path = tmp_path_factory.mktemp("gatekeeper")
    with open_database("sqlite", directory, "counters") as opened:
        yield opened


@pytest.fixture
def gate(database: Any) -> Iterator[Gate]:
    made = Gate(database)
    yield made
    for address in (ANN, "2001:db8::1"):
        run(made.keeper.forget, address)
    run(made.keeper.known.stop)


def test_patience_earns_a_pass_for_the_next_time_and_after_a_restart(gate: Gate, database: Any) -> None:
    assert not gate.arrives()
    assert gate.waits() is None
    assert run(gate.keeper.passes, ANN)
    run(gate.keeper.known.stop)
    again = Gate(database)
    assert not run(again.keeper.passes, ANN)  # memory is empty ...
    assert again.arrives() and again.let_in == [ANN]  # ... and the database is asked while the client waits
    assert run(again.keeper.passes, ANN)
    assert run(again.keeper.statistics)["known"] == 2


def test_a_network_of_ipv6_is_known_as_a_whole(gate: Gate) -> None:
    assert gate.waits("2001:db8::1") is None
    assert run(gate.keeper.passes, "2001:db8::2") and not run(gate.keeper.passes, "2001:db8:1::2")


def test_a_wait_cut_short_earns_nothing(gate: Gate) -> None:
    assert gate.waits(seconds=0.5) is None
    assert not gate.arrives()


def test_who_is_listed_is_refused_and_earns_nothing(gate: Gate) -> None:
    gate.listed.add("1.2.0.192.bl.test")
    assert not gate.arrives()
    assert gate.waits() == "554 5.7.1 Client 192.0.2.1 is listed by bl.test"
    gate.keeper.lists.reconfigure(DnsListSettings())
    assert not gate.arrives()


def test_who_is_on_an_allow_list_does_not_wait(gate: Gate) -> None:
    gate.listed.add("1.2.0.192.wl.test")
    assert gate.arrives()
    assert run(gate.keeper.passes, ANN)


def test_lists_that_are_silent_hold_nothing_against_a_client(gate: Gate) -> None:
    gate.silent = True
    assert not gate.arrives()
    assert gate.waits() is None
    assert run(gate.keeper.passes, ANN)


def test_who_comes_to_be_listed_loses_its_pass_behind_its_back(gate: Gate) -> None:
    gate.silent = True
    assert gate.waits() is None
    gate.silent = False
    gate.listed.add("1.2.0.192.bl.test")
    assert run(gate.keeper.passes, ANN)  # at once: lists are asked meanwhile
    assert not gate.arrives()
    assert gate.waits() == "554 5.7.1 Client 192.0.2.1 is listed by bl.test"


def test_a_pass_can_be_taken_away(gate: Gate) -> None:
    assert gate.waits() is None
    assert gate.arrives()
    run(gate.keeper.forget, ANN)
    run(gate.keeper.forget, ANN)
    assert not gate.arrives()
    assert run(gate.keeper.statistics)["forgotten"] == 1


def test_other_settings_hold_at_once(gate: Gate) -> None:
    gate.listed.add("1.2.0.192.other.test")
    assert run(gate.keeper.passes, "127.0.0.2") and not gate.arrives()
    run(gate.keeper.reconfigure, evolve(SETTINGS, allow_networks=(ANN,)))
    assert run(gate.keeper.passes, ANN) and not run(gate.keeper.passes, "127.0.0.2")
    other = evolve(SETTINGS, dns=DnsListSettings(lists=(DnsList("other.test"),)), listed="defer")
    run(gate.keeper.reconfigure, other)
    assert not gate.arrives()
    assert gate.waits() == "421 4.7.1 Client 192.0.2.1 is listed by other.test"
