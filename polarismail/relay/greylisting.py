# SPDX-License-Identifier: MIT
"""The greylist as a service: asked at RCPT, it remembers who came, who came back, and who need not be asked again.

Guarantees: a triplet that passed, and a client network that is trusted, are answered from memory, at once and without
the database; what is looked up and what is written goes in batches; memory is bounded; when the database cannot answer
the client is told to try again (451), and nothing is forgotten that can still be written.
A first contact is on disk about `flush_seconds` after its 451; a crash before that makes the client wait once more.
The judgement itself is `policy/greylisting.py`; the caller never asks about a client that has logged in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from time import time
from typing import Any

from attrs import asdict, evolve
from sqlalchemy import Connection
from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from polarismail.policy.greylisting import GreylistSettings, Judgement, Standing, is_trusted_client, judge, triplet_of
from polarismail.policy.verdict import ACCEPT, Defer, Verdict
from polarismail.store import greylist as table
from polarismail.store.greylist import ClientRecord, Triplet, TripletRecord
from polarismail.store.later_writes import LaterWrites
from polarismail.store.lookups import Lookups
from polarismail.store.lru import LruCache
from polarismail.values.address import Mailbox
from polarismail.values.envelope import ReversePath
from polarismail.values.errors import Unavailable
from polarismail.values.network import NetworkList
from polarismail.values.reply import TRY_AGAIN

_Known = tuple[TripletRecord | None, ClientRecord | None]
_RETRY_SECONDS = 2.0  # after a write that failed


class Greylist:
    """See the module. `now` is the wall clock that expiry uses; `check` is told the time."""

    log = Logger()

    def __init__(
        self, database: Any, reactor: Any, settings: GreylistSettings | None = None, *, now: Callable[[], float] = time
    ) -> None:
        self.settings = settings or GreylistSettings()
        self._database, self._reactor, self._now = database, reactor, now
        self._allowed = NetworkList(self.settings.allow_networks)
        self._passed: LruCache[Triplet, TripletRecord] = LruCache(self.settings.cache_entries)
        self._clients: LruCache[str, ClientRecord] = LruCache(self.settings.cache_entries)
        # To be written, and being written: both count as known until they are on disk.
        self._changed: dict[Triplet, TripletRecord] = {}
        self._writing: dict[Triplet, TripletRecord] = {}
        self._client_changes: dict[str, ClientRecord] = {}  # passes to be added
        self._writes = LaterWrites(reactor, self._has_changes, self._write)
        self._lookups: Lookups[Triplet, _Known] = Lookups(self._fetch, reactor)
        self._expiry = LoopingCall(self._expire_now)
        self._expiry.clock = reactor
        self._counts: Counter[str] = Counter()

    def start(self) -> None:
        """Begin to forget what is old."""
        if self.settings.enabled and not self._expiry.running:
            looping = self._expiry.start(self.settings.expiry_interval_seconds, now=True)
            looping.addErrback(lambda failure: self.log.failure("greylist expiry ended", failure))

    def clear_cache(self) -> None:
        """Give up the memory of it: what is forgotten here is on disk."""
        self._passed.clear()
        self._clients.clear()

    def reconfigure(self, settings: GreylistSettings) -> None:
        """Judge by other settings from now on. The caches keep their size."""
        self.settings = settings
        self._allowed = NetworkList(settings.allow_networks)
        self.start()

    def stop(self) -> Deferred[None]:
        """Write what is not yet written; fires when that is done or has failed."""
        if self._expiry.running:
            self._expiry.stop()
        return self._writes.stop()

    def check(
        self, client_address: str, reverse_path: ReversePath, forward_path: Mailbox, now: float
    ) -> Verdict | Deferred[Verdict]:
        """May this client send this, at `now` (seconds since 1970)? Accept, or Defer with the seconds left.

        Never fails: a database that cannot answer is a Defer as well.
        """
        settings = self.settings
        if not settings.enabled:
            return ACCEPT
        if client_address in self._allowed:
            self._counts["allowed_network"] += 1
            return ACCEPT
        triplet = triplet_of(client_address, reverse_path, forward_path, settings)
        client = self._clients.get(triplet.network)
        if client is not None and is_trusted_client(client, now, settings):
            return self._trust(triplet.network, client, now)
        record = self._remembered(triplet)
        if record is not None:
            judgement = judge(record, now, settings)
            # What memory calls too old may have been used on another worker since.
            if judgement.standing is not Standing.FIRST:
                return self._apply(judgement, triplet, record, now)
        answer: Deferred[Any] = self._lookups.ask(triplet)
        return answer.addCallbacks(self._found, self._not_found, (triplet, now))

    def statistics(self) -> dict[str, int]:
        """Counts since the start: how recipients were judged, and what the service holds."""
        return {
            **{name.value: self._counts[name.value] for name in Standing},
            **{
                name: self._counts[name]
                for name in ("trusted_client", "allowed_network", "unavailable", "expired", "write_failures", "dropped")
            },
            "cached_triplets": len(self._passed),
            "cached_clients": len(self._clients),
            "unwritten": len(self._changed) + len(self._writing),
        }

    def count_rows(self) -> Deferred[dict[str, int]]:
        """How many triplets wait and passed, and how many client networks there are. Fails with Unavailable."""
        counted: Deferred[Any] = self._database.read(table.count_rows)
        return counted.addCallback(asdict)

    def expire(self, now: float) -> Deferred[int]:
        """Forget what is too old at `now`, in short transactions; fires with how many rows went.

        Fails with Unavailable.
        """
        return Deferred.fromCoroutine(self._do_expire(now))

    # -- judging -----------------------------------------------------------------------------------------------------

    def _remembered(self, triplet: Triplet) -> TripletRecord | None:
        return self._changed.get(triplet) or self._writing.get(triplet) or self._passed.get(triplet)

    def _found(self, known: _Known, triplet: Triplet, now: float) -> Verdict:
        record, client = known
        kept = self._clients.get(triplet.network)
        if client is not None and (kept is None or client.passes >= kept.passes):
            self._clients.put(triplet.network, client)
            kept = client
        if kept is not None and is_trusted_client(kept, now, self.settings):
            return self._trust(triplet.network, kept, now)
        unwritten = self._changed.get(triplet) or self._writing.get(triplet)
        record = unwritten or record
        return self._apply(judge(record, now, self.settings), triplet, record, now)

    def _not_found(self, failure: Failure) -> Verdict:
        if failure.check(Unavailable) is None:
            self.log.failure("a greylist triplet could not be judged", failure)
        self._counts["unavailable"] += 1
        return Defer(TRY_AGAIN)

    def _apply(self, judgement: Judgement, triplet: Triplet, record: TripletRecord | None, now: float) -> Verdict:
        self._counts[judgement.standing.value] += 1
        if judgement.standing is Standing.KNOWN:
            assert record is not None
            self._passed.put(triplet, record)
            if now - record.last_seen >= self.settings.refresh_seconds:
                self._keep(triplet, judgement.record)
        elif judgement.standing is Standing.PASSED:
            self._keep(triplet, judgement.record)
            client = self._clients.get(triplet.network)
            alive = client is not None and now - client.last_seen <= self.settings.lifetime_seconds
            self._clients.put(triplet.network, ClientRecord((client.passes if client and alive else 0) + 1, now))
            self._keep_client(triplet.network, 1, now)
        elif judgement.standing is Standing.FIRST:
            self._passed.drop(triplet)
            self._keep(triplet, judgement.record)
        return judgement.verdict

    def _trust(self, network: str, client: ClientRecord, now: float) -> Verdict:
        self._counts["trusted_client"] += 1
        if now - client.last_seen >= self.settings.refresh_seconds:
            self._clients.put(network, evolve(client, last_seen=now))
            self._keep_client(network, 0, now)
        return ACCEPT

    def _fetch(self, triplets: Sequence[Triplet]) -> Deferred[dict[Triplet, _Known | Unavailable]]:
        def job(connection: Connection) -> dict[Triplet, _Known | Unavailable]:
            records = table.read_triplets(connection, triplets)
            clients = table.read_clients(connection, (triplet.network for triplet in triplets))
            return {triplet: (records.get(triplet), clients.get(triplet.network)) for triplet in triplets}

        fetched: Deferred[dict[Triplet, _Known | Unavailable]] = self._database.read(job)
        return fetched

    # -- writing -----------------------------------------------------------------------------------------------------

    def _keep(self, triplet: Triplet, record: TripletRecord) -> None:
        if record.passed:
            self._passed.put(triplet, record)
        self._changed[triplet] = record
        self._writes.soon(self.settings.flush_seconds)

    def _keep_client(self, network: str, passes: int, now: float) -> None:
        waiting = self._client_changes.get(network)
        self._client_changes[network] = ClientRecord(passes + (waiting.passes if waiting else 0), now)
        self._writes.soon(self.settings.flush_seconds)

    def _has_changes(self) -> bool:
        return bool(self._changed or self._client_changes)

    def _write(self) -> Deferred[float]:
        self._writing, self._changed = self._changed, {}
        clients, self._client_changes = self._client_changes, {}
        writing = self._database.write(partial(table.write, triplets=self._writing, clients=clients))
        written: Deferred[float] = writing.addCallbacks(self._written, self._not_written, (), {}, (clients,), {})
        return written

    def _written(self, _: object) -> float:
        self._writing = {}
        return self.settings.flush_seconds

    def _not_written(self, failure: Failure, clients: dict[str, ClientRecord]) -> float:
        if not self._counts["write_failures"] or failure.check(Unavailable) is None:
            self.log.failure("the greylist could not be written", failure)
        self._counts["write_failures"] += 1
        self._take_back(clients)
        self._writing = {}
        return _RETRY_SECONDS

    def _take_back(self, clients: dict[str, ClientRecord]) -> None:
        """Keep what could not be written for the next time: the newest, as many as the cache may hold."""
        merged = {**self._writing, **self._changed}
        too_many = len(merged) - self.settings.cache_entries
        if too_many > 0:
            self._counts["dropped"] += too_many
            for triplet in list(merged)[:too_many]:
                del merged[triplet]
        self._changed = merged
        if len(self._client_changes) < self.settings.cache_entries:
            for network, record in clients.items():
                newer = self._client_changes.get(network)
                self._client_changes[network] = (
                    record if newer is None else ClientRecord(record.passes + newer.passes, newer.last_seen)
                )

    # -- forgetting --------------------------------------------------------------------------------------------------

    def _expire_now(self) -> Deferred[None]:
        def failed(failure: Failure) -> None:
            # The next round does it.
            self.log.warn("greylist expiry put off: {problem}", problem=failure.getErrorMessage())

        return self.expire(self._now()).addCallbacks(lambda _: None, failed)

    async def _do_expire(self, now: float) -> int:
        settings = self.settings
        gone: int = 0
        count: int
        after: float | None = -1.0
        while after is not None:
            job = partial(
                table.expire_triplets,
                waiting_before=now - settings.window_seconds,
                passed_before=now - settings.lifetime_seconds,
                after=after,
            )
            after, count = await self._database.write(job)
            gone += count
        while True:
            count = await self._database.write(partial(table.expire_clients, before=now - settings.lifetime_seconds))
            gone += count
            if count < table.SLICE:
                break
        self._counts["expired"] += gone
        return gone
