# SPDX-License-Identifier: MIT
"""How many connections there may be: in all, from one client, and from the network around it.

Guarantees: exact over all workers. Where all places are taken a newcomer is not simply turned away: `make_room` is asked
first (net/eviction.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from attrs import frozen

from polarismail.net.shares import SharedCount
from polarismail.values.network import NetworkList, host_of, network_of


@frozen
class ConnectionLimits:
    """Bounds on concurrent connections (HOSTILE 0). 0 for `per_network`: none."""

    total: int = 10000
    per_address: int = 50  # for IPv6: for each /64
    per_network: int = 500  # for each /24, IPv6 /48; not for trusted networks


LOOPBACK = NetworkList(("127.0.0.0/8", "::1/128"))


class ConnectionCounter:
    """Counts concurrent connections; shared by the listeners of one protocol, and where `shared` is given by all workers."""

    def __init__(self, limits: ConnectionLimits, shared: SharedCount | None = None) -> None:
        self.limits = limits  # others may be put in its place at any time; what is open stays open
        self.ceiling: int | None = None  # what descriptors allow
        self.trusted = LOOPBACK
        self.full_of_memory = False  # no newcomer is taken (HOSTILE E4)
        self.may_connect: Callable[[str], str] = _may_connect  # "", or what of its rates is used up
        self.make_room: Callable[..., bool] = _no_room
        self.factories: list[Any] = []  # whose connections these are
        self.refused: Counter[str] = Counter()  # by what was reached: address, network, rate, failures, total, memory
        self.refused_last = ""
        self._shared = shared
        self._total = 0
        self._hosts: Counter[str] = Counter()
        self._networks: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Connections of this process that are open now."""
        return self._total

    @property
    def total_of_all(self) -> int:
        """The same over all workers."""
        return self._total if self._shared is None else self._shared.total

    @property
    def places(self) -> int:
        """How many there may be."""
        return self.limits.total if self.ceiling is None else min(self.limits.total, self.ceiling)

    def admit(self, address: str) -> bool:
        """Count one more connection from this address, unless a bound is reached. True asks for one `leave` later.

        "" is for who has none, or is not to be counted by it."""
        total, alike, near = self._add(address)
        reached = "memory" if self.full_of_memory else self._reached(address, alike, near)
        if not reached and total > self.places and not self.make_room():
            reached = "total"
        return self._is_taken(address, reached)

    def move(self, address: str, to: str) -> bool:
        """What was admitted from one address counts for another from now on; False, and nothing is changed, where that one
        has as many as it may."""
        if host_of(address) == host_of(to):
            return True
        _, alike, near = self._add(to)
        if not self._is_taken(to, self._reached(to, alike, near)):
            return False
        self.leave(address)
        return True

    def leave(self, address: str) -> None:
        """A connection that was admitted is gone."""
        host, network = host_of(address), network_of(address)
        self._total -= 1
        if self._shared is not None:
            self._shared.remove(host, network)
            return
        for counts, key in ((self._hosts, host), (self._networks, network)):
            counts[key] -= 1
            if not counts[key]:
                del counts[key]

    def _add(self, address: str) -> tuple[int, int, int]:
        """One more: how many there are in all, of this client, and of its network."""
        host, network = host_of(address), network_of(address)
        self._total += 1
        if self._shared is not None:
            return self._shared.add(host, network)
        self._hosts[host] += 1
        self._networks[network] += 1
        return self._total, self._hosts[host], self._networks[network]

    def _reached(self, address: str, alike: int, near: int) -> str:
        """What one client, or its network, has used up; "" where it has not."""
        limits = self.limits
        if alike > (limits.per_address if address else limits.total):  # who has no address is counted in all
            return "address"
        if address and 0 < limits.per_network < near and address not in self.trusted:
            return "network"
        return self.may_connect(address)

    def _is_taken(self, address: str, reached: str) -> bool:
        if reached:
            self.refused[reached] += 1
            self.refused_last = reached
            self.leave(address)
        return not reached


def _may_connect(address: str) -> str:
    return ""


def _no_room() -> bool:
    return False
