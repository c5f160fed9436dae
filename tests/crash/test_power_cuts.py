# SPDX-License-Identifier: MIT
"""A short `make crash`: power cuts under load, a fault at some of the write-like calls, and that broken promises are seen."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

import pytest

from tests.crash import points
from tests.crash.history import Answer, Copy, History, Places, Verdict, judge
from tests.crash.rounds import Run, Settings

SECONDS = 6.0


def seed() -> int:
    """Another one each time; a failure prints it."""
    return random.SystemRandom().randrange(1 << 30)


def cut(settings: Settings, first_seed: int, cuts: int, seconds: float) -> tuple[Verdict, int]:
    """Rounds of so many cuts until the time is over, one at least."""

    async def rounds() -> tuple[Verdict, int]:
        run = await Run.prepare(settings)
        try:
            until, at = time.monotonic() + seconds, 0
            while not at or time.monotonic() < until:
                await run.round(first_seed + at, cuts)
                at += 1
            return run.verdict, run.cuts
        finally:
            await run.close()

    return asyncio.run(rounds())


def test_power_cuts_under_load_lose_nothing(power: None) -> None:
    first = seed()
    verdict, cuts = cut(Settings(fresh_share=0.1), first, 10, SECONDS)
    print(f"{cuts} cuts, seeds from {first}: {verdict}")
    assert not verdict.failures, "\n".join(verdict.failures)
    assert verdict.promises and verdict.delivered and verdict.relayed and verdict.reported


@pytest.mark.timeout(400)  # now and then luck saves what nobody synced, and it takes all five attempts
@pytest.mark.parametrize("careless", ["database", "maildirs"])
def test_a_server_that_does_not_sync_is_found_out(careless: str, power: None) -> None:
    """Else the test above shows nothing."""
    for attempt in range(5):
        verdict, _ = cut(Settings(fresh_share=0.0, careless=careless), attempt, 6, 0)
        if verdict.lost or any("octets" in failure for failure in verdict.failures):
            return
    raise AssertionError("thirty power cuts without a sync, and nothing was missed")


def test_a_fault_at_any_write_loses_nothing(power: None) -> None:
    first = seed()
    found = points.run_some(first, 1, SECONDS)
    print(f"seed {first}: {found}")
    assert not found.failures, "\n".join(found.failures)
    assert found.fired >= points.FEWEST


# -- the verdict itself --------------------------------------------------------------------------------------------------


def acknowledged(history: History, *recipients: str, answer: Answer = Answer.YES) -> int:
    message = history.begin("a@b.test", 100)
    message.recipients, message.answer, message.queue_id = list(recipients), answer, "q1"
    return message.number


def test_what_is_nowhere_is_lost() -> None:
    history = History(1)
    number = acknowledged(history, "x@here.test", "y@here.test", "z@there.test")
    places = Places([Copy(number, "x@here.test")], queued={("q1", "y@here.test")})
    verdict = judge(history, places)
    assert verdict.lost == 1
    assert len(verdict.failures) == 1 and "z@there.test" in verdict.failures[0]
    places.reports = Counter({(number, "z@there.test"): 1})
    assert not judge(history, places).failures


@pytest.mark.parametrize(
    ("answer", "failures", "duplicates"),
    [(Answer.NO, 1, 0), (Answer.UNSENT, 1, 0), (Answer.NONE, 0, 1), (Answer.LATER, 0, 1)],
)
def test_what_was_not_acknowledged_may_be_there_in_doubt_alone(answer: Answer, failures: int, duplicates: int) -> None:
    history = History(1)
    number = acknowledged(history, "x@here.test", answer=answer)
    verdict = judge(history, Places([Copy(number, "x@here.test")]))
    assert (len(verdict.failures), verdict.duplicates.total()) == (failures, duplicates)


def test_half_of_a_message_in_doubt_is_a_failure() -> None:
    history = History(1)
    number = acknowledged(history, "x@here.test", "y@here.test", answer=Answer.NONE)
    (failure,) = judge(history, Places([Copy(number, "x@here.test")])).failures
    assert "HALVED" in failure


def test_twice_in_a_maildir_is_never_explained() -> None:
    history = History(1, faults=[1.0])
    number = acknowledged(history, "x@here.test")
    (failure,) = judge(history, Places([Copy(number, "x@here.test")] * 2)).failures
    assert "TWICE" in failure


@pytest.mark.parametrize(("faults", "second", "failures"), [([], 0, 1), ([1.5], 1, 0), ([1.5], 0, 1), ([60.0], 1, 1)])
def test_twice_at_the_remote_needs_a_fault_in_between(faults: list[float], second: int, failures: int) -> None:
    history = History(1, faults=faults)
    number = acknowledged(history, "x@there.test")
    places = Places(remote=[Copy(number, "x@there.test", "", 1.0, 0), Copy(number, "x@there.test", "", 99.0, second)])
    verdict = judge(history, places)
    assert (len(verdict.failures), verdict.duplicates.total()) == (failures, 1 - failures)


def test_octets_that_differ_and_lines_that_nobody_sent_are_seen() -> None:
    history = History(1)
    number = acknowledged(history, "x@here.test")
    content = history.messages[number].content(1)
    assert history.compare(b"Received: x\r\n\tby y\r\n" + content) == (number, "")
    assert history.compare(content[:-1])[1]
    assert history.compare(b"X-Else: 1\r\n" + content)[1]
    assert history.compare(b"Subject: another\r\n\r\n")[0] == 0
