# SPDX-License-Identifier: MIT
"""How many connections there may be: in all, and from one client network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from attrs import frozen

from polarismail.values.network import client_network


@frozen
class ConnectionLimits:
    """Bounds on concurrent connections (NUMBERS, inbound defaults)."""

    total: int = 2000
    per_address: int = 50  # for IPv6: for each /64


class ConnectionCounter:
    """Counts concurrent connections; shared by the listeners of one protocol."""

    def __init__(
        self,
        limits: ConnectionLimits,
        *,
        workers: int = 1,
        total: Callable[[], int] | None = None,
        changed: Callable[[int], None] | None = None,
    ) -> None:
        """Where `workers` share the clients, each takes its part of a client network's connections, and `total()` says how
        many it may have in all. `changed` hears of each that comes (1) or goes (-1)."""
        self.limits = limits  # others may be put in its place at any time; what is open stays open
        self._workers, self._changed = workers, changed
        self._total_limit = total or (lambda: self.limits.total)
        self._total = 0
        self._by_network: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Connections open now."""
        return self._total

    def admit(self, address: str) -> bool:
        """Count one more connection from this address, unless a bound is reached. True asks for one `leave` later."""
        network = client_network(address, 32, 64)
        per_address = max(1, self.limits.per_address // self._workers)
        if self._by_network[network] >= per_address or self._total >= self._total_limit():
            return False
        self._total += 1
        self._by_network[network] += 1
        if self._changed is not None:
            self._changed(1)
        return True

    def leave(self, address: str) -> None:
        """A connection that was admitted is gone."""
        network = client_network(address, 32, 64)
        self._total -= 1
        self._by_network[network] -= 1
        if not self._by_network[network]:
            del self._by_network[network]
        if self._changed is not None:
            self._changed(-1)
