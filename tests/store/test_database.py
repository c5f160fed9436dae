# SPDX-License-Identifier: MIT
"""Group commit, readers, and what the callers of a database are told."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, insert, select, text
from twisted.internet.defer import Deferred, gatherResults

from polarismail.store import schema
from polarismail.store.database import Database
from polarismail.store.threads import Answers
from polarismail.values.errors import ConfigError, Unavailable
from tests.databases import KINDS, database_url, open_database
from tests.reactor import reactor, run

generations = schema.generations


@pytest.fixture(params=KINDS)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    with open_database(request.param, tmp_path) as opened:
        yield opened


def put(name: str, value: int = 1) -> Any:
    return lambda connection: connection.execute(insert(generations).values(name=name, value=value))


def names(database: Database) -> list[str]:
    query = select(generations.c.name).order_by(generations.c.name)
    return run(database.read, lambda connection: list(connection.execute(query).scalars()))


def in_one_group(database: Database, *jobs: Any) -> list[Any]:
    gate = threading.Event()

    def submit() -> Deferred[Any]:
        database.write(lambda connection: gate.wait(20))
        results = [database.write(job).addErrback(lambda failure: failure.value) for job in jobs]
        gate.set()
        return gatherResults(results)

    return run(submit)


def test_what_is_written_is_there(database: Database) -> None:
    assert run(database.write, lambda connection: put("a")(connection) and "done") == "done"
    assert names(database) == ["a"]


def test_a_job_that_fails_is_undone_alone(database: Database) -> None:
    def fails(connection: Any) -> None:
        put("b")(connection)
        raise LookupError("not today")

    results = in_one_group(database, put("a"), fails, put("a"), put("c"))
    assert isinstance(results[1], LookupError)
    assert isinstance(results[2], Unavailable)  # the name is taken: the database's own complaint
    assert names(database) == ["a", "c"]


def test_jobs_of_a_group_run_in_order(database: Database) -> None:
    in_one_group(database, put("a", 1), lambda c: c.execute(delete(generations)), put("b", 2))
    assert names(database) == ["b"]


def test_one_wake_up_for_a_group(database: Database) -> None:
    wake_ups = []

    class Counting:
        def callFromThread(self, function: Any, *args: Any) -> None:
            wake_ups.append(1)
            reactor.callFromThread(function, *args)

    answers = Answers(Counting())
    fired: list[int] = []
    everything: Deferred[None] = Deferred()

    def answer() -> Deferred[None]:
        waiting: list[Deferred[int]] = [Deferred() for _ in range(100)]
        for deferred in waiting:
            deferred.addCallback(fired.append)
        answers.put([(deferred, at, None) for at, deferred in enumerate(waiting)])
        answers.put([(everything, None, None)])
        return everything

    run(answer)
    assert fired == list(range(100))
    assert len(wake_ups) == 1


def test_readers_do_not_write(tmp_path: Path) -> None:
    with open_database("sqlite", tmp_path) as database, pytest.raises(Unavailable):
        run(database.read, put("a"))


def test_a_reader_lives_on_after_an_error(database: Database) -> None:
    for _ in range(4):
        with pytest.raises(Unavailable):
            run(database.read, lambda connection: connection.execute(text("SELECT * FROM nowhere")))
    assert names(database) == []


def test_a_closed_database_is_unavailable(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/main.db", reactor=reactor)
    for call in (database.read, database.write):
        with pytest.raises(Unavailable):
            run(call, lambda connection: None)
    run(database.start)
    run(database.stop)
    run(database.stop)
    with pytest.raises(Unavailable):
        run(database.write, put("a"))


@pytest.mark.parametrize("kind", KINDS)
def test_stopping_commits_what_waits(kind: str, tmp_path: Path) -> None:
    url = database_url(kind, tmp_path, "main")
    database = Database(url, reactor=reactor)
    run(database.start)

    def submit_and_stop() -> Deferred[Any]:
        waiting = [database.write(put(str(at))) for at in range(50)]
        return gatherResults([*waiting, database.stop()])

    run(submit_and_stop)
    again = Database(url, reactor=reactor)
    run(again.start)
    assert len(names(again)) == 50
    run(again.stop)


@pytest.mark.parametrize("kind", KINDS)
def test_incarnations_count_up_and_are_never_reused(kind: str, tmp_path: Path) -> None:
    url = database_url(kind, tmp_path, "main")
    seen = []
    for _ in range(4):
        database = Database(url, reactor=reactor)
        run(database.start)
        seen.append(database.incarnation)
        run(database.stop)
    assert seen == sorted(set(seen))
    onlooker = Database(url, reactor=reactor, joins=False)
    run(onlooker.start)
    assert onlooker.incarnation == 0
    run(onlooker.stop)


def test_writers_of_two_processes_queue(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/main.db"
    both = [Database(url, reactor=reactor) for _ in range(2)]
    for database in both:
        run(database.start)

    def submit() -> Deferred[Any]:
        return gatherResults([both[at % 2].write(put(str(at))) for at in range(400)])

    run(submit)
    assert len(names(both[0])) == 400
    for database in both:
        run(database.stop)


def test_a_writer_waits_for_the_lock(tmp_path: Path) -> None:
    with open_database("sqlite", tmp_path) as database:
        holder = os.open(f"{tmp_path}/main.db.lock", os.O_RDWR)
        fcntl.flock(holder, fcntl.LOCK_EX)
        waiting: list[Any] = []
        run(lambda: waiting.append(database.write(put("a"))))
        assert names(database) == []  # and readers are not stopped by it
        assert not waiting[0].called
        os.close(holder)
        run(lambda: waiting[0])
        assert names(database) == ["a"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_command_writes_beside_a_server(kind: str, tmp_path: Path) -> None:
    url = database_url(kind, tmp_path, "main")
    command = Database(url, reactor=None)
    with command.transaction() as connection:
        put("a")(connection)
    server = Database(url, reactor=reactor)
    run(server.start)
    with command.transaction() as connection:
        put("b")(connection)
    with pytest.raises(LookupError), command.transaction() as connection:
        put("c")(connection)
        raise LookupError("changed my mind")
    assert names(server) == ["a", "b"]
    run(server.stop)
    command.close()


def test_the_database_is_for_its_owner_alone(tmp_path: Path) -> None:
    with open_database("sqlite", tmp_path) as database:
        run(database.write, put("a"))
        for path in tmp_path.iterdir():
            assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://x/y", "nonsense", "oracle+x://a"])
def test_a_url_that_cannot_be_used_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigError):
        Database(url, reactor=reactor)


def test_a_missing_directory_is_a_configuration_error(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/nowhere/main.db", reactor=reactor)
    with pytest.raises(ConfigError, match="nowhere"):
        run(database.start)


def test_a_server_that_is_down_is_unavailable(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    database = Database(f"postgresql+psycopg://nobody@/nothing?host={tmp_path}", reactor=reactor)
    with pytest.raises(Unavailable):
        run(database.start)


def test_a_file_that_is_no_database_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "main.db").write_bytes(b"this is no database, but it is long enough to look at it" * 100)
    database = Database(f"sqlite:///{tmp_path}/main.db", reactor=reactor)
    with pytest.raises(Unavailable):
        run(database.start)


def test_the_core_does_without_psycopg(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["psycopg"] = None
import polarismail.store.spool
from polarismail.store.database import Database
from polarismail.values.errors import ConfigError
with Database("sqlite:///{tmp_path}/main.db", reactor=None).transaction() as connection:
    pass
try:
    Database("postgresql://user@host/name", reactor=None)
except ConfigError as problem:
    assert "postgresql" in str(problem)
else:
    raise SystemExit("no error")
assert "twisted.internet.reactor" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
