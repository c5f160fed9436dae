# SPDX-License-Identifier: MIT
"""Brings mail to the worker that owns its pair of egress source and site, at once, and never to two.

Guarantees
    A pair is worked on by one living worker: a new owner begins when every other has said that it has let go of the site.
    What is handed over is the new owner's on stable storage before it is told; should the word be lost, because a worker
    died between the two, the new owner finds it by looking through what it owns.
    While nobody can say who the owner is, or the owner cannot be reached, mail waits here, in hand, and operators can take
    it back. Mail that two workers send each other, because names mean different sites to them, stays with the third.
Never
    A content that crosses the bus without its row being the receiver's. HOUSE, "Processes".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.defer import TimeoutError as AnswerTimeout
from twisted.internet.task import deferLater
from twisted.logger import Logger

from polarismail.net.bus import Bus
from polarismail.relay.pairs import Ownership, pair_of
from polarismail.relay.queue import Hand, Item, Key, key_of
from polarismail.relay.routing import Destination
from polarismail.relay.wrapping import unwrap, wrap
from polarismail.store.interfaces import QueuedRecipient
from polarismail.store.lru import LruCache

_MOST_HOPS = 2
_YIELD_SECONDS = 900.0  # a final dot may be waited for 600 s
_AGAIN_SECONDS = 0.2
_RETRY_SECONDS = 5.0
_LOOK_TWICE_SECONDS = 1.0
_BATCH = 200
_MAIL, _YIELD = "mail", "yield"


class Sites(Protocol):
    """What is asked of relay/sites.py."""

    def put(self, destination: Destination, items: Iterable[Item]) -> None: ...
    def let_go(self, site: str) -> tuple[list[Item], Deferred[None]]: ...
    def destinations(self) -> list[Destination]: ...


class HandOver:
    """One worker's. `take` puts recipients in hand and on their way; `forget` takes them out of it."""

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        bus: Bus,
        spool: Any,
        hand: Hand,
        sites: Sites,
        *,
        take: Callable[[Sequence[QueuedRecipient]], None],
        forget: Callable[[Sequence[QueuedRecipient]], None],
        look: Callable[[], None],
    ) -> None:
        self._reactor, self._bus, self._spool, self._hand, self._sites = reactor, bus, spool, hand, sites
        self._take, self._forget, self._look = take, forget, look
        self.ownership = Ownership(bus.number)
        self._incarnations: Mapping[int, int] = {}
        self._settled: set[str] = set()  # sites that are ours, and that every other has let go of
        self._settling: set[str] = set()
        self._waiting: dict[str, tuple[Destination, list[Item]]] = {}  # by site: for an owner, or for the others
        self._leaving: dict[int, list[Item]] = {}  # by owner: to be handed over in the next turn
        self._flush_call: Any = None
        self._hops: LruCache[Key, int] = LruCache(20_000)
        self._early: list[tuple[int, Deferred[None]]] = []  # who asks us with a newer word than ours
        self._missing: set[tuple[str, int, int]] = set()
        self._search_call: Any = None
        self.sent = self.received = 0  # recipients, since the start
        bus.subscribe(_MAIL, self._mail)
        bus.subscribe(_YIELD, self._yield)
        bus.when_linked(lambda number: self._route_waiting())
        bus.when_broken(lambda number: self.search())

    # -- what the manager asks -----------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return sum(len(items) for _, items in self._waiting.values()) + sum(map(len, self._leaving.values()))

    def change_members(self, version: int, incarnations: Mapping[int, int]) -> None:
        """The supervisor's word: who lives, by number, and under which incarnation."""
        if version <= self.ownership.version:
            return
        self.ownership.change(version, incarnations)
        self._incarnations = dict(incarnations)
        for destination in self._sites.destinations():
            if not self._is_ours(destination.site):
                self._let_go(destination)
        self._settled = {site for site in self._settled if self._is_ours(site)}
        early, self._early = self._early, []
        for wanted, waiter in early:
            if wanted <= version:
                waiter.callback(None)
            else:
                self._early.append((wanted, waiter))
        self._route_waiting()

    def put(self, destination: Destination, items: list[Item]) -> None:
        """On to the site where it is ours, else to its owner."""
        site = destination.site
        owner = self.ownership.owner(pair_of("", site))
        if owner == self.ownership.own:
            if site in self._settled or len(self.ownership.members) == 1:
                self._settled.add(site)
                self._sites.put(destination, items)
            else:
                self._wait(destination, items)
                self._settle(site)
        elif owner is None or not self._bus.is_open(owner):
            self._wait(destination, items)
        else:
            stays: list[Item] = []
            goes = self._leaving.setdefault(owner, [])
            for item in items:
                hops = self._hops.get(key_of(item.recipient)) or 0
                (stays if hops >= _MOST_HOPS else goes).append(item)
            if stays:
                self._sites.put(destination, stays)
            if self._flush_call is None:
                self._flush_call = self._reactor.callLater(0, self._flush)

    def drop(self, queue_ids: set[str] | None) -> list[QueuedRecipient]:
        """Take back what waits here: of these messages, or None for all."""
        dropped: list[QueuedRecipient] = []
        for items in (*self._leaving.values(), *(items for _, items in self._waiting.values())):
            everyone, items[:] = items[:], []
            for each in everyone:
                if queue_ids is None or each.message.queue_id in queue_ids:
                    dropped.append(each.recipient)
                else:
                    items.append(each)
        return dropped

    # -- over ----------------------------------------------------------------------------------------------------------

    def _wait(self, destination: Destination, items: list[Item]) -> None:
        known = self._waiting.get(destination.site)
        self._waiting[destination.site] = destination, (known[1] if known else []) + items

    def _route_waiting(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for destination, items in waiting.values():
            if items:
                self.put(destination, items)

    def _flush(self) -> None:
        self._flush_call = None
        leaving, self._leaving = self._leaving, {}
        for owner, items in leaving.items():
            if not self._bus.is_open(owner):
                self._take_again([item.recipient for item in items])
                continue
            for at in range(0, len(items), _BATCH):
                Deferred.fromCoroutine(self._give(owner, items[at : at + _BATCH])).addErrback(
                    lambda failure: self.log.failure("mail could not be handed over", failure)
                )

    async def _give(self, owner: int, items: list[Item]) -> None:
        """To the owner: the rows first, then the word."""
        incarnation = self._incarnations.get(owner)
        recipients = [self._hand.newest(item.recipient) for item in items]
        if incarnation is None:
            self._take_again(recipients)
            return
        try:
            moved = await self._spool.hand_over(recipients, incarnation)
        except Exception as problem:
            # In doubt: what has moved is found by its new owner, what has not is given back, and claimed anew.
            self.log.warn("mail could not be handed over: {problem}", problem=str(problem))
            self._forget(recipients)
            self._reactor.callLater(_RETRY_SECONDS, self.search)
            return
        hops = max((self._hops.get(key_of(each)) or 0 for each in recipients), default=0)
        self._forget(recipients)
        self.sent += len(moved)
        if moved:
            # Where the link has broken meanwhile, the owner searches, or is dead and what it owned is given back.
            self._bus.send(owner, _MAIL, wrap(moved, hops + 1))

    def _take_again(self, recipients: Sequence[QueuedRecipient]) -> None:
        self._forget(recipients)
        self._take(recipients)

    def _mail(self, sender: int, body: bytes) -> None:
        """Another worker's recipients, ours now."""
        recipients, hops = unwrap(body)
        for recipient in recipients:
            self._hops.put(key_of(recipient), hops)
        self.received += len(recipients)
        self._take(recipients)

    # -- one owner at a time -------------------------------------------------------------------------------------------

    def _is_ours(self, site: str) -> bool:
        return self.ownership.owner(pair_of("", site)) == self.ownership.own

    def _settle(self, site: str) -> None:
        if site not in self._settling:
            self._settling.add(site)
            Deferred.fromCoroutine(self._ask_others(site)).addErrback(
                lambda failure: self.log.failure("{site} could not be taken over", failure, site=site)
            )

    async def _ask_others(self, site: str) -> None:
        """Until every other has let go of the site, or it is not ours any more."""
        try:
            while self._is_ours(site):
                version, others = self.ownership.version, self.ownership.members - {self.ownership.own}
                body = b"%d %s" % (version, site.encode())
                asked = [self._bus.ask(number, _YIELD, body, _YIELD_SECONDS) for number in others]
                try:
                    answers = await gatherResults(asked, consumeErrors=True)
                except Exception as problem:
                    if not isinstance(_cause(problem), (ConnectionError, AnswerTimeout)):
                        raise
                    answers = []  # not linked yet, or just dead: the supervisor will say so
                agreed = len(answers) == len(others) and all(answer == b"yes" for answer in answers)
                if agreed and version == self.ownership.version:
                    self._settled.add(site)
                    break
                await deferLater(self._reactor, _AGAIN_SECONDS, lambda: None)
        finally:
            self._settling.discard(site)
        destination, items = self._waiting.pop(site, (None, []))
        if destination is not None and items:
            self.put(destination, items)

    def _yield(self, sender: int, body: bytes) -> Deferred[bytes]:
        version, _, site = body.partition(b" ")
        return Deferred.fromCoroutine(self._do_yield(int(version), site.decode()))

    async def _do_yield(self, version: int, site: str) -> bytes:
        if version > self.ownership.version:
            waiter: Deferred[None] = Deferred()
            self._early.append((version, waiter))
            await waiter
        if self._is_ours(site):
            return b"no"
        self._settled.discard(site)
        destinations = [each for each in self._sites.destinations() if each.site == site]
        for destination in destinations:
            await self._let_go(destination)
        return b"yes"

    def _let_go(self, destination: Destination) -> Deferred[None]:
        """What waits for it goes to its owner; fires when what is under way is done."""
        self._settled.discard(destination.site)
        items, gone = self._sites.let_go(destination.site)
        if items:
            self.put(destination, items)
        return gone

    # -- lost words ----------------------------------------------------------------------------------------------------

    def search(self) -> None:
        """A worker has gone, perhaps between a row that is ours now and the word of it: look for what we own unknowingly.

        Twice, so that what is just being accepted is not taken for lost.
        """
        if self._search_call is None:
            self._missing = set()
            self._search_call = self._reactor.callLater(0, self._begin_search)

    def _begin_search(self) -> None:
        Deferred.fromCoroutine(self._search()).addErrback(self._not_searched)

    async def _search(self) -> None:
        first = await self._unknown()
        if first:
            await deferLater(self._reactor, _LOOK_TWICE_SECONDS, lambda: None)
            lost = first & await self._unknown()
            if lost:
                await self._spool.release_keys(sorted(lost))
                self.log.info("{count} recipients of ours were found in the spool", count=len(lost), event="recovered")
                self._look()
        self._search_call = None

    async def _unknown(self) -> set[tuple[str, int, int]]:
        return {each for each in await self._spool.owned() if (each[0], each[1]) not in self._hand}

    def _not_searched(self, failure: Any) -> None:
        self.log.warn("what is ours in the spool is looked for later: {why}", why=failure.getErrorMessage())
        self._search_call = self._reactor.callLater(_RETRY_SECONDS, self._begin_search)

    def stop(self) -> None:
        """Hand over nothing more."""
        for call in (self._flush_call, self._search_call):
            if call is not None and call.active():
                call.cancel()
        self._flush_call = None


def _cause(problem: BaseException) -> BaseException:
    """What failed inside a gatherResults."""
    failure = getattr(problem, "subFailure", None)
    return failure.value if failure is not None else problem
