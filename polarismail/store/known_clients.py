# SPDX-License-Identifier: MIT
"""Clients that need not wait at the gate again: a bounded table in memory before a bounded one on disk, over restarts.

Guarantees: who is known is recognised from memory, at once; look-ups and changes go in batches; what is forgotten here is
forgotten by other processes within `_BELIEVED_SECONDS`; a database that cannot answer makes clients wait, and nothing else.
A power cut costs the last second of what was learned.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from time import time
from typing import Any

from attrs import field, frozen
from sqlalchemy import Connection, bindparam, delete, func, select, update
from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from polarismail.store.dialects import upsert
from polarismail.store.later_writes import LaterWrites
from polarismail.store.lookups import Lookups
from polarismail.store.lru import LruCache
from polarismail.store.schema import known_clients
from polarismail.values.checks import check_positive
from polarismail.values.errors import Unavailable

SLICE = 1000
_FLUSH_SECONDS = 0.5
_RETRY_SECONDS = 2.0  # after a write that failed
_REFRESH_SECONDS = 3600.0  # how stale the last visit may be on disk
_BELIEVED_SECONDS = 600.0  # before the database is asked again whether somebody else forgot this client
_EXPIRY_SECONDS = 600.0


@frozen
class KnownSettings:
    """How long and how many. Default: NUMBERS.md, "Pregreet", pass cache. Raises ValueError."""

    known_seconds: float = 7 * 86400.0  # since the last visit
    known_in_memory: int = field(default=20_000, validator=check_positive)
    known_on_disk: int = field(default=1_000_000, validator=check_positive)


class Change(enum.Enum):
    """What became of one client, to be written."""

    PASSED = "passed"
    SEEN = "seen"  # changes a row, and makes none: another process may have forgotten the client
    FORGOTTEN = "forgotten"


_Changes = dict[str, tuple[Change, float]]


class KnownClients:
    """Client networks by name. `now` is the wall clock that expiry uses; the other calls are told the time."""

    log = Logger()

    def __init__(
        self, database: Any, reactor: Any, settings: KnownSettings | None = None, *, now: Callable[[], float] = time
    ) -> None:
        self.settings = settings or KnownSettings()  # others may be put in their place; memory keeps its size
        self._database, self._reactor, self._now = database, reactor, now
        # When it was last seen, and until when that is believed.
        self._kept: LruCache[str, tuple[float, float]] = LruCache(self.settings.known_in_memory)
        self._changed: _Changes = {}
        self._writing: _Changes = {}
        self._writes = LaterWrites(reactor, self._has_changes, self._write)
        self._lookups: Lookups[str, float] = Lookups(self._fetch, reactor)
        self._expiry = LoopingCall(self._expire_now)
        self._expiry.clock = reactor
        self._write_failures = self._expired = 0

    def start(self) -> None:
        """Begin to forget what is old."""
        looping = self._expiry.start(_EXPIRY_SECONDS, now=True)
        looping.addErrback(lambda failure: self.log.failure("expiry of known clients ended", failure))

    def stop(self) -> Deferred[None]:
        """Write what is not yet written; fires when that is done or has failed."""
        if self._expiry.running:
            self._expiry.stop()
        return self._writes.stop()

    # -- asking ------------------------------------------------------------------------------------------------------

    def is_known(self, network: str, now: float) -> bool:
        """From memory alone; a visit of one that is known counts as such."""
        kept = self._kept.get(network)
        if kept is None or not self._is_fresh(kept[0], now):
            return False
        last_seen, believed_until = kept
        if now - last_seen >= _REFRESH_SECONDS:
            last_seen = now
            self._kept.put(network, (now, believed_until))
            self._change(network, Change.SEEN, now)
        if not 0 <= believed_until - now <= _BELIEVED_SECONDS:
            self._kept.put(network, (last_seen, now + _BELIEVED_SECONDS))
            self.find(network, now)
        return True

    def find(
        self, network: str, now: float, then: Callable[[str], None] | None = None, argument: str = ""
    ) -> Deferred[bool]:
        """Ask the database, because memory does not know, or no longer. Never fails. `then(argument)` is called where the
        network is known: one callback of a Deferred less to keep for each of thousands who wait."""
        answer: Deferred[Any] = self._lookups.ask(network)
        return answer.addCallbacks(self._found, self._not_found, (network, now, then, argument))

    def remember(self, network: str, now: float) -> None:
        """It has passed."""
        self._kept.put(network, (now, now + _BELIEVED_SECONDS))
        self._change(network, Change.PASSED, now)

    def forget(self, network: str) -> None:
        """It has to wait again, whoever it comes to."""
        self._kept.drop(network)
        self._change(network, Change.FORGOTTEN, 0.0)

    def statistics(self) -> dict[str, int]:
        """What is held, and what went wrong since the start."""
        return {
            "known_in_memory": len(self._kept),
            "known_unwritten": len(self._changed) + len(self._writing),
            "known_write_failures": self._write_failures,
            "known_expired": self._expired,
        }

    def _is_fresh(self, last_seen: float, now: float) -> bool:
        # A clock that jumped back leaves `last_seen` ahead: that ends by itself.
        return now - last_seen <= self.settings.known_seconds

    def _fetch(self, networks: Sequence[str]) -> Deferred[dict[str, float | Unavailable]]:
        fetched: Deferred[dict[str, float | Unavailable]] = self._database.read(partial(read, networks=networks))
        return fetched

    def _found(
        self, last_seen: float, network: str, now: float, then: Callable[[str], None] | None, argument: str
    ) -> bool:
        known = self._judge(last_seen, network, now)
        if known and then is not None:
            then(argument)
        return known

    def _judge(self, last_seen: float, network: str, now: float) -> bool:
        change = self._changed.get(network) or self._writing.get(network)
        if change is not None and change[0] is not Change.SEEN:
            return change[0] is Change.PASSED  # the database does not know of that yet
        if last_seen <= 0 or not self._is_fresh(last_seen, now):
            self._kept.drop(network)
            return False
        self._kept.put(network, (max(last_seen, (self._kept.get(network) or (0.0,))[0]), now + _BELIEVED_SECONDS))
        return True

    def _not_found(self, failure: Failure) -> bool:
        if failure.check(Unavailable) is None:
            self.log.failure("a known client could not be looked up", failure)
        return False

    # -- writing -----------------------------------------------------------------------------------------------------

    def _change(self, network: str, change: Change, now: float) -> None:
        waiting = self._changed.get(network)
        if change is Change.SEEN and waiting is not None:
            change = waiting[0]
        self._changed[network] = (change, now)
        self._writes.soon(_FLUSH_SECONDS)

    def _has_changes(self) -> bool:
        return bool(self._changed)

    def _write(self) -> Deferred[float]:
        self._writing, self._changed = self._changed, {}
        writing = self._database.write(partial(write, changes=self._writing))
        written: Deferred[float] = writing.addCallbacks(self._written, self._not_written)
        return written

    def _written(self, _: object) -> float:
        self._writing = {}
        return _FLUSH_SECONDS

    def _not_written(self, failure: Failure) -> float:
        if not self._write_failures or failure.check(Unavailable) is None:
            self.log.failure("known clients could not be written", failure)
        self._write_failures += 1
        # The newest, as many as memory may hold.
        merged = {**self._writing, **self._changed}
        surplus = max(0, len(merged) - self.settings.known_in_memory)
        self._changed = dict(list(merged.items())[surplus:])
        self._writing = {}
        return _RETRY_SECONDS

    # -- forgetting --------------------------------------------------------------------------------------------------

    def expire(self, now: float) -> Deferred[int]:
        """Forget who was not seen for too long, and the oldest where they are too many. Fails with Unavailable."""
        return Deferred.fromCoroutine(self._do_expire(now))

    def _expire_now(self) -> Deferred[None]:
        def failed(failure: Failure) -> None:
            # The next round does it.
            self.log.warn("expiry of known clients put off: {problem}", problem=failure.getErrorMessage())

        return self.expire(self._now()).addCallbacks(lambda _: None, failed)

    async def _do_expire(self, now: float) -> int:
        before, gone = now - self.settings.known_seconds, 0
        while True:
            count: int = await self._database.write(partial(expire, before=before))
            gone += count
            if count < SLICE:
                break
        surplus: int = await self._database.read(count_rows) - self.settings.known_on_disk
        while surplus > 0:
            count = await self._database.write(partial(expire, before=None, limit=min(surplus, SLICE)))
            if not count:
                break
            gone, surplus = gone + count, surplus - count
        self._expired += gone
        return gone


# -- the table -------------------------------------------------------------------------------------------------------------

_READ = select(known_clients).where(known_clients.c.network.in_(bindparam("networks", expanding=True)))
_SEEN = update(known_clients).where(known_clients.c.network == bindparam("of")).values(last_seen=bindparam("at"))
_FORGET = delete(known_clients).where(known_clients.c.network == bindparam("of"))


def read(connection: Connection, networks: Iterable[str]) -> dict[str, float | Unavailable]:
    """When each of them was last seen; 0 for those that are not there."""
    wanted = sorted(set(networks))
    found = {row.network: row.last_seen for row in connection.execute(_READ, {"networks": wanted})}
    return {network: found.get(network, 0.0) for network in wanted}


def write(connection: Connection, changes: Mapping[str, tuple[Change, float]]) -> None:
    """Make the table so."""

    def of(kind: Change) -> list[tuple[str, float]]:
        # In one order everywhere, so that two writers of a server wait for each other and do not lock each other out.
        return sorted((network, at) for network, (change, at) in changes.items() if change is kind)

    passed, seen, forgotten = of(Change.PASSED), of(Change.SEEN), of(Change.FORGOTTEN)
    if passed:
        put = upsert(connection, known_clients)
        put = put.on_conflict_do_update(index_elements=["network"], set_={"last_seen": put.excluded.last_seen})
        connection.execute(put, [{"network": network, "last_seen": at} for network, at in passed])
    if seen:
        connection.execute(_SEEN, [{"of": network, "at": at} for network, at in seen])
    if forgotten:
        connection.execute(_FORGET, [{"of": network} for network, _ in forgotten])


def expire(connection: Connection, before: float | None, limit: int = SLICE) -> int:
    """Forget a slice of those last seen `before` (None: of all), the oldest first; returns how many."""
    old = select(known_clients.c.network).order_by(known_clients.c.last_seen).limit(limit)
    if before is not None:
        old = old.where(known_clients.c.last_seen < before)
    networks = sorted(connection.execute(old).scalars())
    if networks:
        connection.execute(_FORGET, [{"of": network} for network in networks])
    return len(networks)


def count_rows(connection: Connection) -> int:
    """How many there are."""
    return connection.execute(select(func.count()).select_from(known_clients)).scalar_one()
