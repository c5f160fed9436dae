# SPDX-License-Identifier: MIT
"""Which worker works for which pair of egress source and site: exactly one that lives, the same for whoever asks.

Rendezvous hashing: each worker's score for a pair is a hash of both, and the highest wins; so a worker that goes takes only
its own pairs with it, and gets the same ones back when it returns. Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

_REMEMBERED = 20_000


def pair_of(egress_source: str, site: str) -> str:
    """The name of a pair. Without virtual MTAs everything leaves from one source, ""."""
    return f"{egress_source} {site}"


def owner_of(pair: str, members: Iterable[int]) -> int:
    """The member that owns the pair. Raises ValueError where there is none."""
    return max(members, key=lambda number: (blake2b(b"%d " % number + pair.encode(), digest_size=8).digest(), number))


class Ownership:
    """Who owns what among the members of now. `version` goes up with each change of them; 0: nobody has said yet."""

    def __init__(self, own: int) -> None:
        self.own, self.version = own, 0
        self.members: frozenset[int] = frozenset()
        self._owners: dict[str, int] = {}

    def change(self, version: int, members: Iterable[int]) -> None:
        """Other members. An older word than the last is ignored."""
        if version > self.version:
            self.version, self.members = version, frozenset(members)
            self._owners.clear()

    def owner(self, pair: str) -> int | None:
        """The number of the owner; None while the members are not known, or where we are not among them yet."""
        if self.own not in self.members:
            return None
        known = self._owners.get(pair)
        if known is None:
            if len(self._owners) >= _REMEMBERED:
                self._owners.clear()
            known = self._owners[pair] = owner_of(pair, self.members)
        return known
