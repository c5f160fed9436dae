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

from polarismail.net.rates import TABLE_OCTETS, SharedRate

SLOTS = 16384
PROTOCOLS = ("smtp", "pop3")
_SESSIONS, _BEAT, _FIRST_TOTAL = 0, 1, 2
_CELLS = 8
_KEY_OCTETS = 16
_PAGE = 4096
_TABLE = SLOTS * 2
_TABLES = 2  # of each protocol: clients, and the networks around them
_COUNTS_OCTETS = _PAGE + len(PROTOCOLS) * _TABLES * _TABLE
RATES = {
    f"{kind}.{scope}": seconds
    for kind, seconds in {
        "connections": 60,
        "transactions": 60,
        "recipients": 60,
        "failures": 3600,
        "unknown": 86400,
        "logins": 86400,
    }.items()
    for scope in ("host", "network")
} | {"logins.name": 86400}
"""What is counted in time, and in how many seconds."""
_EPOCHS = 64  # where in the worker's page those of the rates are; what a dead worker counted in time is kept
_WORKER_OCTETS = _COUNTS_OCTETS + len(RATES) * TABLE_OCTETS
_SLACK = 1


def alone() -> Shares:
    """For a process that shares with nobody."""
    descriptor = make_memory(1)
    try:
        return Shares(descriptor, 1, 0)
    finally:
        os.close(descriptor)


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
        kinds: list[list[memoryview]] = [[], []]
        for number in range(self._workers):
            start = _PAGE + number * _WORKER_OCTETS + _PAGE + at * _TABLES * _TABLE
            for kind in kinds:
                kind.append(self._memory[start : start + _TABLE].cast("H"))
                start += _TABLE
        return SharedCount(self._cells, kinds[0], kinds[1], self._own, _FIRST_TOTAL + at, self.key)

    def rate(self, name: str) -> SharedRate:
        """One of `RATES`. Raises ValueError for another."""
        at = list(RATES).index(name)
        starts = [_PAGE + number * _WORKER_OCTETS for number in range(self._workers)]
        tables = [
            self._memory[start + _COUNTS_OCTETS + at * TABLE_OCTETS :][:TABLE_OCTETS].cast("I") for start in starts
        ]
        epochs = [self._memory[start + _EPOCHS * 8 : start + _PAGE].cast("q") for start in starts]
        return SharedRate(tables, epochs, at, self._own, self.key, RATES[name])

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
        self._memory[start : start + _EPOCHS * 8] = bytes(_EPOCHS * 8)
        self._memory[start + _PAGE : start + _COUNTS_OCTETS] = bytes(_COUNTS_OCTETS - _PAGE)


class SharedCount:
    """Connections of one protocol, over all workers: in all, of each client, and of each network around them."""

    def __init__(
        self,
        cells: list[memoryview],
        hosts: list[memoryview],
        networks: list[memoryview],
        own: int,
        total_at: int,
        key: bytes,
    ) -> None:
        self._cells, self._hosts, self._networks, self._at = cells, hosts, networks, total_at
        self._own_cells, self._own_hosts, self._own_networks = cells[own], hosts[own], networks[own]
        self._slot = lru_cache(4096)(lambda network: _slot(network, key))

    def add(self, host: str, network: str) -> tuple[int, int, int]:
        """One more of ours: how many there are now in all, of this client, and of its network. `remove` takes it back."""
        cells = self._own_cells
        cells[_SESSIONS] += 1
        cells[self._at] += 1
        return (
            self.total,
            _add(self._own_hosts, self._hosts, self._slot(host)),
            _add(self._own_networks, self._networks, self._slot(network)),
        )

    def remove(self, host: str, network: str) -> None:
        """One of ours is gone."""
        cells = self._own_cells
        cells[_SESSIONS] -= 1
        cells[self._at] -= 1
        for table, slot in ((self._own_hosts, self._slot(host)), (self._own_networks, self._slot(network))):
            if table[slot]:
                table[slot] -= 1

    def add_beside(self, key: str) -> int:
        """Count something beside the connections, in the same table; how many there are now. `remove_beside` takes it back."""
        return _add(self._own_hosts, self._hosts, self._slot(key))

    def remove_beside(self, key: str) -> None:
        """One of ours is gone."""
        slot, table = self._slot(key), self._own_hosts
        if table[slot]:
            table[slot] -= 1

    @property
    def total(self) -> int:
        """Over all workers."""
        at = self._at
        return sum([each[at] for each in self._cells])


def _add(own: memoryview, tables: list[memoryview], slot: int) -> int:
    if own[slot] == 0xFFFF:
        return 0xFFFF  # far beyond every limit; `remove` may then count it low, once this flood is over
    own[slot] += 1
    return sum([each[slot] for each in tables])


def _slot(network: str, key: bytes) -> int:
    return int.from_bytes(blake2b(network.encode(), key=key, digest_size=4).digest(), "big") % SLOTS
