# SPDX-License-Identifier: MIT
"""Counting in time: a window that slides, over all workers, and never too low."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polarismail.net.shares import RATES, Shares, alone, make_memory

MINUTE, DAY = "transactions.host", "unknown.host"


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = make_memory(2)
    yield descriptor
    os.close(descriptor)


def test_workers_count_together_and_what_a_dead_one_counted_stays(memory: int) -> None:
    one, two = (Shares(memory, 2, own).rate(MINUTE) for own in range(2))
    assert [one.add("a", 100.0), two.add("a", 101.0), one.add("a", 102.0), one.add("b", 102.0)] == [1, 2, 3, 1]
    Shares(memory, 2).clear(0)
    assert two.count("a", 103.0) == 3
    assert Shares(memory, 2, 0).rate(MINUTE).add("a", 104.0) == 4


def test_the_window_slides() -> None:
    rate = alone().rate(MINUTE)
    for _ in range(10):
        rate.add("a", 60.0)
    assert [rate.count("a", now) for now in (119.0, 120.0, 150.0, 179.0, 180.0)] == [10, 10, 5, 0, 0]
    rate.add("a", 150.0)
    assert rate.count("a", 150.0) == 6
    assert rate.add("a", 10_000.0) == 1  # after a long silence nothing of old is left
    assert rate.count("a", 10_015.0) == 1


def test_a_worker_that_has_been_silent_adds_nothing_of_old(memory: int) -> None:
    one, two = (Shares(memory, 2, own).rate(MINUTE) for own in range(2))
    one.add("a", 60.0)
    assert two.count("a", 120.0) == 1
    assert two.add("a", 240.0) == 1
    assert one.add("a", 300.0) == 2


@given(
    st.lists(st.tuples(st.integers(0, 20), st.floats(0, 50)), max_size=60),
)
def test_never_below_what_the_present_window_has_seen(steps: list[tuple[int, float]]) -> None:
    rate, now, seen = alone().rate(MINUTE), 0.0, {}
    for key, pause in steps:
        now += pause
        count = rate.add(str(key), now)
        seen.setdefault(key, []).append(now)
        assert count >= sum(int(when // 60) == int(now // 60) for when in seen[key])
        assert count <= sum(int(when // 60) >= int(now // 60) - 1 for when in seen[key]) or len(seen) > 1


def test_strangers_do_not_fill_the_counts_of_others() -> None:
    """Both slots of a key would have to be busy ones."""
    rate = alone().rate(DAY)
    for at in range(4000):
        rate.add(f"10.{at // 250}.{at % 250}.1", 0.0)
    counts = [rate.count(f"192.0.2.{at}", 0.0) for at in range(250)]
    assert sum(counts) < 100 and max(counts) <= 3


def test_each_kind_is_counted_apart() -> None:
    shares = alone()
    for name in RATES:
        assert shares.rate(name).add("a", 5.0) == 1
    with pytest.raises(ValueError, match="not in list"):
        shares.rate("smiles.host")
