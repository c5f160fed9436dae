# SPDX-License-Identifier: MIT
"""How often a client may begin TLS: a handshake costs us a signature and the client nothing.

Guarantees: a bounded memory, whoever comes; the limit is for each listener of each process, for a whole minute at a time.
How many handshakes run at once needs no bound of its own: each is a connection, which is counted, and has a deadline.
"""

from __future__ import annotations

from polarismail.values.network import host_of

_SECONDS = 60.0
_MAX_NETWORKS = 20_000


class HandshakeCounter:
    """Counts what `admit` lets through; begins anew with each minute, and when it knows too many networks."""

    def __init__(self) -> None:
        self._ends = 0.0
        self._by_network: dict[str, int] = {}

    def admit(self, address: str, per_minute: int, now: float) -> bool:
        """Whether this client (IPv6: its /64) may begin one more handshake. 0: always. `now` is monotonic."""
        if not per_minute:
            return True
        if now >= self._ends or len(self._by_network) >= _MAX_NETWORKS:
            self._ends = now + _SECONDS
            self._by_network.clear()
        network = host_of(address)
        begun = self._by_network.get(network, 0) + 1
        if begun > per_minute:
            return False
        self._by_network[network] = begun
        return True
