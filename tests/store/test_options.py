# SPDX-License-Identifier: MIT
"""What was granted to a message is kept with it; what is held for the future is nobody's until then, whoever restarts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import evolve

from polarismail.store.accepting import Accept
from polarismail.store.interfaces import Committed, Submission
from polarismail.store.queue_operations import QueueFilter
from polarismail.values.envelope import NO_OPTIONS, MailOptions, RecipientState
from tests.databases import KINDS
from tests.store.spools import FACTS, TRACE, Place, Process, done, envelope, later, open_place

EVERYTHING = MailOptions(-7, 0.0, 1_900_000_000.25, by_return=True, by_trace=True, require_tls=True)


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with open_place(request.param, tmp_path) as opened:
        yield opened


@pytest.fixture
def process(place: Place) -> Process:
    return place.open()


def accept(process: Process, options: MailOptions, *addresses: str) -> Committed:
    letter = evolve(envelope(*addresses), options=options)
    committed = process.commit(Submission(process.write(b"x\r\n"), letter, FACTS, TRACE))
    assert isinstance(committed, Committed)
    return committed


@pytest.mark.parametrize(
    "options",
    [
        NO_OPTIONS,
        EVERYTHING,
        MailOptions(priority=9),
        MailOptions(require_tls=True),
        MailOptions(deliver_by=5.0),
        MailOptions(hold_until=5.0),
    ],
)
def test_options_come_back(process: Process, options: MailOptions) -> None:
    committed = accept(process, options)
    assert committed.message.options == options and len(committed.recipients) == 1
    process.release(committed.recipients)
    (claimed,) = process.claim(process.clock, 10)
    assert claimed.message.options == options
    assert (claimed.message.options is NO_OPTIONS) == (options is NO_OPTIONS)
    process.record([done(claimed)])


def test_options_of_a_group_stay_with_their_messages(process: Process) -> None:
    letters = [evolve(envelope(), options=MailOptions(priority=at) if at % 2 else NO_OPTIONS) for at in range(-4, 5)]
    drafts = [process.write(b"x") for _ in letters]
    results = process.together(
        *(
            lambda draft=draft, letter=letter: process.spool.commit(Submission(draft, letter, FACTS, TRACE))
            for draft, letter in zip(drafts, letters, strict=True)
        )
    )
    assert all(worked for worked, _ in results)
    process.release([one for _, committed in results for one in committed.recipients])
    found = {one.message.queue_id: one.message.options for one in process.claim(process.clock, 99)}
    assert found == {draft.queue_id: letter.options for draft, letter in zip(drafts, letters, strict=True)}


def test_what_is_held_is_nobodys_until_its_time(place: Place) -> None:
    first = place.open()
    until = first.clock + 90_000.0
    committed = accept(first, MailOptions(hold_until=until), "a@example.com", "b@example.com")
    assert committed.recipients == () and committed.message.recipient_count == 2
    assert first.next_due() == until
    # Neither a clock that is put right (the first claim looks for such), nor a crash, lets it go.
    assert first.claim(first.clock, 10, 14_400.0) == []
    first.crash()
    second = place.open()
    assert second.claim(second.clock, 10, 14_400.0) == []
    assert second.claim(until - 1, 10, 14_400.0) == []
    claimed = second.claim(until, 10, 14_400.0)
    assert [one.next_attempt for one in claimed] == [until] * 2
    # Its life in the queue begins then.
    assert [one.expires for one in claimed] == [until + 432_000.0] * 2
    assert claimed[0].message.released == until
    second.record([later(claimed[0], until + 300), done(claimed[1])])
    (again,) = second.claim(until + 300, 10, 14_400.0)
    second.record([done(again)])


def test_a_clock_that_was_ahead_is_told_from_a_hold(process: Process) -> None:
    held = accept(process, MailOptions(hold_until=process.clock + 90_000.0))
    tried = accept(process, NO_OPTIONS)
    process.record([later(tried.recipients[0], process.clock + 90_000.0)])
    assert [one.message.queue_id for one in process.claim(process.clock, 10, 14_400.0)] == [tried.message.queue_id]
    assert process.next_due() == held.message.options.hold_until


def test_an_operator_does_not_deliver_it_sooner(process: Process) -> None:
    until = process.clock + 5_000.0
    queue_id = accept(process, MailOptions(hold_until=until)).message.queue_id
    plain = accept(process, NO_OPTIONS)
    process.record([later(plain.recipients[0], process.clock + 300.0)])
    assert process.retry(QueueFilter()) == 1
    assert [one.message.queue_id for one in process.claim(process.clock, 10)] == [plain.message.queue_id]
    assert process.hold(QueueFilter(queue_ids=(queue_id,))) == 1
    assert process.unhold(QueueFilter()) == 1
    (entry,) = process.select(QueueFilter(queue_ids=(queue_id,)))
    assert entry.recipients[0].state is RecipientState.QUEUED
    assert entry.recipients[0].recipient.next_attempt == until and entry.message.options.hold_until == until
    # One that was put on hold beyond its time is due at once.
    assert process.hold(QueueFilter(queue_ids=(queue_id,))) == 1
    process.clock = until + 10
    assert process.unhold(QueueFilter()) == 1
    (claimed,) = process.claim(process.clock, 10)
    assert claimed.next_attempt == process.clock


def test_a_process_that_joins_anew_does_not_take_what_is_held(process: Process) -> None:
    def owners(options: MailOptions) -> tuple[list[int], list[int]]:
        submission = Submission(process.write(b"x"), evolve(envelope(), options=options), FACTS, TRACE)
        accept = Accept(submission, submission.draft, 3, process.clock, 100.0)
        before = [row[-1] for row in accept.recipients]
        accept.belong_to(9)
        submission.draft.abandon()
        return before, [row[-1] for row in accept.recipients]

    assert owners(NO_OPTIONS) == ([3], [9])
    assert owners(MailOptions(hold_until=process.clock + 1)) == ([0], [0])
