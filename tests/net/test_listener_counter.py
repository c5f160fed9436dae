# SPDX-License-Identifier: MIT
"""A listener's own limits: beside those of the protocol, over all workers, and given back as they were taken."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from polarismail.net.limits import ConnectionCounter, ConnectionLimits
from polarismail.net.listener_counter import ListenerCounter
from polarismail.net.listeners import Listener, ListenerLimits
from polarismail.net.shares import Shares, make_memory

LISTENER = Listener(
    "mx",
    25,
    "mx",
    proxy_networks=("192.0.2.99/32",),
    limits=ListenerLimits(connections=3, connections_per_address=2),
)
ALL = ConnectionLimits(total=5, per_address=4)


@pytest.fixture
def workers() -> Iterator[list[tuple[ConnectionCounter, ListenerCounter]]]:
    """Two of one server."""
    memory = make_memory(2)
    made = []
    for own in (0, 1):
        shared = Shares(memory, 2, own).counting("smtp")
        protocol = ConnectionCounter(ALL, shared)
        made.append((protocol, ListenerCounter(LISTENER, protocol, shared)))
    yield made
    os.close(memory)


def test_both_bounds_hold_over_all_workers(workers: list[tuple[ConnectionCounter, ListenerCounter]]) -> None:
    (protocol, one), (_, two) = workers
    assert [one.admit("192.0.2.1"), two.admit("192.0.2.1"), one.admit("192.0.2.1")] == [True, True, False]
    assert [two.admit("192.0.2.2"), one.admit("192.0.2.3")] == [True, False]  # three in all
    one.leave("192.0.2.1")
    assert [one.admit("192.0.2.3"), one.admit("192.0.2.4")] == [True, False]
    assert [protocol.admit("192.0.2.5") for _ in range(3)] == [True, True, False]  # five of the protocol
    assert protocol.total == 3


@pytest.mark.parametrize("limits", [LISTENER.limits, ListenerLimits(connections_per_address=3)])
def test_a_refusal_takes_nothing(limits: ListenerLimits) -> None:
    protocol = ConnectionCounter(ConnectionLimits(total=1, per_address=1))
    counter = ListenerCounter(Listener("mx", 25, "mx", limits=limits), protocol)
    assert counter.admit("192.0.2.1")
    for _ in range(5):
        assert not counter.admit("192.0.2.2")
    counter.leave("192.0.2.1")
    assert counter.admit("192.0.2.2")
    counter.leave("192.0.2.2")
    assert not counter._counts
    assert protocol.total == 0


def test_a_proxy_and_a_unix_socket_are_counted_in_all_but_by_no_address() -> None:
    protocol = ConnectionCounter(ALL)
    counter = ListenerCounter(LISTENER, protocol)
    assert [counter.admit(each) for each in ("192.0.2.99", "192.0.2.99", "192.0.2.99", "192.0.2.99")] == [
        True, True, True, False,
    ]  # fmt: skip
    for _ in range(3):
        counter.leave("192.0.2.99")
    assert [protocol.admit("") for _ in range(6)] == [True] * 5 + [False]


def test_what_counts_for_another_address_is_moved_in_both_counts(
    workers: list[tuple[ConnectionCounter, ListenerCounter]],
) -> None:
    (protocol, one), (_, two) = workers
    assert [one.admit("192.0.2.1"), two.admit("192.0.2.2"), two.admit("192.0.2.2")] == [True, True, True]
    assert not one.move("192.0.2.1", "192.0.2.2")  # two of that already
    assert one.move("192.0.2.1", "192.0.2.3")  # though there are three in all
    assert one.move("192.0.2.3", "192.0.2.3")
    two.leave("192.0.2.2")
    assert [one.admit("192.0.2.3"), one.admit("192.0.2.3")] == [True, False]
    one.leave("192.0.2.3")
    one.leave("192.0.2.3")
    two.leave("192.0.2.2")
    assert protocol.total == 0
    assert [one.admit("192.0.2.9"), one.admit("192.0.2.9"), two.admit("192.0.2.8")] == [True, True, True]
