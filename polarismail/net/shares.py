# SPDX-License-Identifier: MIT
"""How many sessions each worker of a server has, in memory that all of them see: a look costs no message and no call.

Each worker writes its own cells and reads all; the supervisor clears those of a worker that died. A value may be a
moment old, which balances just as well.
"""

from __future__ import annotations

import mmap
import os
import time

_CELLS = 2  # of 64 bits for each worker: sessions; the monotonic millisecond of its last sign of life
_SLACK = 1


def make_memory(workers: int) -> int:
    """Memory for so many workers; returns its descriptor, for them to inherit."""
    descriptor = os.memfd_create("polarismail-shares", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, workers * _CELLS * 8)
    return descriptor


class Shares:
    """One worker's view: `own` is its number, from 0; the supervisor's has none (-1) and writes nothing but `clear`."""

    def __init__(self, descriptor: int, workers: int, own: int = -1) -> None:
        self._memory = mmap.mmap(descriptor, workers * _CELLS * 8)
        self._cells = memoryview(self._memory).cast("q")
        self._workers, self._at = workers, own * _CELLS

    def count(self, change: int) -> None:
        """So many sessions more."""
        self._cells[self._at] += change

    def sessions(self) -> list[int]:
        """Of each worker."""
        return list(self._cells[::_CELLS])

    def has_more_than_its_share(self) -> bool:
        """Whether the next client should be another worker's: those who live share the sessions evenly, give or take one."""
        cells = self._cells
        mine = cells[self._at]
        if mine <= _SLACK:
            return False
        everybody = living = 0
        for at in range(0, self._workers * _CELLS, _CELLS):
            if cells[at + 1]:
                living += 1
                everybody += cells[at]
        return mine >= (everybody + living) // max(1, living) + _SLACK

    def beat(self) -> None:
        """A sign of life."""
        self._cells[self._at + 1] = int(time.monotonic() * 1000)

    def silent_seconds(self, worker: int) -> float:
        """Since the last sign of life of a worker; 0 where it gave none yet."""
        last = self._cells[worker * _CELLS + 1]
        return max(0.0, time.monotonic() - last / 1000) if last else 0.0

    def clear(self, worker: int) -> None:
        """It is gone, and its sessions with it."""
        self._cells[worker * _CELLS] = self._cells[worker * _CELLS + 1] = 0
