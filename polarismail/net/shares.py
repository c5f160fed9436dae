# SPDX-License-Identifier: MIT
"""What the workers of one server count together, in memory that all of them see: a look costs no message and no call.

Each worker writes its own cells and reads everybody's; the supervisor clears those of a worker that died. Who counts one
more adds it first and looks at the sum after, so that two who do so at once may both refuse, and never both go over.

Client networks are counted by a keyed hash in tables of `SLOTS`: two networks that share a slot are counted together, which
refuses too early and never too late, and nobody outside can choose whom to share one with.
"""

from __future__ import annotations

import mmap
import os
import time
from functools import lru_cache
from hashlib import blake2b

SLOTS = 16384
PROTOCOLS = ("smtp", "pop3")
_SESSIONS, _BEAT, _FIRST_TOTAL = 0, 1, 2
_CELLS = 8
_KEY_OCTETS = 16
_PAGE = 4096
_WORKER_OCTETS = _PAGE + len(PROTOCOLS) * SLOTS * 2
_SLACK = 1


def make_memory(workers: int) -> int:
    """Memory for so many workers; returns its descriptor, for them to inherit."""
    descriptor = os.memfd_create("polarismail-shares", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, _PAGE + workers * _WORKER_OCTETS)
    os.pwrite(descriptor, os.urandom(_KEY_OCTETS), 0)
    return descriptor


class Shares:
    """One worker's view: `own` is its number, from 0; the supervisor's has none (-1) and writes nothing but `clear`."""

    def __init__(self, descriptor: int, workers: int, own: int = -1) -> None:
        self._memory = memoryview(mmap.mmap(descriptor, _PAGE + workers * _WORKER_OCTETS))
        self._workers, self._own = workers, own
        self.key = bytes(self._memory[:_KEY_OCTETS])
        starts = [_PAGE + number * _WORKER_OCTETS for number in range(workers)]
        self._cells = [self._memory[start : start + _CELLS * 8].cast("q") for start in starts]

    def sessions(self) -> list[int]:
        """Of each worker."""
        return [cells[_SESSIONS] for cells in self._cells]

    def counting(self, protocol: str) -> SharedCount:
        """The count of one protocol's connections. Raises ValueError for one that is not counted."""
        at = PROTOCOLS.index(protocol)
        tables = []
        for number in range(self._workers):
            start = _PAGE + number * _WORKER_OCTETS + _PAGE + at * SLOTS * 2
            tables.append(self._memory[start : start + SLOTS * 2].cast("H"))
        return SharedCount(self._cells, tables, self._own, _FIRST_TOTAL + at, self.key)

    def has_more_than_its_share(self) -> bool:
        """Whether the next client should be another worker's: those who live share the sessions evenly, give or take one."""
        mine = self._cells[self._own][_SESSIONS]
        if mine <= _SLACK:
            return False
        living = [cells[_SESSIONS] for cells in self._cells if cells[_BEAT]]
        return mine >= (sum(living) + len(living)) // max(1, len(living)) + _SLACK

    def beat(self) -> None:
        """A sign of life."""
        self._cells[self._own][_BEAT] = int(time.monotonic() * 1000)

    def silent_seconds(self, worker: int) -> float:
        """Since the last sign of life of a worker; 0 where it gave none yet."""
        last = self._cells[worker][_BEAT]
        return max(0.0, time.monotonic() - last / 1000) if last else 0.0

    def clear(self, worker: int) -> None:
        """It is gone, and its connections with it."""
        start = _PAGE + worker * _WORKER_OCTETS
        self._memory[start : start + _WORKER_OCTETS] = bytes(_WORKER_OCTETS)


class SharedCount:
    """Connections of one protocol, over all workers: in all, and of each client network."""

    def __init__(self, cells: list[memoryview], tables: list[memoryview], own: int, total_at: int, key: bytes) -> None:
        self._cells, self._tables, self._at = cells, tables, total_at
        self._own_cells, self._own_table = cells[own], tables[own]
        self._slot = lru_cache(4096)(lambda network: _slot(network, key))

    def add(self, network: str) -> tuple[int, int]:
        """One more of ours: how many there are now in all, and from this network. `remove` takes it back."""
        slot = self._slot(network)
        cells, table = self._own_cells, self._own_table
        cells[_SESSIONS] += 1
        cells[self._at] += 1
        if table[slot] == 0xFFFF:
            return self.total, 0xFFFF  # far beyond every limit; `remove` may then count it low, once this flood is over
        table[slot] += 1
        return self.total, sum([each[slot] for each in self._tables])

    def remove(self, network: str) -> None:
        """One of ours is gone."""
        slot = self._slot(network)
        cells, table = self._own_cells, self._own_table
        cells[_SESSIONS] -= 1
        cells[self._at] -= 1
        if table[slot]:
            table[slot] -= 1

    def add_beside(self, key: str) -> int:
        """Count something beside the connections, in the same table; how many there are now. `remove_beside` takes it back."""
        slot, table = self._slot(key), self._own_table
        if table[slot] == 0xFFFF:
            return 0xFFFF
        table[slot] += 1
        return sum([each[slot] for each in self._tables])

    def remove_beside(self, key: str) -> None:
        """One of ours is gone."""
        slot, table = self._slot(key), self._own_table
        if table[slot]:
            table[slot] -= 1

    @property
    def total(self) -> int:
        """Over all workers."""
        at = self._at
        return sum([each[at] for each in self._cells])


def _slot(network: str, key: bytes) -> int:
    return int.from_bytes(blake2b(network.encode(), key=key, digest_size=4).digest(), "big") % SLOTS
