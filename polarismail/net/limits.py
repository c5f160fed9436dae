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
from polarismail.values.network import NetworkList, client_network


@frozen
class ConnectionLimits:
    """Bounds on concurrent connections (HOSTILE 0). 0 for `per_network`: none."""

    total: int = 10000
    per_address: int = 50  # for IPv6: for each /64
    per_network: int = 500  # for each /24, IPv6 /48; not for trusted networks


def host_of(address: str) -> str:
    """What counts as one client: an IPv4 address, an IPv6 /64."""
    if ":" not in address:
        return address  # at a thousand new clients a second, parsing would cost a hundredth of a core
    return client_network(address, 32, 64).removesuffix("/32")


def network_of(address: str) -> str:
    """The network around it: IPv4 /24, IPv6 /48."""
    if ":" not in address:
        front = address.rpartition(".")[0]
        return f"{front}.0/24" if front else address
    return client_network(address, 24, 48)


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
        host, network = host_of(address), network_of(address)
        limits = self.limits
        if self._shared is not None:
            total, alike, near = self._shared.add(host, network)
        else:
            self._hosts[host] += 1
            self._networks[network] += 1
            total, alike, near = self._total + 1, self._hosts[host], self._networks[network]
        self._total += 1
        reached = ""
        bound = limits.per_address if address else limits.total  # who has no address is counted in all
        if self.full_of_memory:
            reached = "memory"
        elif alike > bound:
            reached = "address"
        elif address and 0 < limits.per_network < near and address not in self.trusted:
            reached = "network"
        elif used_up := self.may_connect(address):
            reached = used_up
        elif total > self.places and not self.make_room():
            reached = "total"
        if reached:
            self.refused[reached] += 1
            self.refused_last = reached
            self.leave(address)
        return not reached

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


def _may_connect(address: str) -> str:
    return ""


def _no_room() -> bool:
    return False
