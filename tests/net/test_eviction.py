# SPDX-License-Identifier: MIT
"""Who is put out: the slowest of the most crowded networks, never who is served; and a newcomer's look is bounded."""

from __future__ import annotations

from polarismail.net.eviction import Eviction, choose
from polarismail.net.limits import ConnectionCounter, ConnectionLimits


class Placed:
    def __init__(self, behind: float, network: str = "192.0.2.0/24") -> None:
        self.behind, self.network = behind, network
        self.words = b""

    def put_out(self, words: bytes) -> None:
        self.words = words


class House:
    busy = b"421 later"

    def __init__(self, *connections: Placed) -> None:
        self.connections = connections


def test_the_slowest_go_and_who_is_served_or_only_just_behind_stays() -> None:
    standing = [(5.0, "a", "slow"), (-1.0, "b", "served"), (0.5, "c", "brisk"), (9.0, "d", "slower")]
    assert choose(standing, 1) == ["slower"]
    assert choose(standing, 4) == ["slower", "slow"]
    assert choose(standing, 4, 6.0) == ["slower"]


def test_crowded_networks_go_first() -> None:
    standing = [(3.0, "alone", "alone"), *[(2.0, "crowd", f"one of {at}") for at in range(2)]]
    assert set(choose(standing, 2)) == {"one of 0", "one of 1"}


def test_room_is_made_for_a_twentieth_at_once() -> None:
    counter = ConnectionCounter(ConnectionLimits(total=40))
    slow = [Placed(10.0 + at) for at in range(38)]
    served = [Placed(-1.0), Placed(0.1)]
    counter.factories.append(House(*slow, *served))
    eviction = Eviction(counter, now=lambda: 0.0)
    assert eviction.make_room()
    assert [each.words for each in slow[-2:]] == [b"421 later"] * 2
    assert not any(each.words for each in [*slow[:-2], *served]) and eviction.put_out == 2


def test_a_look_in_vain_is_not_repeated_at_once() -> None:
    now = [0.0]
    counter = ConnectionCounter(ConnectionLimits(total=1))
    one = Placed(-1.0)
    counter.factories.append(House(one))
    eviction = Eviction(counter, now=lambda: now[0])
    assert not eviction.make_room()
    one.behind = 100.0
    assert not eviction.make_room()
    now[0] = 1.0
    assert eviction.make_room() and one.words


def test_a_full_counter_asks_for_room() -> None:
    counter = ConnectionCounter(ConnectionLimits(total=2))
    assert counter.admit("192.0.2.1") and counter.admit("192.0.2.2") and not counter.admit("192.0.2.3")
    assert counter.refused == {"total": 1}
    counter.make_room = lambda: True
    assert counter.admit("192.0.2.3") and counter.total == 3


def test_descriptors_may_allow_less() -> None:
    counter = ConnectionCounter(ConnectionLimits(total=10))
    counter.ceiling = 1
    assert counter.admit("192.0.2.1") and not counter.admit("192.0.2.2")
