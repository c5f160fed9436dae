# SPDX-License-Identifier: MIT
"""20,000 recipients wait: nothing that the server does in passing may look at all of them.

What is counted are steps of SQLite's machine, which are the same on every run, never seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, event, update

from polarismail.store import claims, queue_operations, schema
from polarismail.store.interfaces import QueuedRecipient
from polarismail.store.queue_operations import QueueFilter
from polarismail.values.envelope import RecipientState
from tests.reactor import run
from tests.store.spools import Process, later, open_place

COUNT = 20_000
NOW = 1_800_000_000.0
_STEPS = 100


def fill(connection: Connection) -> None:
    """A message for each recipient; the later it came, the sooner it is due, so that no order helps by accident."""
    numbers = [(n + 1) << 30 for n in range(COUNT)]
    same = {"facts": "{}", "size": 1, "recipient_count": 1, "storage": 0, "head": b"x" * 500}
    messages = [
        {"id": number, "reverse_path": f"s{n % 7}@example.org", "created": NOW, **same}
        for n, number in enumerate(numbers)
    ]
    recipients = [
        {"message_id": number, "number": 0, "forward_path": f"u{n}@d{n % 100}.test", "next_hop": f"d{n % 100}.test"}
        | {"attempts": 1, "next_attempt": NOW + COUNT - n, "expires": NOW + 1e6}
        for n, number in enumerate(numbers)
    ]
    connection.execute(schema.messages.insert(), messages)
    connection.execute(schema.recipients.insert(), recipients)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with open_place("sqlite", Path(tmp_path_factory.mktemp("long"))) as place:
        process = place.open()
        run(process.database.write, fill)
        yield process


class Work:
    """Steps of the machine and statements of one job, on whichever connection it runs."""

    def __init__(self, job: Callable[[Connection], Any]) -> None:
        self._job = job
        self.steps = 0
        self.plans: list[str] = []
        self.result: Any = None

    def __call__(self, connection: Connection) -> Any:
        driver: Any = connection.connection.driver_connection
        statements: list[tuple[str, Any]] = []

        def executed(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
            statements.append((statement, parameters))

        def step() -> None:
            self.steps += _STEPS

        event.listen(connection, "before_cursor_execute", executed)
        driver.set_progress_handler(step, _STEPS)
        try:
            self.result = self._job(connection)
        finally:
            driver.set_progress_handler(None, 0)
            event.remove(connection, "before_cursor_execute", executed)
        for statement, parameters in statements:
            self.plans += [row[3] for row in driver.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)]
        return self.result


def written(process: Process, job: Callable[[Connection], Any]) -> Work:
    work = Work(job)
    run(process.database.write, work)
    return work


def test_a_claim_reads_what_it_takes(process: Process) -> None:
    for limit in (1, 100):
        work = written(process, lambda c: claims.claim(c, 99, NOW + COUNT / 2, limit))  # noqa: B023
        claimed: list[QueuedRecipient] = work.result
        assert len(claimed) == limit
        assert [each.next_attempt for each in claimed] == sorted(each.next_attempt for each in claimed)
        assert not [plan for plan in work.plans if plan.startswith("SCAN")], work.plans
        assert any("ix_recipients_due" in plan for plan in work.plans), work.plans
        assert work.steps < 10_000 + 500 * limit
    run(process.database.write, lambda c: c.execute(update(schema.recipients).values(owner=0)).rowcount)


def test_when_something_is_due_is_seen_at_once(process: Process) -> None:
    work = written(process, claims.next_due)
    assert work.plans == ["SEARCH recipients USING INDEX ix_recipients_due"]
    assert work.steps <= _STEPS


def count_work(process: Process, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Work], list[Work]]:
    """What readers and the writer do from now on."""
    counted: tuple[list[Work], list[Work]] = ([], [])
    for name, works in zip(("read", "write"), counted, strict=True):
        method = getattr(process.database, name)

        def through(job: Any, method: Any = method, works: list[Work] = works) -> Any:
            works.append(Work(job))
            return method(works[-1])

        monkeypatch.setattr(process.database, name, through)
    return counted


def test_a_page_of_the_queue_is_read_behind_the_last(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, _ = count_work(process, monkeypatch)
    seen, after = 0, ""
    for _ in range(3):
        page = process.select(None, 500, after)
        seen, after = seen + len(page), page[-1].message.queue_id
    assert seen == 1500
    assert len(reads) == 3
    assert max(work.steps for work in reads) < 300_000, "much less than all of them"


@pytest.mark.parametrize(
    "chosen",
    [
        QueueFilter(reverse_path="@nowhere.test"),
        QueueFilter(forward_path="u19999@d99.test"),
        QueueFilter(next_hop="nowhere.test"),
        QueueFilter(states=(RecipientState.HELD,)),
    ],
)
def test_a_filter_is_applied_range_by_range(
    process: Process, monkeypatch: pytest.MonkeyPatch, chosen: QueueFilter
) -> None:
    reads, writes = count_work(process, monkeypatch)
    expected = 1 if chosen.forward_path else 0
    assert len(process.select(chosen, 100)) == expected
    assert len(reads) == COUNT // queue_operations._SCANNED + 1
    assert process.hold(chosen) == expected
    assert max(work.steps for work in reads) < 500_000
    assert sum(work.steps for work in writes) < 5_000, "the writers' lock is not held while all of them are looked at"
    assert len(writes) == expected
    if expected:
        assert process.unhold(chosen) == 1


def test_many_are_counted_once_in_a_while(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, _ = count_work(process, monkeypatch)
    for _ in range(2):
        assert process.counts().messages == COUNT
    assert len(reads) == 2, "a queue like this is counted anew each time"
    monkeypatch.setattr(queue_operations, "_MANY", 10_000)
    monkeypatch.setattr(queue_operations, "_COUNTED_TIMES", 1e6)
    for _ in range(3):
        assert process.counts().messages == COUNT
    assert len(reads) == 3


def test_a_change_of_everything_goes_in_pieces(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, writes = count_work(process, monkeypatch)
    chosen = QueueFilter(next_hop="d5.test")
    assert process.retry(chosen) == COUNT // 100
    assert max(work.steps for work in (*reads, *writes)) < 500_000
    monkeypatch.undo()
    for each in process.claim(process.clock, 10):
        assert each.next_hop == "d5.test"
        process.record([later(each, NOW + 10)])
