# SPDX-License-Identifier: MIT
"""What an operator sees of the queue, and what becomes of mail that is held, retried, let go or deleted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polarismail.store import queue_operations
from polarismail.store.interfaces import Submission
from polarismail.store.queue_operations import QueueCounts, QueueFilter
from polarismail.values.address import Mailbox
from polarismail.values.envelope import Envelope, RecipientState
from tests.databases import KINDS
from tests.store.spools import FACTS, TRACE, Process, done, later, open_place, to

EVERYTHING = QueueFilter()


@pytest.fixture(params=KINDS)
def process(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Process]:
    with open_place(request.param, tmp_path) as place:
        yield place.open()


@pytest.fixture
def heard(process: Process) -> list[tuple[str, Any]]:
    events: list[tuple[str, Any]] = []
    process.spool.on_operator_change(lambda action, recipients: events.append((action, recipients)))
    return events


def queue_ids(entries: Any) -> list[str]:
    return [entry.message.queue_id for entry in entries]


def waiting(process: Process, *addresses: str, seconds: float = 1000.0) -> str:
    """A message whose recipients wait for their next attempt."""
    committed = process.accept(b"x", *addresses, local=False)
    process.record([later(one, process.clock + seconds) for one in committed.recipients])
    return committed.message.queue_id


def test_filters(process: Process) -> None:
    one = waiting(process, "a@example.com", "b@example.net")
    other = waiting(process, "C_d@Example.com")
    null = process.commit(
        Submission(process.write(b"x"), Envelope(None, to("a@example.com"), account_id=9), FACTS, TRACE)
    ).message.queue_id
    assert queue_ids(process.select()) == [one, other, null]
    assert queue_ids(process.select(None, 1)) == [one]
    assert queue_ids(process.select(None, 10, one)) == [other, null]
    for chosen, expected in (
        (QueueFilter(queue_ids=(other, null.upper())), [other, null]),
        (QueueFilter(reverse_path="<>"), [null]),
        (QueueFilter(reverse_path="SENDER@example.org"), [one, other]),
        (QueueFilter(reverse_path="@example.org"), [one, other]),
        (QueueFilter(reverse_path="@xample.org"), []),
        (QueueFilter(forward_path="a@example.com"), [one, null]),
        (QueueFilter(forward_path="@EXAMPLE.com"), [one, other, null]),
        (QueueFilter(forward_path="c%d@example.com"), []),
        (QueueFilter(next_hop="example.net"), [one]),
        (QueueFilter(account_id=9), [null]),
        (QueueFilter(states=(RecipientState.HELD,)), []),
    ):
        assert queue_ids(process.select(chosen)) == expected, chosen
    (entry,) = process.select(QueueFilter(next_hop="example.net"))
    assert [str(one.recipient.forward_path) for one in entry.recipients] == ["b@example.net"]
    with pytest.raises(ValueError, match="queue id"):
        process.select(QueueFilter(queue_ids=("nonsense",)))


def test_showing_a_message(process: Process) -> None:
    queue_id = waiting(process, "a@example.com", "b@example.net")
    process.delete(QueueFilter(forward_path="b@example.net"))
    entry = process.show(queue_id)
    assert entry.facts == FACTS
    assert [one.state for one in entry.recipients] == [RecipientState.QUEUED, RecipientState.DELETED]
    assert entry.recipients[0].remote == "mx[192.0.2.9]:25"
    assert entry.recipients[0].recipient.last_reply == "451 4.7.1 Later"
    assert not entry.recipients[0].owned
    assert process.show("0000000000000") is None


def test_counting(process: Process) -> None:
    assert process.counts() == QueueCounts()
    waiting(process, "a@example.com", "b@example.com")
    process.accept(b"x")
    process.hold(QueueFilter(forward_path="a@example.com"))
    assert process.counts() == QueueCounts(messages=2, queued=2, held=1, owned=1)


def test_retrying(process: Process, heard: list[tuple[str, Any]]) -> None:
    queue_id = waiting(process, "a@example.com", "b@example.com")
    in_hand = process.accept(b"x").recipients[0]
    assert process.retry(QueueFilter(forward_path="a@example.com")) == 1
    assert heard == [("retry", [(queue_id, 0)])]
    (claimed,) = process.claim(process.clock, 10)
    assert (claimed.number, claimed.attempts) == (0, 1)
    assert process.retry(EVERYTHING) == 1  # the others are being tried
    process.record([done(in_hand), done(claimed)])
    assert process.counts() == QueueCounts(messages=1, queued=1)


def test_holding_what_waits(process: Process, heard: list[tuple[str, Any]]) -> None:
    queue_id = waiting(process, "a@example.com")
    assert process.hold(EVERYTHING) == 1
    assert process.hold(EVERYTHING) == 0
    process.clock += 5000
    assert process.next_due() is None
    assert process.claim(process.clock, 10) == []
    assert process.retry(EVERYTHING) == 0
    assert process.unhold(QueueFilter(queue_ids=(queue_id,))) == 1
    assert len(process.claim(process.clock, 10)) == 1
    assert [action for action, _ in heard] == ["hold", "unhold"]


def test_holding_what_is_being_tried(process: Process) -> None:
    """An attempt that has begun is counted, or the next one would be a duplicate."""
    delivered, deferred, unbegun = (process.accept(b"x").recipients[0] for _ in range(3))
    assert process.hold(EVERYTHING) == 3
    process.record([done(delivered)])
    process.record([later(deferred, process.clock)])
    process.release([unbegun])
    assert process.counts() == QueueCounts(messages=2, held=2)
    assert process.claim(process.clock, 10) == []
    assert process.unhold(EVERYTHING) == 2
    assert [one.attempts for one in process.claim(process.clock, 10)] == [1, 0]


def test_deleting(process: Process, heard: list[tuple[str, Any]]) -> None:
    left: list[list[str]] = []
    process.spool.when_removed(left.append)
    large = process.accept(b"x" * 200_000, "a@example.com", "b@example.com")
    queue_id = large.message.queue_id
    kept = waiting(process, "c@example.com")
    assert process.delete(QueueFilter(forward_path="a@example.com")) == 1
    assert left == []
    assert process.delete(QueueFilter(queue_ids=(queue_id,))) == 1
    assert left == [[queue_id]]
    assert heard == [("delete", [(queue_id, 0)]), ("delete", [(queue_id, 1)])]
    # Its outcome comes too late: nothing is left to change.
    process.record([done(one) for one in large.recipients])
    assert queue_ids(process.select()) == [kept]
    assert process.delete(EVERYTHING) == 1
    assert process.counts() == QueueCounts()


def test_large_changes_go_in_pieces(
    process: Process, heard: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_operations, "_PIECE", 7)
    for _ in range(4):
        waiting(process, *(f"u{at}@example.com" for at in range(5)))
    assert process.hold(EVERYTHING) == 20
    assert [len(recipients) for _, recipients in heard] == [7, 7, 6]
    assert process.delete(EVERYTHING) == 20
    assert process.counts() == QueueCounts()


def test_a_filter_is_data_and_not_sql(process: Process) -> None:
    waiting(process, "a@example.com")
    for text in ("' OR 1=1 --", "@%", "%", "_@example.com", '"; DROP TABLE messages; --'):
        assert process.delete(QueueFilter(forward_path=text)) == 0
        assert process.delete(QueueFilter(reverse_path=text)) == 0
    odd = Mailbox("o'brien", "example.com")
    assert process.delete(QueueFilter(forward_path=str(odd))) == 0
    assert process.counts().messages == 1
