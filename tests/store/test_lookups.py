# SPDX-License-Identifier: MIT
"""Look-ups that share their work, and the bounded cache, on a clock of the test's own."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from polarismail.store.lookups import Lookups
from polarismail.store.lru import LruCache
from polarismail.values.errors import Unavailable


class Source:
    """A database whose reads the test answers."""

    def __init__(self) -> None:
        self.reads: list[tuple[list[str], Deferred[dict[str, Any]]]] = []

    def fetch(self, keys: Any) -> Deferred[dict[str, Any]]:
        read: Deferred[dict[str, Any]] = Deferred()
        self.reads.append((list(keys), read))
        return read

    def answer(self, at: int = -1) -> None:
        keys, read = self.reads[at]
        read.callback({key: key.upper() for key in keys})


def make(**kwargs: Any) -> tuple[Lookups[str, str], Source, Clock]:
    source, clock = Source(), Clock()
    return Lookups(source.fetch, clock, **kwargs), source, clock


def results(asked: list[Deferred[str]]) -> list[Any]:
    found: list[Any] = []
    for each in asked:
        each.addErrback(lambda failure: failure.type)
        found.append(each.result if each.called else None)
    return found


def test_one_read_answers_everybody() -> None:
    lookups, source, clock = make()
    asked = [lookups.ask(key) for key in "abcaab"]
    clock.advance(0)
    later = [lookups.ask(key) for key in "ad"]
    assert [keys for keys, _ in source.reads] == [["a", "b", "c"]]
    source.answer()
    assert results(asked) == list("ABCAAB")
    assert results(later) == ["A", None], "what was being read answers the newcomer too"
    clock.advance(0)
    source.answer()
    assert results(later) == ["A", "D"]
    clock.advance(100)
    assert len(source.reads) == 2


def test_after_a_change_a_running_read_answers_only_those_who_had_asked() -> None:
    lookups, source, clock = make()
    old = [lookups.ask("a")]
    clock.advance(0)
    lookups.forget_running()
    new = [lookups.ask("a")]
    source.answer()
    assert results(old) == ["A"] and results(new) == [None]
    clock.advance(0)
    source.answer()
    assert results(new) == ["A"]


def test_batches_and_waiting_are_bounded() -> None:
    lookups, source, clock = make(batch=3, waiting=5)
    asked = [lookups.ask(key) for key in "abcdefg"]
    assert results(asked)[5:] == [Unavailable, Unavailable] and lookups.refused == 2
    for _ in range(2):
        clock.advance(0)
        source.answer()
    assert [keys for keys, _ in source.reads] == [["a", "b", "c"], ["d", "e"]]
    assert results(asked)[:5] == list("ABCDE")


def test_a_failed_read_fails_its_own_and_the_next_goes_on() -> None:
    lookups, source, clock = make(batch=1)
    asked = [lookups.ask("a"), lookups.ask("b")]
    clock.advance(0)
    source.reads[0][1].errback(Unavailable("down"))
    clock.advance(0)
    source.answer()
    assert results(asked) == [Unavailable, "B"]


def test_a_value_that_is_an_exception_fails_its_key_alone() -> None:
    lookups, source, clock = make()
    asked = [lookups.ask("a"), lookups.ask("b")]
    clock.advance(0)
    source.reads[0][1].callback({"a": Unavailable("too many"), "b": "B"})
    assert results(asked) == [Unavailable, "B"]


def test_a_silent_database_answers_nobody_for_ever() -> None:
    lookups, source, clock = make(batch=1, answer_seconds=10)
    asked = [lookups.ask("a"), lookups.ask("b")]
    clock.advance(0)
    clock.advance(10)
    assert results(asked) == [Unavailable, Unavailable]
    again = [lookups.ask("c")]
    clock.advance(0)
    source.answer()
    assert results(again) == ["C"]
    source.answer(0)  # too late: nobody listens
    clock.advance(100)
    assert len(source.reads) == 2


def test_questions_asked_by_answers() -> None:
    lookups, source, clock = make()
    seen: list[Any] = []
    lookups.ask("a").addCallback(lambda _: lookups.ask("a").addCallback(seen.append))
    for _ in range(2):
        clock.advance(0)
        source.answer()
    assert seen == ["A"]


@given(st.integers(1, 5), st.lists(st.tuples(st.sampled_from(["put", "get", "drop"]), st.integers(0, 9))))
def test_the_cache_is_a_bounded_map_in_order_of_use(size: int, steps: list[tuple[str, int]]) -> None:
    cache: LruCache[int, str] = LruCache(size)
    model: dict[int, str] = {}  # in order of use
    for step, key in steps:
        if step == "put":
            model.pop(key, None)
            model[key] = str(key)
            if len(model) > size:
                del model[next(iter(model))]
            cache.put(key, str(key))
        elif step == "drop":
            model.pop(key, None)
            cache.drop(key)
        else:
            assert cache.get(key) == model.get(key)
            if key in model:
                model[key] = model.pop(key)
        assert len(cache) == len(model)
    cache.clear()
    assert len(cache) == 0


def test_a_cache_holds_something() -> None:
    with pytest.raises(ValueError):
        LruCache(0)
