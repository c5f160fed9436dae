# SPDX-License-Identifier: MIT
"""The histogram's percentiles are never too low and at most a quarter too high; the committer counts what it commits."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, gatherResults

from polarismail.store.commit_statistics import Histogram
from tests.databases import open_database
from tests.reactor import run


@given(st.lists(st.integers(0, 1 << 29), min_size=1), st.floats(0.01, 1.0))
def test_a_percentile_is_close_to_the_true_one(values: list[int], part: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    true = next(v for at, v in enumerate(sorted(values), 1) if at >= part * len(values))
    assert true <= histogram.percentile(part) <= true * 1.25
    assert histogram.largest == max(values) and histogram.count == len(values) and histogram.total == sum(values)


def test_nothing_counted_is_zero_and_what_is_out_of_range_is_kept() -> None:
    histogram = Histogram()
    assert histogram.percentile(0.99) == histogram.largest == 0
    histogram.record(-5)
    assert histogram.percentile(1.0) == 0
    histogram.record(1 << 50, times=3)
    assert histogram.percentile(0.99) == histogram.largest == 1 << 50


def test_the_committer_counts_groups_jobs_and_waits(tmp_path: Path) -> None:
    def many() -> Deferred[list[None]]:
        return gatherResults([database.write(lambda connection: None) for _ in range(50)])

    with open_database("sqlite", tmp_path) as database:
        before = database.statistics()["jobs"].get("other", 0)
        run(many)
        # The waits of a group are counted after it is answered, and before the next one begins.
        run(database.write, lambda connection: None)
        found = database.statistics()
        assert found["jobs"]["other"] - before == 51
        assert 1 <= found["groups"] <= 60 and 1 <= found["group_jobs"]["max"] <= 50
        for name in ("lock_wait_seconds", "commit_seconds", "answer_seconds"):
            assert 0 <= found[name]["p50"] <= found[name]["p99"] <= found[name]["max"] < 20, name
        assert found["answer_seconds"]["max"] > 0 and found["commit_seconds"]["max"] > 0
    assert database.statistics() == {}
