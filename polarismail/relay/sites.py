# SPDX-License-Identifier: MIT
"""Connections to sites: opened host by host, used for what waits for the same site, few enough for everybody.

Guarantees
    One attempt tries the addresses in order, so that the second MX is used when the first is down (RFC 5321 §5.1); hosts
    that failed in the last two minutes come last. A connection serves the messages that wait for its site, up to a
    number, and waits a moment for more. Connections are bounded in total and for each site; a site that has not answered
    yet gets few, each answer allows one more. What is dropped while it waits for a connection is not tried.
    When no address of a site takes a connection, everything that waits for the site is deferred together.
Never
    Two sessions for a recipient in one attempt, but where the first one refused service (421) or was found dead before
    it had answered anything.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence, Set
from typing import Any

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from polarismail.relay.clients import ClientSettings, ConnectFailed, RemoteHost
from polarismail.relay.queue import HostMemory, Item, ReadyQueue
from polarismail.relay.resumption import Resumption
from polarismail.relay.routing import Destination, Router
from polarismail.relay.session import Session
from polarismail.relay.settings import RelaySettings
from polarismail.store.interfaces import QueuedMessage
from polarismail.values.reply import TRY_AGAIN, Reply

Connect = Callable[..., Awaitable[Session]]
Read = Callable[[QueuedMessage, int, int], "Deferred[bytes]"]
MAX_SESSIONS = 2
_FRESH_SHARE = 0.1
"""Of all connections, kept free for sites that new mail goes to."""


@define
class Verdict:
    """What an attempt came to for some items: a reply for each. `is_final=False`: it speaks of a connection, not of mail."""

    items: Sequence[Item]
    replies: Sequence[Reply]
    remote: str
    is_explicit: bool = False
    is_final: bool | None = None
    sending_seconds: float = 0.0
    passes_dsn: bool = False  # the host was told what NOTIFY asks


@define(eq=False)
class Site:
    """What waits for one set of hosts, and who works on it."""

    destination: Destination
    window: int
    queue: ReadyQueue = field(factory=ReadyQueue)
    couriers: int = 0
    connecting: int = 0
    idle: OrderedDict[Deferred[bool], None] = field(factory=OrderedDict)
    sessions: set[Session] = field(factory=set)
    gone: list[Deferred[None]] | None = None  # it is another worker's now: who waits for our last connection to end


class Sites:
    """Every site with work. `settle` hears of verdicts; `read` is ISpool.read."""

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        router: Router,
        settings: RelaySettings,
        client: ClientSettings,
        *,
        connect: Connect,
        read: Read,
        settle: Callable[[Verdict], None],
        limit: Callable[[int], int] | None = None,
    ) -> None:
        """`limit(wanted)`: how many connections there may be in all; with others to share them, it asks for `wanted` more."""
        self._reactor, self._router, self._connect = reactor, router, connect
        self._read, self._settle = read, settle
        self.returned: Callable[[Destination, list[Item]], None] = self.put
        self.settings, self.client = settings, client
        self._limit = limit or (lambda wanted: self.settings.connections)
        self._sites: dict[str, Site] = {}
        # Sites that wait for a free connection: those with new mail, and those with retries alone.
        self._starved: dict[bool, OrderedDict[str, None]] = {True: OrderedDict(), False: OrderedDict()}
        self._unstaffed: dict[str, None] = {}
        self._staffing: Any = None
        self._bad = HostMemory(reactor.seconds, settings.bad_host_seconds)
        self._resumption = Resumption()
        self._broken_tls = HostMemory(reactor.seconds, settings.broken_tls_seconds)
        self._stopped: list[Deferred[None]] = []
        self.connections = 0
        self.running = False

    # -- what the manager asks -----------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return sum(len(site.queue) for site in self._sites.values())

    def overview(self) -> dict[str, tuple[int, int]]:
        """Site -> (recipients that wait, connections)."""
        return {name: (len(site.queue), site.couriers) for name, site in self._sites.items()}

    def put(self, destination: Destination, items: Iterable[Item]) -> None:
        """Send these to the destination, now if a connection may be had."""
        site = self._sites.get(destination.site)
        if site is None:
            site = self._sites[destination.site] = Site(destination, self.settings.first_connections_per_site)
        site.destination = destination  # its addresses are the newest
        for item in items:
            site.queue.put(item)
        # In the next turn: recipients of the same message may be on their way here from another domain's look-up.
        self._unstaffed[destination.site] = None
        if self._staffing is None:
            self._staffing = self._reactor.callLater(0, self._staff_all)

    def _staff_all(self) -> None:
        self._staffing = None
        unstaffed, self._unstaffed = self._unstaffed, {}
        for name in unstaffed:
            site = self._sites.get(name)
            if site is not None:
                self._staff(site)

    def drop(self, queue_ids: Set[str] | None) -> list[Item]:
        """Take back what waits for a connection: these messages, or None for all."""
        dropped = []
        for name, site in list(self._sites.items()):
            dropped += site.queue.drop(queue_ids)
            if not (site.couriers or len(site.queue)):
                del self._sites[name]
        return dropped

    def destinations(self) -> list[Destination]:
        """Every site with work or connections."""
        return [site.destination for site in self._sites.values()]

    def let_go(self, name: str) -> tuple[list[Item], Deferred[None]]:
        """The site is another's from now on: take back what waits, begin nothing more there. The Deferred fires when our
        last connection to it has ended; what comes back from one goes to `returned`."""
        gone: Deferred[None] = Deferred()
        site = self._sites.get(name)
        if site is None:
            gone.callback(None)
            return [], gone
        items = site.queue.drop(None)
        if site.couriers:
            site.gone = [*(site.gone or ()), gone]
            for waiter in list(site.idle):
                self._wake(site, waiter, False)
        else:
            del self._sites[name]
            gone.callback(None)
        return items, gone

    def more_connections(self) -> None:
        """There may be more of them than before: serve who waits for one."""
        for is_fresh, starved in self._starved.items():
            while self.running and starved and self.connections < self._most(is_fresh, 0):
                waiting = self._sites.get(starved.popitem(last=False)[0])
                if waiting is not None:
                    self._staff(waiting)

    def start(self) -> None:
        """Take work, also that which waits already."""
        self.running = True
        for site in list(self._sites.values()):
            self._staff(site)

    def pause(self) -> None:
        """Begin no transaction; those under way go on."""
        self.running = False
        for site in list(self._sites.values()):
            for waiter in list(site.idle):
                self._wake(site, waiter, False)

    def when_stopped(self) -> Deferred[None]:
        """Fires when no connection is left. Call `pause` first."""
        done: Deferred[None] = Deferred()
        if self.connections:
            self._stopped.append(done)
        else:
            done.callback(None)
        return done

    def abort(self) -> None:
        """Cut every connection; what is on it gets its verdict."""
        for site in list(self._sites.values()):
            for session in list(site.sessions):
                session.abort()

    # -- couriers ------------------------------------------------------------------------------------------------------

    def _staff(self, site: Site) -> None:
        """Give the site as many connections as it has use for and may have."""
        while self.running and site.gone is None and site.queue.messages > site.connecting:
            if site.idle:
                self._wake(site, next(iter(site.idle)), True)
                continue
            if site.couriers >= min(site.window, self.settings.connections_per_site):
                return
            is_fresh = site.queue.has_fresh
            if self.connections >= self._most(is_fresh, 1):
                self._starved[is_fresh][site.destination.site] = None
                self._free_one()
                return
            site.couriers += 1
            site.connecting += 1
            self.connections += 1
            Deferred.fromCoroutine(self._deliver(site)).addErrback(
                lambda failure: self.log.failure("a courier failed", failure)
            )

    def _most(self, is_fresh: bool, wanted: int) -> int:
        """How many connections there may be. Retries leave some to new mail, or one night of dead hosts stops it all."""
        if is_fresh:
            return self._limit(wanted)
        kept = int(self._limit(0) * _FRESH_SHARE)
        return self._limit(wanted + kept if wanted else 0) - kept

    @property
    def _is_starved(self) -> bool:
        return bool(self._starved[True] or self._starved[False])

    def _free_one(self) -> None:
        """Let an idle connection of another site go: when it has, the starved are served."""
        for other in self._sites.values():
            if other.idle:
                self._wake(other, next(iter(other.idle)), False)
                return

    async def _deliver(self, site: Site) -> None:
        """One courier: opens a connection, serves what waits, waits a moment for more, leaves."""
        session: Session | None = None
        is_connecting = True
        try:
            while self.running and site.gone is None:
                if session is not None and not self._may_serve(session):
                    leaving, session = session, None
                    await self._leave(site, leaving)
                    if self._is_starved:
                        break  # it has had its turn
                    continue
                if session is None:
                    if not is_connecting:
                        site.connecting, is_connecting = site.connecting + 1, True
                    session = await self._open(site) if len(site.queue) else None
                    site.connecting, is_connecting = site.connecting - 1, False
                    if session is None:
                        break
                    site.sessions.add(session)
                    continue  # while it connected, much may have changed
                items = site.queue.take(min(self.settings.recipients_per_transaction, session.max_recipients))
                if items:
                    await self._send(site, session, items)
                elif self._is_starved or not await self._wait(site):
                    break
        finally:
            if session is not None:
                await self._leave(site, session)
            site.connecting -= is_connecting
            site.couriers -= 1
            self.connections -= 1
            self._left(site)

    def _may_serve(self, session: Session) -> bool:
        return session.usable and session.transactions < min(
            self.settings.messages_per_connection, session.max_transactions
        )

    async def _leave(self, site: Site, session: Session) -> None:
        """Say goodbye; the connection counts until it is gone."""
        site.sessions.discard(session)
        await session.quit()

    def _left(self, site: Site) -> None:
        """A connection is free again."""
        name = site.destination.site
        if site.gone is not None and not site.couriers:
            gone, items = site.gone, site.queue.drop(None)
            del self._sites[name]
            for done in gone:
                done.callback(None)
            if items:
                self.returned(site.destination, items)
        if not site.couriers and not len(site.queue) and self._sites.get(name) is site:
            del self._sites[name]
        if not self.running:
            if not self.connections:
                stopped, self._stopped = self._stopped, []
                for done in stopped:
                    done.callback(None)
            return
        self.more_connections()
        if len(site.queue):
            self._staff(site)

    def _wait(self, site: Site) -> Deferred[bool]:
        """Fires with True when there is more to do, with False when it is time to leave."""
        waiter: Deferred[bool] = Deferred()
        timer = self._reactor.callLater(self.settings.idle_seconds, lambda: self._wake(site, waiter, False))

        def stop_timer(result: bool) -> bool:
            if timer.active():
                timer.cancel()
            return result

        waiter.addCallback(stop_timer)
        site.idle[waiter] = None
        return waiter

    @staticmethod
    def _wake(site: Site, waiter: Deferred[bool], has_work: bool) -> None:
        if waiter in site.idle:
            del site.idle[waiter]
            waiter.callback(has_work)

    # -- a connection --------------------------------------------------------------------------------------------------

    async def _open(self, site: Site) -> Session | None:
        """The first address that takes us. None: there is nothing to do any more, or what there was has its verdict."""
        destination = site.destination
        hosts = self._router.order(destination)
        good = [host for host in hosts if host not in self._bad]
        # Where all of them were down a moment ago, one or two are asked whether they still are.
        hosts = (*good, *(host for host in hosts if host in self._bad)) if good else hosts[:2]
        failures: list[tuple[RemoteHost, ConnectFailed]] = []
        for host in hosts:
            try:
                session = await self._connect_to(host, destination)
            except ConnectFailed as problem:
                self._bad.add(host)
                failures.append((host, problem))
            else:
                self._bad.forget(host)
                return session
            if not (self.running and len(site.queue)):
                return None
        if site.sessions or site.connecting > 1:
            # It takes no more of us at once: those that are connected serve the rest, the last to connect judges.
            site.window = max(1, len(site.sessions))
            return None
        site.window = self.settings.first_connections_per_site
        items = site.queue.drop(None)
        host, last = failures[-1]
        is_final = all(failure.permanent for _, failure in failures)
        self._settle(
            Verdict(items, [last.reply] * len(items), str(host), destination.is_explicit, None if is_final else False)
        )
        return None

    async def _connect_to(self, host: RemoteHost, destination: Destination) -> Session:
        """One address; in plain text where its STARTTLS is known not to work and TLS is opportunistic."""
        is_opportunistic = destination.tls == "opportunistic" and destination.credentials is None
        tls = "none" if is_opportunistic and host in self._broken_tls else destination.tls
        try:
            try:
                return await self._connect_once(host, destination, tls)
            except ConnectFailed as problem:
                if not problem.resumed:
                    raise
            return await self._connect_once(host, destination, tls)
        except ConnectFailed as problem:
            if not (problem.tls_broken and is_opportunistic and tls != "none"):
                raise
        session = await self._connect_once(host, destination, "none")
        self._broken_tls.add(host)
        return session

    async def _connect_once(self, host: RemoteHost, destination: Destination, tls: str) -> Session:
        try:
            return await self._connect(
                self._reactor,
                host,
                self.client,
                credentials=destination.credentials,
                tls=tls,
                verify=destination.verify,
                resumption=self._resumption,
            )
        except ConnectFailed:
            raise
        except Exception as problem:
            self.log.failure("connecting to {host} failed in an unexpected way", host=str(host))
            raise ConnectFailed(TRY_AGAIN) from problem

    async def _send(self, site: Site, session: Session, items: list[Item]) -> None:
        """One transaction, and what follows from it."""
        message, destination = items[0].message, site.destination
        began = self._reactor.seconds()
        for item in items:
            item.sessions += 1
        try:
            replies = await session.send(
                message, [item.recipient for item in items], lambda offset, octets: self._read(message, offset, octets)
            )
        except Exception:
            self.log.failure("{queue_id}: a transaction failed in an unexpected way", queue_id=message.queue_id)
            session.abort()
            replies = [TRY_AGAIN] * len(items)
        is_taken = any(reply.is_positive for reply in replies)
        if is_taken:
            site.window = min(site.window + 1, self.settings.connections_per_site)
        decided, verdicts = items, replies
        if not session.usable:  # else nobody deserves another connection
            decided, verdicts = [], []
            for item, reply in zip(items, replies, strict=True):
                if self._deserves_another(site, session, item, reply):
                    site.queue.put(item)
                else:
                    decided.append(item)
                    verdicts.append(reply)
        if decided:
            took = max(0.0, self._reactor.seconds() - began)
            self._settle(
                Verdict(
                    decided,
                    verdicts,
                    session.describe(),
                    destination.is_explicit,
                    sending_seconds=took,
                    passes_dsn="DSN" in session.extensions,
                )
            )
        if is_taken:
            self._staff(site)

    def _deserves_another(self, site: Site, session: Session, item: Item, reply: Reply) -> bool:
        """Whether another connection may be tried within this attempt: nothing can have been delivered by this one."""
        if session.usable or item.sessions >= MAX_SESSIONS or not self.running:
            return False
        if session.stale:
            return True
        if reply.code != 421:
            return False
        if session.transactions > 1:
            return True  # it had enough of this connection, not of us
        self._bad.add(session.host)
        return any(host not in self._bad for host in self._router.order(site.destination))
