# SPDX-License-Identifier: MIT
"""What commits cost those who wait for them, since the start: counted in a fixed number of numbers, however long it runs.

Recorded by one thread, the committer's; `summary` may be called from any other and sees each count as it was at some moment.
"""

from __future__ import annotations

from typing import Any

_PARTS_BITS = 2  # four buckets for each doubling: a percentile is at most a quarter too high, and never too low
_PARTS = 1 << _PARTS_BITS
_LARGEST_BIT = 30  # above a thousand seconds, or a thousand million, all is one bucket


class Histogram:
    """Whole numbers from 0 on, in buckets that grow with what is in them."""

    __slots__ = ("_buckets", "count", "largest", "total")

    def __init__(self) -> None:
        self._buckets = [0] * (_PARTS * (_LARGEST_BIT - _PARTS_BITS + 2))
        self.count = self.total = self.largest = 0

    def record(self, value: int, times: int = 1) -> None:
        """Count a value, `times` times. A negative one, which only a broken clock makes, is 0."""
        if value < 0:
            value = 0
        shift = value.bit_length() - 1 - _PARTS_BITS
        if shift > 0:
            at = (shift << _PARTS_BITS) + (value >> shift)
            self._buckets[at if at < len(self._buckets) else -1] += times
        else:
            self._buckets[value] += times
        self.count += times
        self.total += value * times
        if value > self.largest:
            self.largest = value

    def percentile(self, part: float) -> int:
        """The smallest value that at least this part (0 to 1) of what was counted does not exceed, rounded up to the edge
        of its bucket; 0 where nothing was counted."""
        buckets, seen = list(self._buckets), 0
        wanted = part * sum(buckets)
        for at, times in enumerate(buckets):
            seen += times
            if times and seen >= wanted:
                return self.largest if at == len(buckets) - 1 else min(_largest_in(at), self.largest)
        return 0


def _largest_in(at: int) -> int:
    if at < 2 * _PARTS:
        return at
    shift = (at >> _PARTS_BITS) - 1
    return (((at & (_PARTS - 1)) + _PARTS + 1) << shift) - 1


class CommitStatistics:
    """One committer's: how long the writers' lock was waited for, how long commits took, how large groups were, and how
    long those waited who read a reply after it."""

    __slots__ = ("_answers", "_commits", "_groups", "_jobs", "_locks")

    def __init__(self) -> None:
        self._locks, self._commits, self._groups, self._answers = Histogram(), Histogram(), Histogram(), Histogram()
        self._jobs: dict[str, int] = {}

    def record_group(self, jobs: int, lock_seconds: float, commit_seconds: float) -> None:
        """A group was committed: waited for the lock so long, then held it so long."""
        self._groups.record(jobs)
        self._locks.record(int(lock_seconds * 1e6))
        self._commits.record(int(commit_seconds * 1e6))

    def record_answer(self, seconds: float, jobs: int = 1) -> None:
        """Urgent jobs are answered, so long after they were submitted."""
        self._answers.record(int(seconds * 1e6), jobs)

    def record_jobs(self, kind: str, jobs: int) -> None:
        """So many jobs of one kind are on stable storage. Kinds are names in the source: there are a few."""
        self._jobs[kind] = self._jobs.get(kind, 0) + jobs

    def summary(self) -> dict[str, Any]:
        """For `polarismail status`: times in seconds."""
        return {
            "groups": self._groups.count,
            "group_jobs": _summary(self._groups, 1),
            "lock_wait_seconds": _summary(self._locks, 1e6),
            "commit_seconds": _summary(self._commits, 1e6),
            "answer_seconds": _summary(self._answers, 1e6),
            "jobs": dict(self._jobs),
        }


def _summary(histogram: Histogram, unit: float) -> dict[str, float]:
    values = {"p50": histogram.percentile(0.5), "p99": histogram.percentile(0.99), "max": histogram.largest}
    return {name: value / unit if unit > 1 else value for name, value in values.items()}
