# SPDX-License-Identifier: MIT
"""Known clients: over restarts, between processes, forgotten in time, bounded, and with a database that fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from twisted.internet.defer import Deferred, fail

from polarismail.store import known_clients as table
from polarismail.store import schema
from polarismail.store.known_clients import KnownClients, KnownSettings
from polarismail.values.errors import Unavailable
from tests.databases import KINDS, SwitchedDatabase, open_database
from tests.reactor import reactor, run

DAY = 86400.0
T0 = 1_800_000_000.0
ANN, JOE = "192.0.2.1/32", "2001:db8::/64"


class Memory:
    """One process's known clients."""

    def __init__(self, database: SwitchedDatabase, **settings: Any) -> None:
        self.database = database
        self.known = KnownClients(database, reactor, KnownSettings(**settings), now=lambda: T0)

    def is_known(self, network: str, now: float = T0) -> bool:
        """As at the gate: from memory, else from the database."""
        return run(self.known.is_known, network, now) or run(self.known.find, network, now)

    def remember(self, network: str, now: float = T0) -> None:
        run(self.known.remember, network, now)

    def settle(self) -> None:
        run(self.known.stop)
        assert run(self.known.statistics)["known_unwritten"] == 0


@pytest.fixture(scope="module", params=KINDS)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwitchedDatabase]:
    with open_database(request.param, tmp_path_factory.mktemp("known"), "counters") as database:
        yield SwitchedDatabase(database)


@pytest.fixture
def database(shared: SwitchedDatabase) -> SwitchedDatabase:
    shared.problem = None
    run(shared.write, lambda connection: connection.execute(schema.known_clients.delete()) and None)
    return shared


def test_who_passed_is_known_at_once_and_after_a_restart(database: SwitchedDatabase) -> None:
    memory = Memory(database)
    assert not memory.is_known(ANN)
    memory.remember(ANN)
    assert run(memory.known.is_known, ANN, T0)
    memory.settle()
    again = Memory(database)
    assert not run(again.known.is_known, ANN, T0)  # nothing is read before somebody comes
    assert again.is_known(ANN, T0 + DAY)
    assert run(again.known.is_known, ANN, T0 + DAY)
    assert not again.is_known(JOE)
    again.settle()


def test_a_week_after_the_last_visit_it_is_a_stranger_again(database: SwitchedDatabase) -> None:
    memory = Memory(database)
    memory.remember(ANN)
    assert memory.is_known(ANN, T0 + 6 * DAY)
    memory.settle()
    again = Memory(database)
    assert again.is_known(ANN, T0 + 12 * DAY)  # the visit was written down
    again.settle()
    assert not Memory(database).is_known(ANN, T0 + 20 * DAY)
    assert not memory.is_known(ANN, T0 + 20 * DAY)
    memory.settle()


def test_a_clock_that_was_set_back_makes_nobody_a_stranger(database: SwitchedDatabase) -> None:
    memory = Memory(database)
    memory.remember(ANN, T0)
    assert memory.is_known(ANN, T0 - 30 * DAY)
    memory.settle()


def test_what_one_process_forgets_others_forget_soon(database: SwitchedDatabase) -> None:
    one, other = Memory(database), Memory(database)
    one.remember(ANN)
    one.settle()
    assert other.is_known(ANN)
    run(one.known.forget, ANN)
    assert not one.is_known(ANN)
    one.settle()
    # The visit that makes the other look is the last that passes; and its being written down makes no row again.
    assert run(other.known.is_known, ANN, T0 + 3700)
    run(other.known.find, ANN, T0 + 3700)
    other.settle()
    assert not run(other.known.is_known, ANN, T0 + 3700)
    assert not Memory(database).is_known(ANN)


def test_what_is_not_written_yet_counts(database: SwitchedDatabase) -> None:
    memory = Memory(database, known_in_memory=1)
    memory.remember(ANN)
    memory.settle()
    run(memory.known.forget, ANN)
    assert not memory.is_known(ANN)
    memory.remember(JOE)
    memory.remember(ANN)  # there is room for one
    assert memory.is_known(JOE)
    memory.settle()


def test_memory_and_disk_are_bounded(database: SwitchedDatabase) -> None:
    memory = Memory(database, known_in_memory=50, known_on_disk=1200)
    for number in range(3500):
        run(memory.known.remember, f"10.0.{number >> 8}.{number & 255}/32", T0 + number)
    assert run(memory.known.statistics)["known_in_memory"] == 50
    memory.settle()
    assert run(memory.known.expire, T0) == 2300
    assert run(database.read, table.count_rows) == 1200
    assert not memory.is_known("10.0.0.0/32", T0)
    assert memory.is_known(f"10.0.{3400 >> 8}.{3400 & 255}/32", T0 + 4000)
    assert run(memory.known.expire, T0 + 7 * DAY + 3000) == 700
    assert run(database.read, table.count_rows) == 500


def test_a_start_forgets_what_is_old(database: SwitchedDatabase) -> None:
    memory = Memory(database)
    memory.remember(ANN, T0 - 8 * DAY)
    memory.settle()
    run(memory.known.start)
    run(memory.known.expire, T0)  # behind the one that the start began
    assert run(database.read, table.count_rows) == 0
    memory.settle()


@pytest.mark.parametrize("problem", [lambda: fail(Unavailable("gone")), lambda: fail(RuntimeError("broken"))])
def test_without_the_database_strangers_stay_strangers_and_nothing_is_lost(
    database: SwitchedDatabase, problem: Any
) -> None:
    memory = Memory(database)
    memory.remember(ANN)
    memory.settle()
    database.problem = problem
    assert not memory.is_known(JOE)
    assert memory.is_known(ANN, T0 + 1000)
    memory.remember(JOE)
    run(memory.known.stop)
    assert run(memory.known.statistics)["known_write_failures"] == 1
    assert memory.is_known(JOE)
    database.problem = None
    memory.settle()
    assert Memory(database).is_known(JOE)


def test_what_cannot_be_written_is_bounded(database: SwitchedDatabase) -> None:
    memory = Memory(database, known_in_memory=10)
    silent: Deferred[None] = Deferred()
    database.problem = lambda: silent
    for number in range(100):
        memory.remember(f"192.0.2.{number}/32")
    stopped = run(lambda: [memory.known.stop()])[0]
    database.problem = None
    run(silent.errback, Unavailable("gone"))
    run(lambda: stopped)
    assert run(memory.known.statistics)["known_unwritten"] == 10
    memory.settle()
