# SPDX-License-Identifier: MIT
"""Counting together: exact for each protocol and network, cleared for the dead, and who should take the next client."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from polarismail.net.limits import ConnectionCounter, ConnectionLimits
from polarismail.net.shares import Shares, make_memory


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = make_memory(3)
    yield descriptor
    os.close(descriptor)


def test_limits_hold_over_all_workers(memory: int) -> None:
    counters = [
        ConnectionCounter(ConnectionLimits(total=4, per_address=2), Shares(memory, 3, own).counting("smtp"))
        for own in range(3)
    ]
    assert [counter.admit("192.0.2.1") for counter in counters] == [True, True, False]
    assert [counter.admit("192.0.2.2") for counter in counters] == [True, True, False]
    assert not counters[0].admit("192.0.2.3")  # four in all
    counters[0].leave("192.0.2.1")
    assert counters[2].admit("192.0.2.3")
    assert [counter.total for counter in counters] == [1, 2, 1]
    for counter in counters:
        counter.limits = ConnectionLimits(total=9, per_address=2, per_network=5)
    assert counters[0].admit("192.0.2.5") and not counters[1].admit("192.0.2.6") and counters[1].admit("192.0.3.1")
    assert [counter.total_of_all for counter in counters] == [6, 6, 6]


def test_a_connection_that_counts_for_another_address_does_so_for_all_workers(memory: int) -> None:
    one, two = (
        ConnectionCounter(ConnectionLimits(total=3, per_address=1), Shares(memory, 3, own).counting("smtp"))
        for own in range(2)
    )
    assert one.admit("192.0.2.1") and two.admit("192.0.2.2")
    assert one.move("192.0.2.1", "192.0.2.9")
    assert not two.move("192.0.2.2", "192.0.2.9")
    assert not two.admit("192.0.2.2")
    assert two.admit("192.0.2.1")  # free again, and the total is what it was
    assert not two.admit("192.0.2.5")


def test_protocols_are_counted_apart(memory: int) -> None:
    shares = Shares(memory, 3, 0)
    smtp, pop3 = shares.counting("smtp"), shares.counting("pop3")
    assert smtp.add("192.0.2.1", "192.0.2.0/24") == (1, 1, 1)
    assert pop3.add("192.0.2.1", "192.0.2.0/24") == (1, 1, 1)
    assert shares.sessions() == [2, 0, 0]
    with pytest.raises(ValueError, match="not in tuple"):
        shares.counting("imap")


def test_what_a_dead_worker_had_is_free_again(memory: int) -> None:
    dead = Shares(memory, 3, 1)
    dead.beat()
    dead.counting("smtp").add("192.0.2.1", "192.0.2.0/24")
    supervisor = Shares(memory, 3)
    assert supervisor.sessions() == [0, 1, 0]
    supervisor.clear(1)
    assert supervisor.sessions() == [0, 0, 0]
    assert Shares(memory, 3, 0).counting("smtp").add("192.0.2.1", "192.0.2.0/24") == (1, 1, 1)
    assert supervisor.silent_seconds(1) == 0.0


def test_the_next_client_is_left_to_who_has_fewer(memory: int) -> None:
    workers = [Shares(memory, 3, own) for own in range(3)]
    counts = [each.counting("smtp") for each in workers]
    workers[0].beat()
    for _ in range(5):
        counts[0].add("192.0.2.1", "192.0.2.0/24")
    assert not workers[0].has_more_than_its_share()  # nobody else lives
    workers[1].beat()
    assert workers[0].has_more_than_its_share()
    assert not workers[1].has_more_than_its_share()
    for _ in range(4):
        counts[1].add("192.0.2.2", "192.0.2.0/24")
    assert not workers[0].has_more_than_its_share()


def test_networks_that_share_a_slot_are_never_counted_too_low(memory: int) -> None:
    count = Shares(memory, 3, 0).counting("smtp")
    networks = [f"10.0.{at // 250}.{at % 250}" for at in range(2000)]
    for network in networks:
        assert count.add(network, "10.0.0.0/8")[1] >= 1
    assert all(count.add(network, "10.0.0.0/8")[1] >= 2 for network in networks[:100])
    assert count.total == 2100
