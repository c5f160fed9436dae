# SPDX-License-Identifier: MIT
"""Mail goes to the owner of its site, and a new owner begins when the old one has let go: two workers on a real bus."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from polarismail.net.bus import Bus
from polarismail.relay.handover import HandOver
from polarismail.relay.pairs import owner_of, pair_of
from polarismail.relay.queue import Hand, Item, key_of
from polarismail.relay.routing import Destination
from polarismail.store.interfaces import QueuedMessage, QueuedRecipient
from polarismail.values.address import Mailbox
from polarismail.values.errors import SpoolUnhealthy
from tests.reactor import reactor, run

# One site of each worker, by what rendezvous hashing says.
SITES = {
    owner: next(f"mx{at}:25" for at in range(100) if owner_of(pair_of("", f"mx{at}:25"), (0, 1)) == owner)
    for owner in (0, 1)
}


def destination(site: str) -> Destination:
    return Destination(site, (), 25)


def recipient(number: int) -> QueuedRecipient:
    message = QueuedMessage(f"{number:013}", Mailbox("a", "here.test"), 1.0, 5, inline=b"hello", recipient_count=1)
    return QueuedRecipient(
        message, 0, Mailbox("z", "there.test"), Mailbox("z", "there.test"), "there.test", None, 0, 1.0, 9e9, 0
    )


class Spool:
    """Owners by key, in memory that both share."""

    def __init__(self, owners: dict[tuple[str, int], tuple[int, int]], own: int) -> None:
        self.owners, self.own = owners, own
        self.released: list[tuple[str, int, int]] = []
        self.broken = False

    async def hand_over(self, recipients: Sequence[QueuedRecipient], to: int) -> list[QueuedRecipient]:
        if self.broken:
            raise SpoolUnhealthy("broken")
        moved = []
        for each in recipients:
            if self.owners[key_of(each)] == (self.own, each.epoch):
                self.owners[key_of(each)] = to, each.epoch + 1
                moved.append(evolve(each, epoch=each.epoch + 1))
        return moved

    async def owned(self) -> list[tuple[str, int, int]]:
        return [(*key, epoch) for key, (owner, epoch) in self.owners.items() if owner == self.own]

    async def release_keys(self, keys: Sequence[tuple[str, int, int]]) -> None:
        self.released += keys
        for queue_id, number, epoch in keys:
            self.owners[queue_id, number] = 0, epoch + 1


class Sites:
    """What is put here is being sent; `gone` of a site is fired by the test."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []
        self.busy: dict[str, Deferred[None]] = {}

    def put(self, where: Destination, items: Any) -> None:
        self.sent += [(where.site, each.message.queue_id) for each in items]

    def destinations(self) -> list[Destination]:
        return [destination(site) for site in self.busy]

    def let_go(self, site: str) -> tuple[list[Item], Deferred[None]]:
        waiter: Deferred[None] = Deferred()
        if site not in self.busy:
            waiter.callback(None)
        else:
            self.busy[site].addCallback(lambda _: waiter.callback(None))
        return [], waiter


class Worker:
    def __init__(self, directory: Path, number: int, owners: dict[tuple[str, int], tuple[int, int]]) -> None:
        self.bus = Bus(reactor, str(directory), number)
        self.hand, self.sites, self.spool = Hand(1000, 10**6), Sites(), Spool(owners, 100 + number)
        self.looks = 0
        self.handover = HandOver(
            reactor, self.bus, self.spool, self.hand, self.sites, take=self.take, forget=self.forget, look=self.look
        )
        self.route = ""

    def take(self, recipients: Sequence[QueuedRecipient]) -> None:
        fresh = self.hand.keep(recipients)
        self.handover.put(destination(self.route), [Item(each, 0.0) for each in fresh])

    def forget(self, recipients: Sequence[QueuedRecipient]) -> None:
        for each in recipients:
            self.hand.drop(each)

    def look(self) -> None:
        self.looks += 1

    def accept(self, number: int, site: str) -> None:
        """New mail of ours for this site."""
        mail = recipient(number)
        self.spool.owners[key_of(mail)] = self.spool.own, 0
        self.route = site
        self.take([mail])


class World:
    def __init__(self, directory: Path) -> None:
        self.owners: dict[tuple[str, int], tuple[int, int]] = {}
        self.workers = [Worker(directory, number, self.owners) for number in (0, 1)]
        self.version = 0

    def say_members(self, *numbers: int) -> None:
        self.version += 1
        for number in numbers:
            worker = self.workers[number]
            worker.bus.set_members({each: f"w{each}" for each in numbers})
            worker.handover.change_members(self.version, {each: 100 + each for each in numbers})

    async def until(self, condition: Any) -> None:
        for _ in range(500):
            if condition():
                return
            await deferLater(reactor, 0.01)
        raise AssertionError("waited in vain")


def in_the_world(tmp_path: Path, test: Any) -> None:
    async def whole() -> None:
        world = World(tmp_path / "bus")
        for number, worker in enumerate(world.workers):
            worker.bus.listen(f"w{number}")
            worker.route = SITES[1]
        try:
            await test(world, *world.workers)
        finally:
            for worker in world.workers:
                worker.handover.stop()
                worker.bus.stop()
            await world.until(lambda: not any(each.bus._links for each in world.workers))

    run(lambda: Deferred.fromCoroutine(whole()))


def test_mail_for_another_workers_site_is_sent_by_that_worker(tmp_path: Path) -> None:
    async def test(world: World, first: Worker, second: Worker) -> None:
        first.accept(1, SITES[1])
        assert first.sites.sent == []  # nobody has said who lives
        world.say_members(0, 1)
        first.accept(2, SITES[1])
        first.accept(3, SITES[0])
        await world.until(lambda: len(second.sites.sent) == 2)
        assert sorted(second.sites.sent) == [(SITES[1], f"{1:013}"), (SITES[1], f"{2:013}")]
        await world.until(lambda: first.sites.sent == [(SITES[0], f"{3:013}")])
        assert world.owners[f"{1:013}", 0] == (101, 1)
        assert [len(each.hand) for each in (first, second)] == [1, 2]
        newest = second.hand.newest(recipient(1))
        assert newest.epoch == 1 and newest.message.inline == b"hello"

    in_the_world(tmp_path, test)


def test_a_new_owner_waits_until_the_old_one_has_let_go(tmp_path: Path) -> None:
    async def test(world: World, first: Worker, second: Worker) -> None:
        world.say_members(0)
        first.accept(1, SITES[1])
        assert first.sites.sent == [(SITES[1], f"{1:013}")]  # alone, everything is ours
        under_way: Deferred[None] = Deferred()
        first.sites.busy[SITES[1]] = under_way
        world.say_members(0, 1)
        second.accept(2, SITES[1])
        first.accept(3, SITES[1])
        await world.until(lambda: len(second.handover) == 2)
        await deferLater(reactor, 0.3)
        assert second.sites.sent == []
        under_way.callback(None)
        await world.until(lambda: len(second.sites.sent) == 2)
        assert first.sites.sent == [(SITES[1], f"{1:013}")]

    in_the_world(tmp_path, test)


def test_what_waits_for_an_owner_can_be_taken_back(tmp_path: Path) -> None:
    async def test(world: World, first: Worker, second: Worker) -> None:
        first.accept(1, SITES[1])
        first.accept(2, SITES[1])
        assert [each.message.queue_id for each in first.handover.drop({f"{1:013}"})] == [f"{1:013}"]
        assert len(first.handover) == 1
        assert [each.message.queue_id for each in first.handover.drop(None)] == [f"{2:013}"]

    in_the_world(tmp_path, test)


def test_what_a_dead_worker_moved_to_us_without_a_word_is_found(tmp_path: Path) -> None:
    async def test(world: World, first: Worker, second: Worker) -> None:
        world.say_members(0, 1)
        await world.until(lambda: first.bus.is_open(1) and second.bus.is_open(0))
        known = recipient(5)
        world.owners[key_of(known)] = 101, 0
        second.hand.keep([known])
        world.owners[f"{6:013}", 0] = 101, 3
        first.bus.stop()
        await world.until(lambda: second.looks == 1)
        assert second.spool.released == [(f"{6:013}", 0, 3)]
        assert world.owners[key_of(known)] == (101, 0)

    in_the_world(tmp_path, test)


def test_a_spool_that_fails_leaves_mail_to_be_claimed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polarismail.relay.handover._RETRY_SECONDS", 0.1)
    monkeypatch.setattr("polarismail.relay.handover._LOOK_TWICE_SECONDS", 0.1)

    async def test(world: World, first: Worker, second: Worker) -> None:
        world.say_members(0, 1)
        await world.until(lambda: first.bus.is_open(1))
        first.spool.broken = True
        first.accept(1, SITES[1])
        await world.until(lambda: first.looks == 1)
        assert first.spool.released == [(f"{1:013}", 0, 0)]
        assert len(first.hand) == 0

    in_the_world(tmp_path, test)


def test_mail_that_goes_round_in_circles_stays_with_the_third(tmp_path: Path) -> None:
    """The two disagree about the site of a name: each thinks that the other owns it."""

    async def test(world: World, first: Worker, second: Worker) -> None:
        world.say_members(0, 1)
        await world.until(lambda: first.bus.is_open(1) and second.bus.is_open(0))
        second.route = SITES[0]  # what the first sends here, the second takes for the first's
        first.accept(1, SITES[1])
        await world.until(lambda: first.sites.sent)
        assert first.sites.sent == [(SITES[1], f"{1:013}")]
        assert world.owners[f"{1:013}", 0] == (100, 2)

    in_the_world(tmp_path, test)
