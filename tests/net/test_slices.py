# SPDX-License-Identifier: MIT
"""Slices of one limit: whatever workers ask for, give back, and die with, their sum stays within it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from polarismail.net.slices import Slice, Slices

STEPS = st.lists(st.tuples(st.integers(0, 3), st.one_of(st.none(), st.integers(0, 60))), max_size=40)


@given(STEPS)
def test_the_sum_never_passes_the_limit(steps: list[tuple[int, int | None]]) -> None:
    """None: the worker dies, and comes back with its first slice."""
    book = Slices({"relay": 50}, 4)
    held = {number: book.first(number)["relay"] for number in range(4)}
    for number, wanted in steps:
        if wanted is None:
            book.forget(number)
            held[number] = 0
            held[number] = book.first(number)["relay"]
        else:
            held[number] = book.want(number, "relay", wanted)
            assert held[number] <= wanted
        assert sum(held.values()) <= 50


def test_a_worker_asks_before_it_runs_out_and_gives_back_what_is_idle() -> None:
    book = Slices({"relay": 100}, 2)
    used, grown = 0, []
    mine = Slice(book.first(0)["relay"], lambda: used, lambda wanted: None)
    asked: list[int] = []
    mine._want = asked.append
    mine.when_more(lambda: grown.append(mine.limit))
    assert mine.limit == 25
    mine.look()
    assert asked == [4] and mine.limit == 4  # idle: it is lowered before anybody else may hold it
    mine.grant(book.want(0, "relay", asked.pop()))
    used = 3
    mine.look(1)
    mine.look(1)  # one question at a time
    assert asked == [8]
    mine.grant(book.want(0, "relay", asked.pop()))
    assert mine.limit == 8 and grown == [8]


def test_a_lower_limit_is_reached_as_slices_are_asked_for_again() -> None:
    book = Slices({"relay": 100}, 2)
    assert book.want(0, "relay", 60) == 60
    book.change_limits({"relay": 40})
    assert book.want(1, "relay", 30) == 0
    assert book.want(0, "relay", 60) == 40
