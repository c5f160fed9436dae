# SPDX-License-Identifier: MIT
"""One database behind one URL: writes that are grouped and durable when they answer, reads that never block a writer.

Guarantees
    A Deferred of `write` fires after the commit that holds it; with `durable`, a power cut cannot undo it then.
    Each job has an outcome of its own: one that raises is undone while the rest of its group commits.
    Writers of all processes queue on one file lock (SQLite), and commit in groups.
    The schema is migrated before the first job runs.

Never
    A job on the reactor's thread; a SQL string built from data; an answer "not found" where there was none.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from sqlalchemy import Connection, Dialect, Engine
from twisted.internet.defer import Deferred, fail
from twisted.logger import Logger

from polarismail.store.committer import Committer, Lane
from polarismail.store.dialects import as_polaris_error, is_database_error, make_engine, sqlite_path
from polarismail.store.lock import NoLock, WritersLock
from polarismail.store.migrations import migrate
from polarismail.store.nodes import LEASE_SECONDS, Nodes
from polarismail.store.reserve import RESERVE_OCTETS, Reserve
from polarismail.store.threads import Answers, Workers
from polarismail.values.errors import ConfigError, SpoolUnhealthy, Unavailable

T = TypeVar("T")
MAIN, COUNTERS = "main", "counters"


class Database:
    """The database of one branch (`main` or `counters`), as one process uses it.

    `incarnation` is this process's number, counted up durably at each start (0 where it does not join; on PostgreSQL it
    changes when the process slept past its lease). `healthy` turns false for good when the disk fails.
    """

    log = Logger()

    def __init__(
        self,
        url: str,
        *,
        reactor: Any,
        lock_path: str | None = None,
        branch: str = MAIN,
        durable: bool | None = None,
        joins: bool | None = None,
        readers: int = 2,
        lease_seconds: float = LEASE_SECONDS,
        reserve_octets: int = RESERVE_OCTETS,
    ) -> None:
        """Nothing is opened yet. `lock_path`: where SQLite's writers queue; None means beside the file. `durable`: whether
        a commit survives a power cut; by default for `main` alone. `joins`: whether the process owns recipients (the
        server; by default on `main`) or only looks in (commands). `reserve_octets`: room kept beside SQLite's file for the
        day when the disk is full. `reactor` may be None where only `transaction` is used.

        Raises ConfigError for a URL that cannot be used.
        """
        self.url, self.branch = url, branch
        self.durable = branch == MAIN if durable is None else durable
        self._path = sqlite_path(url)
        self._joins = branch == MAIN if joins is None else joins
        self._lock_path = (lock_path or f"{self._path}.lock") if self._path else None
        self._writer = make_engine(url, durable=self.durable, writes=True)
        self._reader = make_engine(url, durable=self.durable, writes=False)
        self._nodes = Nodes(self._lock_path, lease_seconds)
        self._reserve = Reserve(f"{self._path}.reserve", reserve_octets) if self._path and self._joins else None
        self._answers = Answers(reactor)
        self._reader_threads, self._lease_seconds = readers, lease_seconds
        self._committer: Committer | None = None
        self._lock: WritersLock | NoLock = NoLock()
        self._readers: Workers | None = None
        self._released: list[Callable[[], None]] = []
        self._reactor = reactor

    # -- opening and closing

    def start(self) -> Deferred[None]:
        """Open, migrate to the newest revision, join, recover what the dead owned, and take jobs.

        Fails with Unavailable, or ConfigError.
        """
        return self.in_thread(self.open)

    def stop(self) -> Deferred[None]:
        """Commit what waits, answer it, and close. What comes later fails with Unavailable."""
        return self.in_thread(self.close)

    def open(self) -> None:
        """What `start` does, in this thread. Raises Unavailable, ConfigError."""
        try:
            self._prepare()
        except Exception as error:
            self._nodes.close()
            self._lock.close()
            raise as_polaris_error(error) from error
        tick = self._tick if self._joins else None
        committer = Committer(self._writer, self._lock, self._answers, tick, self._lease_seconds / 6, self._reserve)
        if self._reserve is not None:
            committer.full = not self._reserve.fill()
        self._readers = Workers(
            self._answers, f"{self.branch}-reader", self._reader_threads, lambda: _Reader(self._reader), _Reader.close
        )
        committer.start()
        self._committer = committer

    def close(self) -> None:
        """What `stop` does, in this thread (never the reactor's). Idempotent."""
        committer, readers = self._committer, self._readers
        self._committer = self._readers = None
        if readers is not None:
            readers.stop()
        if committer is not None:
            if self._joins and committer.healthy:
                committer.write(self._nodes.leave).addErrback(self._not_left)
            committer.stop()
            self._nodes.close()
            self._lock.close()
        self._writer.dispose()
        self._reader.dispose()

    # -- work

    @property
    def incarnation(self) -> int:
        """This process's number; 0 where it does not join."""
        return self._nodes.incarnation

    @property
    def healthy(self) -> bool:
        """False once the disk under the database has failed, until the process is started anew."""
        return self._committer is None or self._committer.healthy

    @property
    def full(self) -> bool:
        """True while there is no room for new mail on the disk under a SQLite database."""
        return self._committer is not None and self._committer.full

    def statistics(self) -> dict[str, Any]:
        """What commits have cost since the start; empty where the database is closed."""
        return {} if self._committer is None else self._committer.statistics.summary()

    @property
    def dialect(self) -> Dialect:
        """For compiling statements."""
        return self._writer.dialect

    @property
    def is_sqlite(self) -> bool:
        """Whether content may be files beside the database: only one machine sees it."""
        return self._path is not None

    def write(self, job: Callable[[Connection], T]) -> Deferred[T]:
        """Run `job(connection)` inside the next group's transaction, in a savepoint, on the committer's thread.

        Fires with its result after the commit. Fails with what the job raised (it is undone), or, where the database
        cannot answer, with Unavailable or SpoolUnhealthy: then whether it was stored is in doubt.
        """
        committer = self._committer
        if committer is None:
            return fail(Unavailable("the database is closed"))
        return committer.write(job)

    def submit(self, lane: Lane, payload: Any) -> Deferred[Any]:
        """Like `write`, for work of one kind that is done together with all its like in the group."""
        committer = self._committer
        if committer is None:
            return fail(Unavailable("the database is closed"))
        return committer.submit(lane, payload)

    def read(self, job: Callable[[Connection], T]) -> Deferred[T]:
        """Run `job(connection)` on a reader's thread, in a transaction that sees one state and may not write.

        Keep it under 100 ms: a long reader keeps the WAL from being checkpointed. Fails as `write` does.
        """
        readers = self._readers
        if readers is None:
            return fail(Unavailable("the database is closed"))
        return readers.submit(_Reader.run, job)

    def take_over(self, incarnation: int) -> Deferred[bool]:
        """A process that shares the database has died, as its parent knows: give back what it owned now, not when its lease
        has run out. Fires with whether nobody had done so before; those who listen to `when_released` have been told then."""

        def release(connection: Connection) -> bool:
            self._nodes.declare_dead(connection, incarnation)
            return self._nodes.release_dead(connection)

        def released(was_dead: bool) -> bool:
            if was_dead:
                self._announce()
            return was_dead

        return self.write(release).addCallback(released)

    def when_released(self, callback: Callable[[], None]) -> None:
        """Call this on the reactor's thread whenever a dead process's recipients have become claimable."""
        self._released.append(callback)

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One transaction in this thread, for commands where no server runs: migrated first, locked as any writer.

        Raises Unavailable, ConfigError.
        """
        try:
            self._prepare_file()
            lock = WritersLock(self._lock_path) if self._lock_path else NoLock()
        except OSError as problem:
            raise Unavailable(f"the database cannot be opened: {problem}") from problem
        try:
            with lock, self._writer.begin() as connection:
                migrate(connection, self.branch)
                yield connection
        except Exception as error:
            if is_database_error(error):
                raise as_polaris_error(error) from error
            raise
        finally:
            lock.close()

    # -- inside

    def _prepare(self) -> None:
        self._prepare_file()
        self._lock = WritersLock(self._lock_path) if self._lock_path else NoLock()
        with self._lock, self._writer.begin() as connection:
            if migrate(connection, self.branch):
                self.log.info("migrated the {branch} database", event="migrated", branch=self.branch)
            if self._joins:
                self._nodes.join(connection)
                self._nodes.release_dead(connection, thorough=True)
        if self._path is not None:
            _sync_directory(os.path.dirname(self._path))

    def _prepare_file(self) -> None:
        if self._path is None:
            return
        if not os.path.isdir(os.path.dirname(self._path)):
            raise ConfigError(f"{self.url}: there is no directory {os.path.dirname(self._path)}")
        # SQLite gives its -wal and -shm the mode of the database.
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))

    def _tick(self, connection: Connection) -> Callable[[], None] | None:
        renewed = self._nodes.renew(connection)
        if not renewed:
            self.log.warn(
                "slept past the lease: joined anew as {incarnation}", event="lease_lost", incarnation=self.incarnation
            )
        released = self._nodes.release_dead(connection)
        return self._announce if released or not renewed else None

    def _announce(self) -> None:
        for callback in self._released:
            self._reactor.callFromThread(callback)

    def _not_left(self, failure: Any) -> None:
        self.log.warn("could not say goodbye: {error}", event="leave_failed", error=failure.getErrorMessage())

    def in_thread(self, function: Callable[[], None]) -> Deferred[None]:
        """Run something rare that blocks in a thread of its own."""
        deferred: Deferred[None] = Deferred()

        def run() -> None:
            try:
                function()
            except Exception as error:
                self._answers.put([(deferred, None, error)])
            else:
                self._answers.put([(deferred, None, None)])

        threading.Thread(target=run, name=f"{self.branch}-database", daemon=True).start()
        return deferred


class _Reader:
    """One reader thread's connection, made again after an error."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: Connection | None = None

    def run(self, job: Callable[[Connection], T]) -> T:
        try:
            if self._connection is None:
                self._connection = self._engine.connect()
            with self._connection.begin():
                return job(self._connection)
        except Exception as error:
            if not is_database_error(error):
                raise
            self.close()
            raise as_polaris_error(error) from error

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        raise SpoolUnhealthy(f"{path} cannot be synced: {problem}") from problem
    finally:
        os.close(descriptor)
