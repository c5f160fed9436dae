# SPDX-License-Identifier: MIT
"""What a 250 promises: accepted mail is there, belongs to one process at a time, and leaves when everybody is served."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, insert, select
from zope.interface.verify import verifyObject

from polarismail.store import claims, schema
from polarismail.store.interfaces import Committed, IDraft, ISpool, Outcome, Refused, Submission
from polarismail.values.address import Mailbox
from polarismail.values.envelope import DsnRequest, Envelope, Recipient, RecipientState, parse_queue_id
from polarismail.values.errors import Unavailable
from polarismail.values.reply import Reply
from tests.databases import KINDS
from tests.reactor import run
from tests.store.spools import (
    FACTS,
    LEASE_SECONDS,
    SENDER,
    TRACE,
    Place,
    Process,
    done,
    envelope,
    later,
    open_place,
    to,
)

OVER_QUOTA = Reply(452, (4, 2, 2), "No credit")
LARGE = bytes(range(256)) * 1200  # 307,200 octets


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with open_place(request.param, tmp_path) as opened:
        yield opened


@pytest.fixture
def process(place: Place) -> Process:
    return place.open()


def rows(process: Process, table: Any) -> int:
    return run(process.database.read, lambda c: c.execute(select(func.count()).select_from(table)).scalar_one())


def is_empty(process: Process) -> bool:
    return not any(rows(process, table) for table in (schema.messages, schema.recipients, schema.chunks))


def wait_for_files(process: Process, count: int) -> None:
    """Removal of files follows the answer."""
    for _ in range(200):
        if len(process.files()) == count:
            return
        time.sleep(0.02)
    assert process.files() == []


def wait_for_chunks(process: Process, count: int) -> None:
    """The same for the rows of a content, on PostgreSQL."""
    for _ in range(200):
        if rows(process, schema.chunks) == count:
            return
        time.sleep(0.02)
    assert rows(process, schema.chunks) == count


def test_it_is_what_it_says(process: Process) -> None:
    verifyObject(ISpool, process.spool)
    verifyObject(IDraft, process.write(b"x"))


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 131_072, 307_200])
def test_octets_come_back_as_they_went_in(process: Process, size: int) -> None:
    content = LARGE[:size]
    committed = process.accept(content)
    message = committed.message
    assert message.size == len(TRACE) + size
    assert message.inline == (TRACE + content if size <= 65_536 else None)
    process.release(committed.recipients)
    (claimed,) = process.claim(process.clock, 10)
    assert claimed.message.inline is None
    whole = TRACE + content
    assert process.read_all(claimed.message) == whole
    assert process.read_all(message) == whole
    edges = {0, 1, len(TRACE) - 1, len(TRACE), len(TRACE) + 1, len(TRACE) + 65_536, size // 2, len(whole)}
    for offset in edges:
        for octets in (1, len(TRACE), 65_536, 70_000):
            assert process.read(claimed.message, offset, octets) == whole[offset : offset + octets]
    process.record([done(claimed)])
    assert is_empty(process)
    wait_for_files(process, 0)


def test_what_is_claimed_is_what_was_committed(process: Process) -> None:
    odd = Mailbox('we"ird @box', "example.com")
    postmaster = Mailbox("postmaster", "")
    recipients = (
        Recipient(odd, Mailbox("alias", "example.net"), "local", 7, DsnRequest("SUCCESS,FAILURE", "rfc822;a@b")),
        Recipient(postmaster, postmaster, "[IPv6:2001:db8::1]"),
    )
    letter = Envelope(None, recipients, ret="HDRS", envid="x+2By", body="8BITMIME", smtputf8=True, account_id=4)
    committed = process.commit(Submission(process.write(b"hello\r\n"), letter, FACTS, TRACE, expires_seconds=100.0))
    process.release(committed.recipients)
    claimed = process.claim(process.clock, 10)
    assert [one.epoch for one in claimed] == [2, 2]
    for before, after in zip(committed.recipients, claimed, strict=True):
        for name in ("number", "forward_path", "original", "next_hop", "account_id", "attempts", "expires", "dsn"):
            assert getattr(before, name) == getattr(after, name), name
        for name in ("queue_id", "reverse_path", "created", "size", "account_id", "ret", "envid", "body", "smtputf8"):
            assert getattr(before.message, name) == getattr(after.message, name), name
    assert claimed[0].expires == process.clock + 100.0
    assert process.show(committed.message.queue_id).facts == FACTS


def test_one_of_a_group_is_refused_and_the_others_commit(process: Process) -> None:
    seen: list[int] = []

    def charge(connection: Any, number: int) -> Reply | None:
        seen.append(number)
        connection.execute(insert(schema.generations).values(name=f"charge {number}", value=1))
        return None

    def refuse(connection: Any, number: int) -> Reply | None:
        charge(connection, number)
        return OVER_QUOTA

    def breaks(connection: Any, number: int) -> Reply | None:
        charge(connection, number)
        raise LookupError("a mistake in an effect")

    drafts = [
        process.write(b"small"),
        process.write(LARGE),
        process.write(b"x"),
        process.write(LARGE),
        process.write(b"y"),
    ]
    effects: list[tuple[Any, ...]] = [(), (refuse,), (charge, charge_twice), (breaks,), (charge,)]
    results = process.together(
        *(
            lambda d=draft, e=effect: process.spool.commit(Submission(d, envelope(), FACTS, TRACE, e))
            for draft, effect in zip(drafts, effects, strict=True)
        )
    )
    assert [worked for worked, _ in results] == [True, True, False, False, True]
    assert results[1][1] == Refused(OVER_QUOTA)
    assert isinstance(results[3][1], LookupError)
    kept = [results[0][1], results[4][1]]
    assert all(isinstance(one, Committed) for one in kept)
    assert sorted(entry.message.queue_id for entry in process.select()) == [one.message.queue_id for one in kept]
    query = select(schema.generations.c.name)
    charged = run(process.database.read, lambda c: list(c.execute(query).scalars()))
    assert charged == [f"charge {drafts[4].number}"]
    assert parse_queue_id(drafts[4].queue_id) == drafts[4].number
    wait_for_files(process, 0)
    if process.database.is_sqlite is False:
        wait_for_chunks(process, 0)


def charge_twice(connection: Any, number: int) -> Reply | None:
    """An effect that the database refuses."""
    connection.execute(insert(schema.generations).values(name=f"charge {number}", value=1))
    return None


def test_one_that_the_database_does_not_take_fails_alone(process: Process) -> None:
    broken = Envelope(Mailbox("broken \udc80", "example.org"), to("user@example.com"))
    letters = [envelope(), broken, envelope("a@example.com", "b@example.com")]
    results = process.together(
        *(
            lambda letter=letter: process.spool.commit(Submission(process_draft(process), letter, FACTS, TRACE))
            for letter in letters
        )
    )
    assert [worked for worked, _ in results] == [True, False, True]
    assert process.counts().messages == 2
    assert process.counts().owned == 3


def process_draft(process: Process) -> Any:
    draft = process.spool.draft()
    draft.write(b"x")
    return draft


def test_a_message_without_recipients_is_not_taken(process: Process) -> None:
    with pytest.raises(ValueError, match="recipient"):
        process.commit(Submission(process.write(b"x"), Envelope(SENDER, ()), FACTS, TRACE))
    assert is_empty(process)


@pytest.mark.parametrize("restarted", [False, True])
def test_nobody_waits_for_a_clock_that_was_ahead(place: Place, restarted: bool) -> None:
    """HOSTILE E5: the clock is put right by a year; what was to be tried in ten minutes of the old time is due now."""
    process = place.open()
    for wait in (600, 5000):
        committed = process.accept()
        process.record([later(committed.recipients[0], process.clock + wait)])
    assert process.claim(process.clock, 10, 14_400.0) == []
    if restarted:
        process.stop()
        process = place.open()
    process.clock -= 4_800  # five thousand are still within the longest wait of 10,000, and stay what they are
    assert process.claim(process.clock, 10, 10_000.0) == []
    process.clock -= 365 * 86_400
    assert len(process.claim(process.clock, 10, 10_000.0)) == 2


def test_a_clock_that_was_ahead_is_made_good_in_pieces(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million that waited is no single transaction: each claim goes on where the last one stopped."""
    monkeypatch.setattr(claims, "CLAMPED_AT_ONCE", 3)
    for _ in range(8):
        process.record([later(process.accept().recipients[0], process.clock + 5000)])
    process.clock -= 365 * 86_400
    claimed = [len(process.claim(process.clock, 10, 10_000.0)) for _ in range(4)]
    assert claimed == [3, 3, 2, 0]


def test_a_message_leaves_with_its_last_recipient(process: Process) -> None:
    left: list[list[str]] = []
    process.spool.when_removed(left.append)
    committed = process.accept(LARGE, "a@example.com", "b@example.com", "c@example.com")
    first, second, third = committed.recipients
    process.record([done(first)])
    process.record([later(second, process.clock + 60)])
    assert rows(process, schema.recipients) == 3
    assert left == []
    states = [one.state for one in process.show(committed.message.queue_id).recipients]
    assert states == [RecipientState.DELIVERED, RecipientState.QUEUED, RecipientState.QUEUED]
    process.clock += 61
    (again,) = process.claim(process.clock, 10)
    assert (again.number, again.attempts, again.last_reply) == (1, 1, "451 4.7.1 Later")
    process.record([done(third, RecipientState.FAILED), done(again, RecipientState.RELAYED)])
    assert is_empty(process)
    assert left == [[committed.message.queue_id]]
    wait_for_files(process, 0)


def test_outcomes_of_many_calls_in_one_group(process: Process) -> None:
    accepted = [process.accept(b"x", *(f"u{n}@example.com" for n in range(at % 3 + 1))) for at in range(12)]
    outcomes = [
        later(one, process.clock + 9) if one.number == 2 and at == 5 else done(one)
        for at, message in enumerate(accepted)
        for one in message.recipients
    ]
    results = process.together(*(lambda one=one: process.spool.record([one]) for one in outcomes))
    assert all(worked for worked, _ in results)
    (entry,) = process.select()
    assert entry.message.queue_id == accepted[5].message.queue_id
    assert process.next_due() == process.clock + 9


def test_a_stale_outcome_changes_nothing(process: Process) -> None:
    committed = process.accept(b"x")
    (stale,) = committed.recipients
    process.release([stale])
    (mine,) = process.claim(process.clock, 10)
    other = process.accept(b"y")
    results = process.together(
        lambda: process.spool.record([done(stale)]),
        lambda: process.spool.record([later(stale, 5.0)]),
        lambda: process.spool.record([done(other.recipients[0])]),
    )
    assert all(worked for worked, _ in results)
    (entry,) = process.select()
    assert entry.recipients[0].recipient.attempts == 0
    assert process.claim(process.clock + 9, 10) == []
    process.record([done(mine)])
    process.record([done(mine)])
    assert is_empty(process)


def report(process: Process, about: str) -> Submission:
    return Submission(process_draft(process), Envelope(None, to("sender@example.org")), FACTS, TRACE, about=about)


def test_reports_are_committed_with_the_outcomes_that_they_follow_from(process: Process) -> None:
    gone, stale = process.accept(b"x"), process.accept(b"y")
    process.release(stale.recipients)
    reports = [report(process, one.message.queue_id) for one in (gone, stale)]
    failed = [done(one.recipients[0], RecipientState.FAILED) for one in (gone, stale)]
    (committed,) = process.record(failed, reports)
    assert committed.message.queue_id == reports[0].draft.queue_id
    assert committed.recipients[0].message.reverse_path is None
    assert {entry.message.queue_id for entry in process.select()} == {
        stale.message.queue_id,
        committed.message.queue_id,
    }
    assert process.record(failed, reports) == []  # repeated: nothing counts any more


def test_a_large_report_travels_with_its_outcome(process: Process) -> None:
    failed = process.accept(b"x")
    letter = Submission(
        process.write(LARGE), Envelope(None, to("sender@example.org")), FACTS, TRACE, about=failed.message.queue_id
    )
    (committed,) = process.record([done(failed.recipients[0], RecipientState.EXPIRED)], [letter])
    assert process.read_all(committed.message) == TRACE + LARGE
    assert process.counts().messages == 1


def test_claims_take_the_oldest_first_and_each_once(process: Process) -> None:
    accepted = [process.accept(b"x", "a@example.com", "b@example.com") for _ in range(5)]
    assert process.next_due() is None
    assert process.claim(process.clock, 10) == []
    for at, one in enumerate(accepted):
        process.record([later(recipient, process.clock + 100 - at) for recipient in one.recipients])
    assert process.next_due() == process.clock + 96
    assert process.claim(process.clock + 95, 10) == []
    first = process.claim(process.clock + 200, 4)
    assert [one.message.queue_id for one in first] == [accepted[at].message.queue_id for at in (4, 4, 3, 3)]
    second = process.claim(process.clock + 200, 100)
    assert len(second) == 6
    assert {(one.message.queue_id, one.number) for one in first + second} == {
        (one.message.queue_id, number) for one in accepted for number in (0, 1)
    }


def test_two_processes_share_what_is_due(place: Place) -> None:
    one, other = place.open(), place.open()
    assert one.database.incarnation != other.database.incarnation
    for _ in range(20):
        one.release(one.accept(b"x").recipients)
    mine = one.claim(one.clock, 8)
    theirs = other.claim(other.clock, 100)
    assert len(mine) == 8
    assert len(theirs) == 12
    # What belongs to one is not the other's to decide.
    other.record([done(recipient) for recipient in mine])
    assert other.counts().messages == 20
    one.record([done(recipient) for recipient in mine])
    assert other.counts().messages == 12


def wait_for_claim(process: Process, count: int) -> list[Any]:
    """What a dead process owned, once its lease has run out."""
    found: list[Any] = []
    deadline = time.monotonic() + 10 * LEASE_SECONDS
    while len(found) < count and time.monotonic() < deadline:
        found += process.claim(process.clock, 100)
        time.sleep(0.05)
    return found


def test_a_crash_leaves_mail_for_the_next_start(place: Place) -> None:
    first = place.open()
    small, large = first.accept(b"small"), first.accept(LARGE, "a@example.com", "b@example.com")
    first.write(LARGE)  # a draft that nobody commits
    run(first.database.write, lambda connection: None)
    first.crash()
    second = place.open()
    claimed = wait_for_claim(second, 3)
    assert {one.message.queue_id for one in claimed} == {small.message.queue_id, large.message.queue_id}
    assert second.read_all(claimed[-1].message)[-1000:] == LARGE[-1000:]
    if second.database.is_sqlite:
        assert second.files() == [large.message.queue_id]
    second.record([done(one) for one in claimed])
    wait_for_files(second, 0)
    third = place.open()
    deadline = time.monotonic() + 10
    while rows(third, schema.chunks) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert is_empty(third)


def test_a_start_sweeps_nothing_of_the_living(place: Place) -> None:
    first = place.open()
    draft = first.write(LARGE)
    place.open()
    committed = first.commit(Submission(draft, envelope(), FACTS, TRACE))
    assert first.read_all(committed.message) == TRACE + LARGE


def test_a_survivor_takes_over_from_the_dead(place: Place) -> None:
    heard: list[str] = []
    survivor = place.open()
    survivor.spool.on_operator_change(lambda action, recipients: heard.append(action))
    dead = place.open()
    lost = dead.accept(b"x")
    dead.crash()
    (taken,) = wait_for_claim(survivor, 1)
    assert taken.message.queue_id == lost.message.queue_id
    assert taken.epoch > lost.recipients[0].epoch
    assert "released" in heard


def test_who_is_known_to_be_dead_is_taken_over_before_its_lease_has_run_out(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.store.spools.LEASE_SECONDS", 600.0)
    survivor, dead = place.open(), place.open()
    lost = dead.accept(b"x")
    assert survivor.claim(survivor.clock, 10) == []
    dead.crash()
    assert run(survivor.database.take_over, dead.database.incarnation)
    (taken,) = survivor.claim(survivor.clock, 10)
    assert taken.message.queue_id == lost.message.queue_id
    assert taken.epoch > lost.recipients[0].epoch
    assert not run(survivor.database.take_over, dead.database.incarnation)


def test_a_process_that_sleeps_past_its_lease_is_fenced(tmp_path: Path) -> None:
    with open_place("postgresql", tmp_path) as place:
        sleeper, survivor = place.open(), place.open()
        before = sleeper.database.incarnation
        lost, draft = sleeper.accept(b"x"), sleeper.write(LARGE)
        sleeping = run(lambda: [sleeper.database.write(lambda connection: time.sleep(3 * LEASE_SECONDS))])
        (taken,) = wait_for_claim(survivor, 1)
        run(lambda: sleeping[0])
        sleeper.record([done(lost.recipients[0])])
        assert survivor.counts().messages == 1
        deadline = time.monotonic() + 10
        while sleeper.database.incarnation == before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert sleeper.database.incarnation > survivor.database.incarnation
        # The chunks of its draft may have been swept: the commit may not refer to them.
        with pytest.raises(Unavailable):
            sleeper.commit(Submission(draft, envelope(), FACTS, TRACE))
        assert sleeper.accept(LARGE).recipients[0].epoch == 0
        survivor.record([done(taken)])


def test_drafts_have_names_that_ascend(process: Process) -> None:
    names = [run(process.spool.draft).queue_id for _ in range(600)]
    assert names == sorted(set(names))


def test_abandoned_drafts_leave_nothing(process: Process) -> None:
    for content in (b"x", LARGE):
        draft = process.write(content)
        run(draft.abandon)
        run(draft.abandon)
        with pytest.raises(Unavailable):
            run(draft.write, b"more")
        with pytest.raises(Unavailable):
            process.commit(Submission(draft, envelope(), FACTS, TRACE))
    wait_for_files(process, 0)
    deadline = time.monotonic() + 5
    while rows(process, schema.chunks) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert is_empty(process)


def test_a_warning_is_remembered(process: Process) -> None:
    (recipient,) = process.accept(b"x").recipients
    outcome = Outcome(recipient, RecipientState.QUEUED, "451 4.4.1 Later", process.clock, "", warned=True)
    process.record([outcome])
    (again,) = process.claim(process.clock, 1)
    assert again.warned
    process.record([later(again, process.clock)])
    assert process.claim(process.clock, 1)[0].warned
