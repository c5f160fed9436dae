# SPDX-License-Identifier: MIT
"""Local delivery: outcomes for every recipient, whatever the directory, the spool and the disk do."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from twisted.internet.defer import Deferred, fail, gatherResults
from twisted.internet.task import deferLater

from polarismail.relay.local import LocalDelivery, LocalSettings
from polarismail.store.interfaces import Account, Outcome, QueuedMessage, QueuedRecipient
from polarismail.store.maildir_delivery import sync_file_system
from polarismail.values.address import Mailbox
from polarismail.values.envelope import LOCAL, RecipientState, render_queue_id
from polarismail.values.errors import SpoolUnhealthy, Unavailable
from tests.reactor import reactor, run

CONTENT = b"Received: from x by y\r\nSubject: hello\r\n\r\nbody\r\n"
NOW = 1795310235.25


class Directory:
    """Accounts 1 to 99 exist; 1 to 9 are answered at once, the rest later. 66 is switched off, 77 belongs to another uid."""

    generation = 1

    def __init__(self) -> None:
        self.down = False

    def account_by_id(self, account_id: int) -> Any:
        if self.down:
            return fail(Unavailable("no answer"))
        account = None
        if account_id < 100:
            uid = os.geteuid() + 1 if account_id == 77 else None
            address = Mailbox(f"user{account_id}", "example.org")
            account = Account(account_id, address, f"example.org/user{account_id}", uid, None, "", account_id != 66)
        return account if account_id < 10 else deferLater(reactor, 0, lambda: account)


class Content:
    """What the spool would read. `most` is how much of it was outstanding at one time."""

    def __init__(self) -> None:
        self.octets: dict[str, bytes] = {}
        self.broken = False
        self.reads = 0
        self.at_once = self.most = 0

    def read(self, message: QueuedMessage, offset: int, octets: int) -> Deferred[bytes]:
        self.reads += 1
        if self.broken and offset:
            return fail(SpoolUnhealthy("unreadable"))
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        return deferLater(reactor, 0, self._done, self.octets[message.queue_id][offset : offset + octets])

    def _done(self, octets: bytes) -> bytes:
        self.at_once -= 1
        return octets


class World:
    """A delivery with a mail root of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.directory, self.content = Directory(), Content()
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.syncs: list[str] = []
        self.problem: OSError | None = None
        self.delivery = LocalDelivery(
            reactor,
            self.content.read,
            self.directory,  # type: ignore[arg-type]
            LocalSettings(small_octets=10_000, piece_octets=4096, copies=3),
            hostname="mail.example.org",
            mail_root=str(root),
            record_event=lambda name, fields: self.events.append((name, fields)),
            sync=self.sync,
            now=lambda: NOW,
        )
        self._numbers = iter(range(1, 1000))

    def sync(self, descriptor: int) -> None:
        self.syncs.append(threading.current_thread().name)
        if self.problem is not None:
            raise self.problem
        sync_file_system(descriptor)

    def message(self, octets: bytes = CONTENT, *, inline: bool = True, size: int | None = None) -> QueuedMessage:
        queue_id = render_queue_id(next(self._numbers))
        self.content.octets[queue_id] = octets
        return QueuedMessage(
            queue_id,
            Mailbox("sender", "example.com"),
            NOW,
            len(octets) if size is None else size,
            inline=octets if inline else None,
        )

    def recipient(self, message: QueuedMessage, account: int = 1, number: int = 0) -> QueuedRecipient:
        path = Mailbox(f"user{account}", "example.org")
        return QueuedRecipient(message, number, path, path, LOCAL, account, 0, NOW, NOW + 432000, 0)

    def deliver(self, *recipients: QueuedRecipient) -> list[Outcome]:
        return run(self.delivery.deliver, list(recipients))

    def files(self, account: int = 1) -> list[Path]:
        path = self.root / "example.org" / f"user{account}"
        return sorted(file for part in ("tmp", "new", "cur") for file in (path / part).glob("*"))


@pytest.fixture
def world(tmp_path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    run(world.delivery.stop)


def test_a_message_is_delivered_with_our_fields_in_front(world: World) -> None:
    message = world.message()
    (outcome,) = world.deliver(world.recipient(message))
    assert outcome.state is RecipientState.DELIVERED
    assert (outcome.reply, outcome.remote) == ("250 2.0.0 Delivered to the mailbox", "local")
    (file,) = world.files()
    assert file.name.startswith(f"1795310235.Q{message.queue_id}R0.mail.example.org,S=")
    fields = b"Return-Path: <sender@example.com>\nDelivered-To: user1@example.org\n"
    assert file.read_bytes() == fields + CONTENT.replace(b"\r\n", b"\n")


def test_a_null_reverse_path_is_written_as_one(world: World) -> None:
    world.deliver(world.recipient(evolve(world.message(), reverse_path=None)))
    assert world.files()[0].read_bytes().startswith(b"Return-Path: <>\n")


def test_a_batch_is_one_sync_on_a_thread_of_its_own(world: World) -> None:
    outcomes = world.deliver(*[world.recipient(world.message(), at % 9 + 1) for at in range(50)])
    assert [outcome.state for outcome in outcomes] == [RecipientState.DELIVERED] * 50
    assert world.syncs == ["local-mail"]


def test_outcomes_are_in_the_order_of_the_recipients(world: World) -> None:
    large = world.message(b"Subject: large\r\n\r\n" + b"x" * 70 + b"\r\n" * 10_000)
    looping = world.message(b"delivered-TO:  USER3@example.org\r\n" + CONTENT)
    recipients = [
        world.recipient(world.message(), 1),
        world.recipient(large, 2),
        world.recipient(looping, 3),
        world.recipient(world.message(), 500),
        world.recipient(world.message(inline=False), 4),
        world.recipient(looping, 5),
        world.recipient(world.message(), 66),
        world.recipient(world.message(), 77),
        world.recipient(world.message(size=5, inline=False), 6),
        world.recipient(world.message(), 20),
    ]
    outcomes = world.deliver(*recipients)
    assert [outcome.recipient for outcome in outcomes] == recipients
    assert [outcome.reply.split(" ")[1] for outcome in outcomes] == [
        "2.0.0", "2.0.0", "5.4.6", "5.1.1", "2.0.0", "2.0.0", "4.2.1", "4.3.5", "2.0.0", "2.0.0",
    ]  # fmt: skip
    assert outcomes[2].state is outcomes[3].state is RecipientState.FAILED
    assert outcomes[6].state is RecipientState.QUEUED and outcomes[6].next_attempt > NOW
    assert "runs as uid" in outcomes[7].reply


def test_content_that_is_cut_short_is_not_delivered(world: World) -> None:
    outcomes = world.deliver(
        world.recipient(world.message(inline=False, size=len(CONTENT) + 1)),
        world.recipient(world.message(b"x\r\n" * 9000, inline=False, size=27_001)),
    )
    assert [outcome.state for outcome in outcomes] == [RecipientState.QUEUED] * 2
    assert world.files() == []
    assert [name for name, _ in world.events] == ["alarm"]


def test_a_spool_that_cannot_be_read_defers(world: World) -> None:
    world.content.broken = True
    (outcome,) = world.deliver(world.recipient(world.message(b"x\r\n" * 9000)))
    assert outcome.state is RecipientState.QUEUED
    assert world.files() == []


def test_a_directory_that_does_not_answer_defers(world: World) -> None:
    world.directory.down = True
    (outcome,) = world.deliver(world.recipient(world.message()))
    assert outcome.state is RecipientState.QUEUED and outcome.reply.startswith("451 4.3.0")
    world.directory.down = False


@pytest.mark.parametrize(
    ("number", "status", "alarms"),
    [(errno.EIO, "4.3.0", 1), (errno.ENOSPC, "4.3.1", 1), (errno.EDQUOT, "4.2.2", 0)],
)
@pytest.mark.parametrize("octets", [CONTENT, b"large\r\n" * 9000])
def test_a_disk_that_fails_defers_and_calls_somebody(
    world: World, number: int, status: str, alarms: int, octets: bytes
) -> None:
    world.problem = OSError(number, "injected")
    recipient = world.recipient(world.message(octets))
    outcomes = world.deliver(recipient, world.recipient(world.message(octets), 2))
    assert {outcome.state for outcome in outcomes} == {RecipientState.QUEUED}
    assert {outcome.reply.split(" ")[1] for outcome in outcomes} == {status}
    assert world.files() == [] and world.files(2) == []
    assert [name for name, _ in world.events] == ["alarm"] * alarms
    world.problem = None
    (outcome,) = world.deliver(evolve(recipient, attempts=1, epoch=2))
    assert outcome.state is RecipientState.DELIVERED
    assert len(world.files()) == 1


@pytest.mark.parametrize("octets", [CONTENT, b"large\r\n" * 9000])
@pytest.mark.parametrize("again", [{"attempts": 1}, {"epoch": 1}])
def test_a_repetition_makes_no_second_copy(world: World, octets: bytes, again: dict[str, int]) -> None:
    recipient = world.recipient(world.message(octets))
    world.deliver(recipient)
    (file,) = world.files()
    file.rename(file.parent.parent / "cur" / f"{file.name}:2,S")
    (outcome,) = world.deliver(evolve(recipient, **again))
    assert outcome.state is RecipientState.DELIVERED
    assert [each.name for each in world.files()] == [f"{file.name}:2,S"]


def test_a_large_message_for_many_is_read_once_for_each_group_and_is_the_same_everywhere(world: World) -> None:
    octets = b"Subject: large\r\n\r\n" + b"".join(b"line %d\r\n" % at for at in range(20_000))
    message = world.message(octets, inline=False)
    outcomes = world.deliver(*[world.recipient(message, at, at) for at in range(1, 8)])
    assert {outcome.state for outcome in outcomes} == {RecipientState.DELIVERED}
    assert world.content.reads <= 3 * (len(octets) // 4096 + 2)
    for at in range(1, 8):
        (file,) = world.files(at)
        stored = file.read_bytes()
        assert stored.endswith(b"\n" + octets.replace(b"\r\n", b"\n"))
        assert file.name.endswith(f",S={len(stored)},W={len(stored) + stored.count(10)}")


def test_one_mailbox_that_cannot_be_written_does_not_keep_a_large_message_from_others(world: World) -> None:
    (world.root / "example.org").mkdir()
    (world.root / "example.org" / "user2").write_bytes(b"in the way")
    message = world.message(b"large\r\n" * 9000, inline=False)
    outcomes = world.deliver(*[world.recipient(message, at, at) for at in (1, 2, 3)])
    assert [outcome.state for outcome in outcomes] == [
        RecipientState.DELIVERED,
        RecipientState.QUEUED,
        RecipientState.DELIVERED,
    ]


def test_few_large_messages_are_read_at_a_time(world: World) -> None:
    messages = [world.message(b"large\r\n" * 9000, inline=False) for _ in range(10)]

    async def deliver() -> list[list[Outcome]]:
        return await gatherResults([world.delivery.deliver([world.recipient(each)]) for each in messages])

    outcomes = run(deliver)
    assert {outcome.state for (outcome,) in outcomes} == {RecipientState.DELIVERED}
    assert world.content.most <= 2
    assert len(world.files()) == 10


def test_stopping_waits_for_what_was_begun(tmp_path) -> None:
    world = World(tmp_path)
    large, small = world.message(b"large\r\n" * 9000, inline=False), world.message()

    async def begin_and_stop() -> list[list[Outcome]]:
        begun = gatherResults([world.delivery.deliver([world.recipient(each)]) for each in (large, small)])
        await world.delivery.stop()
        assert begun.called
        return await begun

    assert {outcome.state for (outcome,) in run(begin_and_stop)} == {RecipientState.DELIVERED}
    assert not any(thread.name.startswith(("local-mail", "large-mail")) for thread in threading.enumerate())


def test_stopping_before_anything_came_is_possible(tmp_path) -> None:
    run(World(tmp_path).delivery.stop)


def test_no_recipients_give_no_outcomes(world: World) -> None:
    assert world.deliver() == []


def test_a_broken_disk_calls_once_a_minute(world: World) -> None:
    world.problem = OSError(errno.EIO, "injected")
    for _ in range(5):
        world.deliver(world.recipient(world.message()))
    assert len(world.events) == 1


def test_memory_does_not_follow_the_size_of_messages(world: World) -> None:
    piece = (b"z" * 62 + b"\r\n") * 64

    class Endless:
        """Ten messages of 10 MB, of which only a piece is ever in memory."""

        def __getitem__(self, wanted: slice) -> bytes:
            return piece[: max(0, min(wanted.stop, size) - wanted.start)]

    size = 4096 * 2560
    messages = [evolve(world.message(b"", inline=False), size=size) for _ in range(10)]
    for message in messages:
        world.content.octets[message.queue_id] = Endless()  # type: ignore[assignment]
    before = resident()
    outcomes = world.deliver(*[world.recipient(message) for message in messages])
    assert {outcome.state for outcome in outcomes} == {RecipientState.DELIVERED}
    assert resident() - before < 8 << 20


def resident() -> int:
    """Octets of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
