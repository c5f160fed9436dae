# SPDX-License-Identifier: MIT
"""The greylist as a service: with a shifted clock, over a restart, with a database that fails, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred, fail, gatherResults, maybeDeferred

from polarismail.policy.greylisting import GreylistSettings
from polarismail.policy.verdict import ACCEPT, Defer, Verdict
from polarismail.relay.greylisting import Greylist
from polarismail.store import greylist as table
from polarismail.store import schema
from polarismail.values.address import Mailbox
from polarismail.values.errors import Unavailable
from polarismail.values.reply import TRY_AGAIN
from tests.databases import KINDS, SwitchedDatabase, open_database
from tests.reactor import reactor, run

DAY = 86400.0
T0 = 1_800_000_000.0
SENDER, JOE = Mailbox("ann", "their.example"), Mailbox("joe", "ours.example")


class Desk:
    """A greylist on a database, called from the test's thread."""

    def __init__(self, database: SwitchedDatabase, **changes: Any) -> None:
        self.database = database
        values: dict[str, Any] = {"flush_seconds": 0.01, **changes}
        self.greylist = Greylist(database, reactor, GreylistSettings(**values), now=lambda: T0)

    def ask(self, now: float, client: str = "192.0.2.1", sender: Mailbox | None = SENDER, to: Mailbox = JOE) -> Verdict:
        return run(self.greylist.check, client, sender, to, now)

    def settle(self) -> None:
        """Wait until everything is written."""
        run(self.greylist.stop)
        assert self.greylist.statistics()["unwritten"] == 0

    def restarted(self, **changes: Any) -> Desk:
        self.settle()
        return Desk(self.database, **changes)


@pytest.fixture(scope="module", params=KINDS)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwitchedDatabase]:
    with open_database(request.param, tmp_path_factory.mktemp("greylist"), "counters") as database:
        yield SwitchedDatabase(database)


@pytest.fixture
def desk(shared: SwitchedDatabase) -> Iterator[Desk]:
    def clear(connection: Any) -> None:
        connection.execute(schema.greylist.delete())
        connection.execute(schema.greylist_clients.delete())

    shared.problem = None
    run(shared.write, clear)
    built = Desk(shared)
    yield built
    shared.problem = None
    run(built.greylist.stop)


def seconds_left(verdict: Verdict) -> int:
    assert isinstance(verdict, Defer) and verdict.reply.code == 451 and verdict.reply.status == (4, 7, 1)
    return int(verdict.reply.text.split()[-2])


def test_a_stranger_passes_after_the_delay(desk: Desk) -> None:
    assert seconds_left(desk.ask(T0)) == 300
    assert seconds_left(desk.ask(T0 + 100)) == 200
    assert desk.ask(T0 + 300) == ACCEPT
    assert desk.ask(T0 + 301) == ACCEPT
    assert desk.ask(T0 + 302, client="192.0.2.200") == ACCEPT, "the network counts, not the address"
    assert seconds_left(desk.ask(T0 + 302, client="192.0.3.1")) == 300
    figures = desk.greylist.statistics()
    assert (figures["first"], figures["early"], figures["passed"], figures["known"]) == (2, 1, 1, 2)


def test_each_part_of_the_triplet_counts(desk: Desk) -> None:
    desk.ask(T0)
    for change in (
        {"sender": None},
        {"sender": Mailbox("bob", "their.example")},
        {"to": Mailbox("sue", "ours.example")},
        {"client": "2001:db8::1"},
    ):
        assert seconds_left(desk.ask(T0 + 400, **change)) == 300
    assert desk.ask(T0 + 400, sender=Mailbox("ANN", "their.example"), to=Mailbox("JOE", "ours.example")) == ACCEPT


def test_it_survives_a_restart(desk: Desk) -> None:
    desk.ask(T0)
    second = desk.restarted()
    assert seconds_left(second.ask(T0 + 200)) == 100
    assert second.ask(T0 + 300) == ACCEPT
    third = second.restarted()
    assert third.ask(T0 + 301) == ACCEPT
    assert third.greylist.statistics()["known"] == 1
    third.settle()


def test_too_late_is_a_first_contact_again(desk: Desk) -> None:
    desk.ask(T0)
    assert seconds_left(desk.ask(T0 + 2 * DAY + 1)) == 300
    assert desk.ask(T0 + 2 * DAY + 400) == ACCEPT
    assert seconds_left(desk.ask(T0 + 40 * DAY)) == 300


def test_use_keeps_it_alive(desk: Desk) -> None:
    desk.ask(T0)
    now = T0 + 300
    assert desk.ask(now) == ACCEPT
    for _ in range(3):
        now += 30 * DAY
        assert desk.ask(now) == ACCEPT
    second = desk.restarted()
    assert second.ask(now + 30 * DAY) == ACCEPT
    second.settle()


def test_a_network_that_passed_often_is_not_asked_any_more(desk: Desk) -> None:
    for number in range(5):
        assert seconds_left(desk.ask(T0, to=Mailbox(f"u{number}", "ours.example"))) == 300
    for number in range(5):
        assert desk.ask(T0 + 300 + number, to=Mailbox(f"u{number}", "ours.example")) == ACCEPT
    assert desk.ask(T0 + 310, client="192.0.2.99", to=Mailbox("new", "ours.example")) == ACCEPT
    assert desk.greylist.statistics()["trusted_client"] == 1
    second = desk.restarted()
    assert second.ask(T0 + 400, sender=None) == ACCEPT
    assert second.ask(T0 + 400, sender=Mailbox("other", "x.example")) == ACCEPT
    assert seconds_left(second.ask(T0 + 400 + 36 * DAY, to=Mailbox("new", "ours.example"))) == 300
    second.settle()


def test_repeating_one_triplet_earns_no_trust(desk: Desk) -> None:
    desk.ask(T0)
    for number in range(20):
        assert desk.ask(T0 + 300 + number) == ACCEPT
    assert seconds_left(desk.ask(T0 + 400, sender=None)) == 300


def test_networks_on_the_list_and_a_greylist_switched_off(desk: Desk) -> None:
    listed = Desk(desk.database, allow_networks=("192.0.2.0/28", "2001:db8::/32"))
    assert listed.ask(T0) == ACCEPT
    assert listed.ask(T0, client="::ffff:192.0.2.1") == ACCEPT
    assert listed.ask(T0, client="2001:db8::5") == ACCEPT
    assert seconds_left(listed.ask(T0, client="192.0.2.16")) == 300
    listed.settle()
    off = Desk(desk.database, enabled=False)
    assert off.ask(T0, client="192.0.9.9") == ACCEPT
    off.greylist.start()
    off.settle()


def test_passing_costs_no_query_and_is_synchronous(desk: Desk) -> None:
    desk.ask(T0)
    desk.ask(T0 + 300)
    desk.settle()
    reads, writes = desk.database.reads, desk.database.writes

    def ask_often() -> bool:
        return all(desk.greylist.check("192.0.2.1", SENDER, JOE, T0 + 301 + n) == ACCEPT for n in range(1000))

    assert run(ask_often)
    desk.settle()
    assert (desk.database.reads, desk.database.writes) == (reads, writes)


def test_many_at_once_are_read_and_written_in_batches(desk: Desk) -> None:
    reads, writes = desk.database.reads, desk.database.writes

    def flood() -> Any:
        asked = [
            maybeDeferred(desk.greylist.check, f"198.51.{n % 100}.1", SENDER, Mailbox(f"u{n}", "ours.example"), T0)
            for n in range(1000)
        ]
        return gatherResults(asked)

    assert all(isinstance(verdict, Defer) for verdict in run(flood))
    desk.settle()
    assert desk.database.reads - reads <= 20
    assert desk.database.writes - writes <= 40
    assert run(desk.greylist.count_rows) == {"waiting": 1000, "passed": 0, "clients": 0}


def test_the_same_triplet_at_once_is_one_first_contact(desk: Desk) -> None:
    def twice() -> Any:
        return gatherResults([maybeDeferred(desk.greylist.check, "192.0.2.1", SENDER, JOE, T0 + n) for n in range(3)])

    assert [seconds_left(verdict) for verdict in run(twice)] == [300, 299, 298]


def test_memory_is_bounded(desk: Desk) -> None:
    small = Desk(desk.database, cache_entries=10, client_passes=0)
    for number in range(30):
        to = Mailbox(f"u{number}", "ours.example")
        small.ask(T0, to=to)
        assert small.ask(T0 + 300, to=to) == ACCEPT
    assert small.greylist.statistics()["cached_triplets"] <= 10
    assert small.ask(T0 + 301, to=Mailbox("u0", "ours.example")) == ACCEPT, "what memory lost is on disk"
    small.settle()


def test_an_unavailable_database_is_try_again(desk: Desk) -> None:
    desk.ask(T0)
    desk.ask(T0 + 300)
    for problem in (Unavailable("down"), RuntimeError("a driver's surprise")):
        desk.database.problem = lambda problem=problem: fail(problem)
        assert desk.ask(T0 + 301, sender=None) == Defer(TRY_AGAIN)
        assert desk.ask(T0 + 301) == ACCEPT
    assert desk.greylist.statistics()["unavailable"] == 2


def test_what_could_not_be_written_is_written_later(desk: Desk) -> None:
    def fail_from_now_on(verdict: Verdict) -> Verdict:
        desk.database.problem = lambda: fail(Unavailable("down"))
        return verdict

    def ask() -> Any:
        answer = desk.greylist.check("192.0.2.1", SENDER, JOE, T0)
        assert isinstance(answer, Deferred)
        return answer.addCallback(fail_from_now_on)

    run(ask)
    deadline = time.monotonic() + 10
    while not desk.greylist.statistics()["write_failures"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert seconds_left(desk.ask(T0 + 100)) == 200, "and is known meanwhile"
    desk.database.problem = None
    second = desk.restarted()
    assert second.ask(T0 + 300) == ACCEPT
    second.settle()


def test_old_rows_go_in_slices(desk: Desk) -> None:
    def fill(connection: Any) -> None:
        triplets = {}
        for number in range(2500):
            seen = T0 - number * 100.0
            record = table.TripletRecord(seen, seen, number % 2 == 0, 1)
            triplets[table.Triplet("192.0.2.0/24", "", f"u{number}@ours.example")] = record
        table.write(connection, triplets, {f"198.51.{n}.0/24": table.ClientRecord(1, T0 - n * DAY) for n in range(50)})

    run(desk.database.write, fill)
    # Two days are 1728 steps: odd ones behind them waited in vain.
    assert run(desk.greylist.expire, T0) == 386 + 14
    assert run(desk.greylist.count_rows) == {"waiting": 864, "passed": 1250, "clients": 36}
    assert run(desk.greylist.expire, T0) == 0
    run(desk.greylist.expire, T0 + 40 * DAY)
    assert run(desk.greylist.count_rows) == {"waiting": 0, "passed": 0, "clients": 0}
    assert desk.greylist.statistics()["expired"] > 2500


def test_the_service_expires_by_itself(desk: Desk) -> None:
    def fill(connection: Any) -> None:
        old = table.TripletRecord(T0 - 3 * DAY, T0 - 3 * DAY)
        table.write(connection, {table.Triplet("192.0.2.0/24", "", "x@ours.example"): old}, {})

    run(desk.database.write, fill)
    run(desk.greylist.start)
    deadline = time.monotonic() + 10
    while run(desk.greylist.count_rows)["waiting"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_statements_use_the_indexes(tmp_path: Path) -> None:
    key = {"network": "n", "reverse_path": "r", "forward_path": "f"}
    statements = [
        (table.TRIPLET, key),
        (table.CLIENTS, {"networks": ["a", "b"]}),
        (table.OLD_ROWS, {"after": 0.0, "before": 1.0}),
        (table.OLD_CLIENTS, {"before": 1.0}),
    ]
    with open_database("sqlite", tmp_path, "counters") as database:

        def plans(connection: Any) -> list[str]:
            literal = {"literal_binds": True, "render_postcompile": True}
            return [
                row[3]
                for statement, values in statements
                for row in connection.exec_driver_sql(
                    "EXPLAIN QUERY PLAN "
                    + str(statement.params(values).compile(connection.engine, compile_kwargs=literal))
                )
            ]

        found = run(database.read, plans)
        assert len(found) == 4 and all(step.startswith("SEARCH") for step in found), found
