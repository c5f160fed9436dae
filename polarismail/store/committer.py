# SPDX-License-Identifier: MIT
"""Group commit: everything that waits becomes durable with one sync, and is answered with one wake-up.

One thread per process and database. A group forms by itself while the one before it is being synced, so an idle server
adds no delay (DURABILITY, "What it costs"). Within a group each job has an outcome of its own: one that fails is rolled
back to its savepoint while the rest commits. When the commit itself fails, every job of the group fails, and whether it
happened is in doubt.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from sqlalchemy import Connection, Engine
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from polarismail.store.commit_statistics import CommitStatistics
from polarismail.store.dialects import as_polaris_error, is_final, is_full, is_lost
from polarismail.store.reserve import Reserve
from polarismail.store.threads import Answers
from polarismail.values.errors import SpoolFull, SpoolUnhealthy, Unavailable

# So that no transaction is long: about 30 ms of inserts.
_LARGEST_GROUP = 1000
# Under load a group may wait so long to grow, and no longer once so many are in it. The wait costs a client less than
# what its share of a sync, and of a dozen hand-overs of the interpreter, costs the server.
_GATHER_SECONDS = 0.0015
_ENOUGH = 9
# Work that nobody waits for (a lane that is `patient`) goes with the next group, or alone after so long.
_PATIENCE_SECONDS = 0.005


class Job:
    """One piece of work on its way through a group. A lane sets `value` or `error`; `error` wins."""

    __slots__ = ("deferred", "error", "lane", "payload", "submitted", "value")

    def __init__(self, lane: Lane, payload: Any) -> None:
        self.lane, self.payload = lane, payload
        self.submitted = time.monotonic()
        self.deferred: Deferred[Any] = Deferred()
        self.value: Any = None
        self.error: BaseException | None = None


class DoApart(Exception):
    """What was done together did not work out: roll the group back, and do each of its jobs in its savepoint."""


class Lane(Protocol):
    """Jobs of one kind, which know how to be done together. `needs_room`: not to be tried while the disk is full.
    `patient`: nobody waits for them, so they may wait a little for company. `name`: for statistics."""

    name: str
    needs_room: bool
    patient: bool

    def run(self, connection: Connection, jobs: Sequence[Job], together: bool) -> None:
        """Do all of them inside the group's transaction, setting `value` or `error` of each.

        `together`: in the quickest way, without a savepoint where none is needed; raises DoApart where that fails, and
        is then called again with `together` false in a fresh transaction. What else it raises fails the whole group:
        only a connection that is lost may do so.
        """


class SavepointLane:
    """Plain functions of the connection, each in its savepoint."""

    name = "other"
    needs_room = False
    patient = False

    def run(self, connection: Connection, jobs: Sequence[Job], together: bool) -> None:
        for job in jobs:
            run_in_savepoint(connection, job, _call)


def _call(connection: Connection, function: Callable[[Connection], Any]) -> Any:
    return function(connection)


def run_in_savepoint(connection: Connection, job: Job, function: Callable[[Connection, Any], Any]) -> None:
    """Set the job's value to what the function makes of its payload; undo that and set the job's error where it raises."""
    savepoint = connection.begin_nested()
    try:
        job.value = function(connection, job.payload)
        savepoint.commit()
    except Exception as error:
        if is_lost(error):
            raise
        savepoint.rollback()
        job.error = as_polaris_error(error)


class Committer:
    """The thread that writes. `healthy` turns false for good when the disk fails (DURABILITY rule 1); `full` is true while
    there is no room for new mail: the reserve has been given up, so that outcomes go on being recorded."""

    log = Logger()

    def __init__(
        self,
        engine: Engine,
        lock: AbstractContextManager[None],
        answers: Answers,
        tick: Callable[[Connection], Callable[[], None] | None] | None = None,
        tick_seconds: float = 5.0,
        reserve: Reserve | None = None,
    ) -> None:
        """`tick` runs inside a transaction every `tick_seconds`, and before any group that comes later than that; what it
        returns is called after the commit."""
        self.healthy, self.full = True, False
        self.statistics = CommitStatistics()
        self._reserve = reserve
        self._engine, self._lock, self._answers = engine, lock, answers
        self._tick, self._tick_seconds = tick, tick_seconds
        self._next_tick = time.monotonic() + tick_seconds
        self._wake = threading.Condition()
        self._waiting: list[Job] = []
        self._urgent = 0  # of those that wait
        self._stopping = False
        self._last_size = 0
        self._connection: Connection | None = None
        self._savepoints = SavepointLane()
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)

    def start(self) -> None:
        """Begin to take groups."""
        self._thread.start()

    def submit(self, lane: Lane, payload: Any) -> Deferred[Any]:
        """Put work into the next group. Fires after the commit; fails with Unavailable, SpoolUnhealthy (the outcome is in
        doubt), or what the work raised (nothing of it was stored)."""
        job = Job(lane, payload)
        with self._wake:
            if self._stopping:
                job.deferred.errback(Unavailable("the database is closed"))
                return job.deferred
            self._waiting.append(job)
            if not lane.patient:
                self._urgent += 1
            if len(self._waiting) == 1 or self._urgent == 1 or self._urgent == _ENOUGH:
                self._wake.notify()
        return job.deferred

    def write(self, function: Callable[[Connection], Any]) -> Deferred[Any]:
        """Run a function in a savepoint of the next group."""
        return self.submit(self._savepoints, function)

    def stop(self) -> None:
        """Commit what waits, then end the thread. Blocks; not for the reactor's thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._stopping and not self._tick_due():
                    self._wake.wait(None if self._tick is None else max(0.0, self._next_tick - time.monotonic()))
                self._gather()
                group, self._waiting = self._waiting[:_LARGEST_GROUP], self._waiting[_LARGEST_GROUP:]
                self._last_size = self._urgent or self._last_size
                self._urgent = sum(not job.lane.patient for job in self._waiting)
                stopping = self._stopping and not self._waiting
            self._commit(group)
            self._answers.put([(job.deferred, job.value, job.error) for job in group])
            self._record_answers(group)
            del group
            if stopping:
                self._disconnect()
                return

    def _gather(self) -> None:
        """Let the group grow for a moment. A server with one client at a time adds no delay (DURABILITY)."""
        if self._waiting and not self._urgent:
            self._wait_for(_PATIENCE_SECONDS, 1)
        if self._urgent and self._last_size > 1:
            self._wait_for(_GATHER_SECONDS, _ENOUGH)

    def _wait_for(self, seconds: float, urgent: int) -> None:
        until = time.monotonic() + seconds
        while self._urgent < urgent and not self._stopping and (left := until - time.monotonic()) > 0:
            self._wake.wait(left)

    def _tick_due(self) -> bool:
        return self._tick is not None and time.monotonic() >= self._next_tick

    def _commit(self, group: Sequence[Job], *, again: bool = False) -> None:
        lanes: dict[Lane, list[Job]] = {}
        for job in group:
            job.error = SpoolFull("there is no room for more mail") if self.full and job.lane.needs_room else None
            if job.error is None:
                lanes.setdefault(job.lane, []).append(job)
        try:
            if not self.healthy:
                raise SpoolUnhealthy("the disk under the database has failed")
            begun = time.monotonic()
            with self._lock:
                locked = time.monotonic()
                afterwards = self._write(lanes)
            self._record_group(lanes, locked - begun, time.monotonic() - locked)
            if afterwards is not None:
                afterwards()
        except Exception as error:
            # Rolled back, or in doubt where COMMIT itself failed: nobody may be told that it is done.
            if is_full(error) and self._reserve is not None and not again:
                self._give_up_reserve()
                self._commit(group, again=True)
                return
            self._disconnect()
            if is_final(error):
                self.healthy = False
            self.log.error(
                "a group of {jobs} was not committed: {error}", event="commit_failed", jobs=len(group), error=str(error)
            )
            for job in group:
                job.error = as_polaris_error(error)

    def _write(self, lanes: dict[Lane, list[Job]]) -> Callable[[], None] | None:
        connection = self._connection
        if connection is None:
            connection = self._connection = self._engine.connect()
        next_tick = self._next_tick
        try:
            return self._transact(connection, lanes, True)
        except DoApart:
            self._next_tick = next_tick
            for jobs in lanes.values():
                for job in jobs:
                    job.value = job.error = None
            return self._transact(connection, lanes, False)

    def _transact(
        self, connection: Connection, lanes: dict[Lane, list[Job]], together: bool
    ) -> Callable[[], None] | None:
        afterwards = None
        with connection.begin():
            if self._tick is not None and self._tick_due():
                # At once, not after the commit: where this group finds the disk full, its second try must not tick, or
                # the reserve that was just given up would be taken back.
                self._next_tick = time.monotonic() + self._tick_seconds
                if self.full and self._reserve is not None and self._reserve.fill():
                    self.full = False
                    self.log.info("there is room again: mail is accepted", event="disk_has_room")
                afterwards = self._tick(connection)
            # Plain functions last: they are called once, unless one of the others must be done apart.
            for lane in sorted(lanes, key=lambda lane: lane is self._savepoints):
                lane.run(connection, lanes[lane], together)
        return afterwards

    def _record_group(self, lanes: dict[Lane, list[Job]], lock_seconds: float, commit_seconds: float) -> None:
        if not lanes:
            return  # a tick
        self.statistics.record_group(sum(map(len, lanes.values())), lock_seconds, commit_seconds)
        for lane, jobs in lanes.items():
            self.statistics.record_jobs(lane.name, sum(job.error is None for job in jobs))

    def _record_answers(self, group: Sequence[Job]) -> None:
        now = time.monotonic()
        for job in group:
            if not job.lane.patient:
                self.statistics.record_answer(now - job.submitted)

    def _give_up_reserve(self) -> None:
        assert self._reserve is not None
        self.full = True
        self._reserve.release()
        self.log.critical("the disk is full: no mail is accepted until there is room", event="disk_full")

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.close()
            except Exception as error:
                self.log.warn("closing the database: {error}", event="close_failed", error=str(error))
