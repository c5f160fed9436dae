# SPDX-License-Identifier: MIT
"""What the collector holds back after `settle` is bounded."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from polarismail import memory


class Cycle:
    """Refers to itself, as a connection and its session do."""

    def __init__(self) -> None:
        self.other = self


@pytest.fixture
def settled() -> Iterator[None]:
    before = gc.get_threshold()
    memory.settle()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


@pytest.mark.usefixtures("settled")
def test_dead_cycles_go_by_themselves() -> None:
    alive: weakref.WeakSet[Cycle] = weakref.WeakSet()
    most = 0
    for _ in range(60_000):
        alive.add(Cycle())
        most = max(most, len(alive))
    assert most <= 12_000


@pytest.mark.usefixtures("settled")
def test_what_lives_at_the_start_is_not_looked_at() -> None:
    assert gc.get_freeze_count() > 1000
    memory.settle()
    assert gc.isenabled()
