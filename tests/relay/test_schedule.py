# SPDX-License-Identifier: MIT
"""The schedule's promises."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polarismail.relay.classify import Cause
from polarismail.relay.schedule import ScheduleSettings, next_attempt, should_warn, wait_seconds

S = ScheduleSettings()
LIFE = 5 * 86400.0
CAUSES = st.sampled_from(Cause)


@pytest.mark.parametrize(
    ("cause", "first"),
    [(Cause.GREYLISTED, 300), (Cause.BUSY, 900), (Cause.CONNECT, 600), (Cause.BLOCKED, 7200)],
)
def test_first_wait_by_cause(cause: Cause, first: float) -> None:
    assert wait_seconds(cause, 0, 0.0, S) == first
    assert first <= wait_seconds(cause, 0, 0.999, S) <= first * 1.1


@given(CAUSES, st.integers(0, 10_000), st.floats(0, 1, exclude_max=True))
def test_waits_grow_to_four_hours_and_no_further(cause: Cause, attempts: int, luck: float) -> None:
    wait = wait_seconds(cause, attempts, luck, S)
    assert 300 <= wait <= 4 * 3600
    assert wait_seconds(cause, attempts + 1, luck, S) >= wait
    if attempts > 12:
        assert wait == 4 * 3600


@given(CAUSES, st.floats(0, 1, exclude_max=True), st.floats(1e9, 2e9))
def test_life_ends_with_one_attempt_at_its_end(cause: Cause, luck: float, created: float) -> None:
    expires = created + LIFE
    now, tries = created, 0
    while True:
        due = next_attempt(cause, tries, now=now, expires=expires, luck=luck, settings=S)
        if due is None:
            break
        assert now < due <= max(expires, now + 1)
        now, tries = due, tries + 1
        assert tries < 100
    assert expires <= now <= expires + 2
    assert tries >= 30  # five days of at most four hours


def test_expired_before_the_first_attempt() -> None:
    assert next_attempt(Cause.OTHER, 0, now=1000.0, expires=1000.0, luck=0.0, settings=S) is None


def test_warning_goes_out_once_after_four_hours() -> None:
    assert not should_warn(0, 14_399, warned=False, settings=S)
    assert should_warn(0, 14_400, warned=False, settings=S)
    assert not should_warn(0, 99_999, warned=True, settings=S)
    assert not should_warn(0, 99_999, warned=False, settings=ScheduleSettings(warn_after_seconds=0))
