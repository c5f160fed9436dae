# SPDX-License-Identifier: MIT
"""A map that never holds more than it was told to: what was used least recently goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LruCache(Generic[K, V]):
    """At most `entries` pairs. Not for use by several threads. Every call is O(1) but `clear`."""

    def __init__(self, entries: int) -> None:
        if entries < 1:
            raise ValueError("a cache holds at least one entry")
        self.entries = entries
        self.evicted = 0
        self._kept: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        """The value, which becomes the most recently used; None where there is none."""
        value = self._kept.get(key)
        if value is not None:
            self._kept.move_to_end(key)
        return value

    def put(self, key: K, value: V) -> None:
        """Keep `value`, which may not be None; the least recently used one goes where it becomes too many."""
        self._kept[key] = value
        self._kept.move_to_end(key)
        if len(self._kept) > self.entries:
            self._kept.popitem(last=False)
            self.evicted += 1

    def drop(self, key: K) -> None:
        """Forget `key`; no error where it is not there."""
        self._kept.pop(key, None)

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)
