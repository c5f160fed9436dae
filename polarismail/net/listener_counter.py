# SPDX-License-Identifier: MIT
"""Counts the connections of one listener within its own limits, beside those of its protocol.

Guarantees: what was admitted leaves both counts once; with several workers the limits hold over all of them; what a proxy
does for itself (health checks) is not counted by its address.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from polarismail.net.limits import ConnectionCounter
from polarismail.net.listeners import Listener, is_in
from polarismail.net.shares import SharedCount
from polarismail.values.network import host_of


class ListenerCounter:
    """What a factory asks (`admit`, `move`, `leave`) where a listener has limits or proxies of its own."""

    def __init__(self, listener: Listener, protocol: ConnectionCounter, shared: SharedCount | None = None) -> None:
        self._listener, self._protocol, self._shared = listener, protocol, shared
        self._counts: Counter[str] = Counter()
        self.refused_last = ""

    @property
    def factories(self) -> list[Any]:
        """See ConnectionCounter."""
        return self._protocol.factories

    def admit(self, address: str) -> bool:
        """See ConnectionCounter."""
        address = self._counted(address)
        admitted: list[str] = []
        for key, limit in self._keys(address):
            admitted.append(key)
            if self._add(key) > limit:
                self.refused_last = "listener"
                break
        else:
            if self._protocol.admit(address):
                return True
            self.refused_last = self._protocol.refused_last
        for key in admitted:
            self._remove(key)
        return False

    def move(self, address: str, to: str) -> bool:
        """See ConnectionCounter."""
        address, to = self._counted(address), self._counted(to)
        before = {key for key, _ in self._keys(address)}
        after = {key: limit for key, limit in self._keys(to) if key not in before}
        added: list[str] = []
        for key, limit in after.items():
            added.append(key)
            if self._add(key) > limit:
                break
        else:
            if self._protocol.move(address, to):
                for key in before - {key for key, _ in self._keys(to)}:
                    self._remove(key)
                return True
        for key in added:
            self._remove(key)
        return False

    def leave(self, address: str) -> None:
        """See ConnectionCounter."""
        address = self._counted(address)
        for key, _ in self._keys(address):
            self._remove(key)
        self._protocol.leave(address)

    def _counted(self, address: str) -> str:
        return "" if is_in(address, self._listener.proxy_networks) else address

    def _keys(self, address: str) -> list[tuple[str, int]]:
        limits, name = self._listener.limits, self._listener.name
        keys = []
        if limits.connections is not None:
            keys.append((name, limits.connections))
        if limits.connections_per_address is not None and address:
            keys.append((f"{name} {host_of(address)}", limits.connections_per_address))
        return keys

    def _add(self, key: str) -> int:
        if self._shared is not None:
            return self._shared.add_beside(key)
        self._counts[key] += 1
        return self._counts[key]

    def _remove(self, key: str) -> None:
        if self._shared is not None:
            self._shared.remove_beside(key)
            return
        self._counts[key] -= 1
        if not self._counts[key]:
            del self._counts[key]
