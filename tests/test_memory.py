# SPDX-License-Identifier: MIT
"""What the collector holds back after `settle` is bounded."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
from twisted.internet.task import Clock

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


def test_a_crowd_that_has_gone_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    sessions = 0
    monkeypatch.setattr(memory, "give_back", lambda: given.append(sessions))
    clock = Clock()
    relief = memory.Relief(clock, lambda: sessions)
    relief.start()
    for count in (900, 10, 4000, 1100, 5000, 1300, 1200, 40, 30, 0, 900, 100, 1000, 240):
        sessions = count
        clock.advance(5)
    assert given == [1200, 40, 240]  # nine hundred are no crowd, nor are those that the last relief left
    relief.stop()
    assert not clock.getDelayedCalls()


def test_what_is_dead_is_collected_and_given_back() -> None:
    gc.disable()
    try:
        alive: weakref.WeakSet[Cycle] = weakref.WeakSet([Cycle() for _ in range(10)])
        assert alive
        memory.give_back()
        assert not alive
    finally:
        gc.enable()
