# SPDX-License-Identifier: MIT
"""EIO and ENOSPC from one system call of the real server: the reactions of HOSTILE table E, and no promise broken.

A case whose fault never happened fails.
"""

from __future__ import annotations

import asyncio
import errno
import json
from typing import Any

import pytest

from tests.crash import IS_LONG
from tests.crash.breaks import MESSAGES, Break, Outcome, break_and_recover
from tests.crash.points import Stage

EIO, ENOSPC = errno.EIO, errno.ENOSPC
YES, IN_DOUBT, UNHEALTHY, FULL = "250 2.0.0", "451 4.3.0", "421 4.3.0", "452 4.3.1"


def name(case: Break) -> str:
    return f"{case.call}-{case.place}-{errno.errorcode[case.error]}-{case.nth}{'' if case.once_up else '-at-the-start'}"


def cases(*rows: tuple[str, str, int, tuple[int, ...]], **settings: Any) -> list[Any]:
    """(call, place, error, which calls) as parameters with readable names: of each the first, or all for `make crash`."""
    found = []
    for call, place, error, numbers in rows:
        for number in numbers if IS_LONG else numbers[:1]:
            case = Break(call, place, error, number, **settings)
            found.append(pytest.param(case, id=name(case)))
    return found


def broken(runner: asyncio.Runner, stage: Stage, case: Break) -> Outcome:
    """Do it; what must hold in every case is asserted here."""
    outcome = runner.run(break_and_recover(stage, case.nth, case))
    assert outcome.fired, "the fault never happened: this shows nothing"
    assert not outcome.verdict.failures, "\n".join(outcome.verdict.failures)
    for reply in (*outcome.replies, outcome.probe):
        assert reply[:1] in ("2", "4", ""), f"a fault of ours became {reply}"
    return outcome


@pytest.mark.parametrize(
    "case",
    cases(
        ("fdatasync", "database", EIO, (1, 2, 4)),
        ("fdatasync", "database", ENOSPC, (1, 3)),  # a sync that fails is final, whatever it says
        ("pwrite64", "database", EIO, (1, 6, 20)),
        ("fdatasync", "spool", EIO, (1, 2)),
        ("fdatasync", "spool", ENOSPC, (1,)),
        ("fsync", "spool", EIO, (1, 2)),
        ("writev", "spool", EIO, (1, 2)),
        ("openat", "spool", EIO, (1, 2)),
    ),
)
def test_a_spool_that_fails_makes_no_more_promises(case: Break, runner: asyncio.Runner, stage: Stage) -> None:
    """HOSTILE E2: 451 to whom it happens, 421 to all after that, and nothing is delivered that could not be recorded."""
    outcome = broken(runner, stage, case)
    assert outcome.status is None, "the server is there, and says what it cannot do"
    assert {reply[:9] for reply in outcome.replies} <= {YES, IN_DOUBT, UNHEALTHY}
    assert outcome.probe.startswith(UNHEALTHY)


@pytest.mark.parametrize("case", cases(("pwrite64", "database", ENOSPC, (1, 6, 20)), times=3))
def test_a_database_without_room_says_so(case: Break, runner: asyncio.Runner, stage: Stage) -> None:
    """HOSTILE E1. The first failure gives the reserve up, and the next try is what the client hears of."""
    outcome = broken(runner, stage, case)
    assert outcome.status is None
    assert {reply[:9] for reply in outcome.replies} <= {YES, FULL, IN_DOUBT}
    assert outcome.probe.startswith((FULL, YES))
    assert '"disk_full"' in outcome.events


@pytest.mark.parametrize("case", cases(("writev", "spool", ENOSPC, (1, 2)), ("openat", "spool", ENOSPC, (1, 2))))
def test_a_content_without_room_is_refused_alone(case: Break, runner: asyncio.Runner, stage: Stage) -> None:
    """HOSTILE E1: 452 4.3.1 to that message, and the others are taken and delivered."""
    outcome = broken(runner, stage, case)
    assert sorted(reply[:9] for reply in outcome.replies) == [YES] * (len(MESSAGES) - 1) + [FULL]
    assert outcome.probe.startswith(YES)


@pytest.mark.parametrize(
    "case",
    cases(
        *((call, "mail", EIO, (1, 2)) for call in ("syncfs", "writev", "renameat", "mkdir")),
        *((call, "mail", EIO, (1,)) for call in ("write", "openat", "mkdirat", "fdatasync")),
        *((call, "mail", EIO, (1,)) for call in ("sendfile", "fsync")),
        ("linkat", "spool", EIO, (1, 2)),  # from the spool to the mail
        ("linkat", "spool", ENOSPC, (1,)),
        ("sendfile", "mail", ENOSPC, (1,)),
        *((call, "mail", ENOSPC, (1,)) for call in ("syncfs", "write", "writev", "openat", "renameat", "mkdirat")),
    ),
)
def test_a_maildir_that_fails_puts_its_mail_off(case: Break, runner: asyncio.Runner, stage: Stage) -> None:
    """The promise was made before: it waits in the queue, the alarm is raised, and nobody else is kept waiting."""
    outcome = broken(runner, stage, case)
    assert [reply[:9] for reply in outcome.replies] == [YES] * len(MESSAGES)
    assert outcome.probe.startswith(YES)
    events = [json.loads(line) for line in outcome.events.splitlines()]
    put_off = [event for event in events if event.get("event") == "deferred" and event.get("relay") == "local"]
    assert put_off and all(event["reply"].startswith(("451 4.3.0", "452 4.3.1")) for event in put_off)
    assert any(event.get("event") == "alarm" for event in events)


@pytest.mark.parametrize(
    "case",
    cases(
        ("fdatasync", "database", EIO, (1, 3)),
        ("pwrite64", "database", EIO, (1, 20)),
        ("pwrite64", "database", ENOSPC, (20,)),
        ("ftruncate", "database", EIO, (1, 2)),
        ("ftruncate", "database", ENOSPC, (1,)),
        ("ftruncate", "counters", EIO, (1,)),
        ("openat", "database", EIO, (1,)),
        once_up=False,
    ),
)
def test_a_start_that_fails_says_so_or_goes_on(case: Break, runner: asyncio.Runner, stage: Stage) -> None:
    """Status 1, or a server that keeps its promises: never one that hangs, or greets and cannot work without saying so."""
    outcome = broken(runner, stage, case)
    if outcome.status is None:
        assert {reply[:9] for reply in (*outcome.replies, outcome.probe)} <= {YES, IN_DOUBT, UNHEALTHY, FULL}
    else:
        assert outcome.status == 1
