# SPDX-License-Identifier: MIT
"""How many connections there may be: in all, and from one client network."""

from __future__ import annotations

from collections import Counter

from attrs import frozen

from polarismail.net.shares import SharedCount
from polarismail.values.network import client_network


@frozen
class ConnectionLimits:
    """Bounds on concurrent connections (NUMBERS, inbound defaults)."""

    total: int = 2000
    per_address: int = 50  # for IPv6: for each /64


class ConnectionCounter:
    """Counts concurrent connections; shared by the listeners of one protocol, and where `shared` is given by all workers."""

    def __init__(self, limits: ConnectionLimits, shared: SharedCount | None = None) -> None:
        self.limits = limits  # others may be put in its place at any time; what is open stays open
        self._shared = shared
        self._total = 0
        self._by_network: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Connections of this process that are open now."""
        return self._total

    def admit(self, address: str) -> bool:
        """Count one more connection from this address, unless a bound is reached. True asks for one `leave` later.

        "" is for who has none, or is not to be counted by it."""
        network = client_network(address, 32, 64)
        limits = self.limits
        bound = limits.per_address if address else limits.total  # who has no address is counted in all
        if self._shared is not None:
            total, alike = self._shared.add(network)
            if total > limits.total or alike > bound:
                self._shared.remove(network)
                return False
        elif self._total >= limits.total or self._by_network[network] >= bound:
            return False
        else:
            self._by_network[network] += 1
        self._total += 1
        return True

    def move(self, address: str, to: str) -> bool:
        """What was admitted from one address counts for another from now on; False, and nothing is changed, where that one
        has as many as it may."""
        network, target = client_network(address, 32, 64), client_network(to, 32, 64)
        if network == target:
            return True
        bound = self.limits.per_address if to else self.limits.total
        if self._shared is not None:
            if self._shared.add(target)[1] > bound:
                self._shared.remove(target)
                return False
            self._shared.remove(network)
            return True
        if self._by_network[target] >= bound:
            return False
        self._by_network[target] += 1
        self._by_network[network] -= 1
        if not self._by_network[network]:
            del self._by_network[network]
        return True

    def leave(self, address: str) -> None:
        """A connection that was admitted is gone."""
        network = client_network(address, 32, 64)
        self._total -= 1
        if self._shared is not None:
            self._shared.remove(network)
            return
        self._by_network[network] -= 1
        if not self._by_network[network]:
            del self._by_network[network]
