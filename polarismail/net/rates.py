# SPDX-License-Identifier: MIT
"""How often something has happened lately, counted by all workers together, in memory that never grows.

A count is kept for a window and the one before; of that one counts what a sliding window would still see, if its events came
evenly. Keys go by two keyed hashes into two rows of `SLOTS`, and the lesser of both counts: a key is counted too high only
where it shares both slots with busy ones, never too low, and nobody outside can choose whom to share one with.

Guarantees: exact over all workers but for what one does in the very moment in which a window ends. What a worker that died
has counted stays. Times are arguments, monotonic seconds that all workers share.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

SLOTS = 8192
_HALF = 2 * SLOTS
"""Two rows; the table has two halves, of even and odd windows."""
TABLE_OCTETS = 2 * _HALF * 4
_CLEAN = bytes(_HALF * 4)


class SharedRate:
    """Events of one kind in `window_seconds`, for each key. `tables` and `epochs` are those of all workers."""

    def __init__(
        self,
        tables: Sequence[memoryview],
        epochs: Sequence[memoryview],
        epoch_at: int,
        own: int,
        key: bytes,
        window_seconds: int,
    ) -> None:
        self._workers = list(zip(tables, epochs, strict=True))
        self._own, self._own_epochs, self._at = tables[own], epochs[own], epoch_at
        self._window = window_seconds
        self._slots = lru_cache(4096)(lambda name: _slots(name, key))

    def add(self, name: str, now: float) -> int:
        """It happened once more: how often in the window that ends now."""
        self.note(name, now)
        return self.count(name, now)

    def note(self, name: str, now: float) -> None:
        """It happened once more."""
        epoch = int(now // self._window)
        if self._own_epochs[self._at] != epoch:
            self._begin(epoch)
        base = (epoch & 1) * _HALF
        own = self._own
        for slot in self._slots(name):
            if own[base + slot] < 0xFFFFFFFF:
                own[base + slot] += 1

    def count(self, name: str, now: float) -> int:
        """How often it happened in the window that ends now."""
        epoch = int(now // self._window)
        left = 1.0 - (now / self._window - epoch)
        at, this, last = self._at, (epoch & 1) * _HALF, (~epoch & 1) * _HALF
        least = 0xFFFFFFFF
        for slot in self._slots(name):
            seen = before = 0
            for table, epochs in self._workers:
                age = epoch - epochs[at]
                if age == 0:
                    seen += table[this + slot]
                    before += table[last + slot]
                elif age == 1:
                    before += table[last + slot]
            least = min(least, seen + int(before * left))
        return least

    def reaches(self, limit: int, name: str, now: float) -> bool:
        """Whether it happened so often in the window that ends now. Nearly always one slot says no."""
        slot, total = self._slots(name)[0], 0
        for table, _ in self._workers:
            total += table[slot] + table[_HALF + slot]
        return total >= limit and self.count(name, now) >= limit

    def _begin(self, epoch: int) -> None:
        """A new window: what is older than the last is forgotten."""
        octets = self._own.cast("B")
        this, half = (epoch & 1) * _HALF * 4, _HALF * 4
        octets[this : this + half] = _CLEAN
        if self._own_epochs[self._at] != epoch - 1:
            octets[half - this : 2 * half - this] = _CLEAN
        self._own_epochs[self._at] = epoch


def _slots(name: str, key: bytes) -> tuple[int, int]:
    digest = int.from_bytes(blake2b(name.encode("utf-8", "replace"), key=key, digest_size=8).digest(), "big")
    return digest % SLOTS, SLOTS + (digest >> 32) % SLOTS
