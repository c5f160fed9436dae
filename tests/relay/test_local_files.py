# SPDX-License-Identifier: MIT
"""Large mail that lies in the spool as a Maildir keeps it: linked where that is safe, copied elsewhere, never half there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from twisted.internet.defer import Deferred, fail, succeed

from polarismail.message.trace import delivery_fields
from polarismail.relay.local import LocalDelivery, LocalSettings
from polarismail.store import maildir_files
from polarismail.store.content import MAILDIR
from polarismail.store.interfaces import MaildirForm, QueuedMessage, QueuedRecipient
from polarismail.store.maildir import FileName
from polarismail.values.address import Mailbox
from polarismail.values.envelope import RecipientState
from polarismail.values.errors import Unavailable
from tests.reactor import reactor, run
from tests.relay.test_local import NOW, World

TRACE = b"Received: from x by y;\r\n\tThu, 1 Jan 2026 00:00:00 +0000\r\n"
CONTENT = b"Subject: large\r\n\r\n" + b"a line of it\r\n" * 10_000
SENDER = Mailbox("sender", "example.com")


class FileWorld(World):
    """A World whose messages are files."""

    def __init__(self, root: Path) -> None:
        (root / "mail").mkdir()
        super().__init__(root / "mail")
        self.spool = root / "spool"
        self.spool.mkdir()
        self.forms: dict[str, MaildirForm] = {}
        self.delivery = LocalDelivery(
            reactor,
            self.content.read,
            self.directory,  # type: ignore[arg-type]
            LocalSettings(),
            hostname="mail.example.org",
            mail_root=str(self.root),
            find_form=self.find_form,
            record_event=lambda name, fields: self.events.append((name, fields)),
            sync=self.sync,
            now=lambda: NOW,
        )

    def find_form(self, message: QueuedMessage) -> Deferred[MaildirForm | None]:
        form = self.forms.get(message.queue_id)
        return fail(Unavailable("gone")) if form is None else succeed(form)

    def file(self, content: bytes = CONTENT, *, recipients: int = 1, account: int | None = 1) -> QueuedMessage:
        """A message in the spool, with the front for this account, or with none."""
        own = b"" if account is None else delivery_fields(SENDER, Mailbox(f"user{account}", "example.org")) + TRACE
        message = evolve(self.message(TRACE + content, inline=False), storage=MAILDIR, recipient_count=recipients)
        disk = (own + content).replace(b"\r\n", b"\n")
        path = self.spool / message.queue_id
        path.write_bytes(disk)
        front_octets = len(own.replace(b"\r\n", b"\n"))
        self.forms[message.queue_id] = MaildirForm(str(path), len(disk), front_octets, TRACE)
        return message

    def expected(self, account: int = 1, content: bytes = CONTENT) -> bytes:
        own = delivery_fields(SENDER, Mailbox(f"user{account}", "example.org"))
        return (own + TRACE + content).replace(b"\r\n", b"\n")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[FileWorld]:
    world = FileWorld(tmp_path)
    yield world
    run(world.delivery.stop)


def inode(path: Path | str) -> int:
    return os.stat(path).st_ino


def again(recipient: QueuedRecipient) -> QueuedRecipient:
    return evolve(recipient, attempts=1)


def test_the_only_recipient_gets_the_spools_file_itself(world: FileWorld) -> None:
    message = world.file()
    (outcome,) = world.deliver(world.recipient(message))
    assert outcome.state is RecipientState.DELIVERED
    (file,) = world.files()
    assert file.read_bytes() == world.expected()
    assert inode(file) == inode(world.forms[message.queue_id].path)
    name = FileName.parse(file.name)
    assert name.disk_octets == file.stat().st_size
    assert name.wire_octets == file.stat().st_size + file.read_bytes().count(b"\n")
    assert world.content.reads == 0


def test_the_whole_file_system_is_synced_for_a_maildir_that_may_be_new_and_the_name_alone_later(
    world: FileWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(
        maildir_files.FileWriter.__init__,
        "__kwdefaults__",
        {
            **maildir_files.FileWriter.__init__.__kwdefaults__,
            "sync_directory": lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")),
        },
    )
    world.deliver(world.recipient(world.file()))
    assert (len(world.syncs), synced) == (1, [])
    world.deliver(world.recipient(world.file()))
    assert (len(world.syncs), synced) == (1, [str(world.root / "example.org/user1/new")])
    # Five maildirs, all new but one: one sync for all.
    world.deliver(*[world.recipient(world.file(account=at), at) for at in range(1, 6)])
    assert (len(world.syncs), len(synced)) == (2, 1)
    world.deliver(*[world.recipient(world.file(account=at), at) for at in range(1, 6)])
    assert (len(world.syncs), len(synced)) == (3, 1)


@pytest.mark.parametrize("account", [None, 2])
def test_a_front_for_somebody_else_is_replaced(world: FileWorld, account: int | None) -> None:
    message = world.file(account=account)
    world.deliver(world.recipient(message))
    (file,) = world.files()
    assert file.read_bytes() == world.expected()
    assert inode(file) != inode(world.forms[message.queue_id].path)
    assert FileName.parse(file.name).wire_octets == file.stat().st_size + file.read_bytes().count(b"\n")


def test_another_trace_is_written_out(world: FileWorld) -> None:
    message = world.file()
    other = b"X-Seen: yes\r\n" + TRACE
    world.forms[message.queue_id] = evolve(world.forms[message.queue_id], trace=other)
    world.deliver(world.recipient(evolve(message, size=len(other + CONTENT))))
    (file,) = world.files()
    assert file.read_bytes() == world.expected().replace(b"Received: from x", b"X-Seen: yes\nReceived: from x", 1)
    assert FileName.parse(file.name).wire_octets == file.stat().st_size + file.read_bytes().count(b"\n")


def test_several_recipients_share_nothing(world: FileWorld) -> None:
    message = world.file(recipients=3)
    outcomes = world.deliver(*[world.recipient(message, at, at) for at in (1, 2, 3)])
    assert [outcome.state for outcome in outcomes] == [RecipientState.DELIVERED] * 3
    seen = {inode(world.forms[message.queue_id].path)}
    for at in (1, 2, 3):
        (file,) = world.files(at)
        assert file.read_bytes() == world.expected(at)
        seen.add(inode(file))
    assert len(seen) == 4
    assert len(world.syncs) == 1


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_no_link_can_be_made_the_kernel_copies(
    world: FileWorld, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def link(*args: Any, **kwargs: Any) -> None:
        tried.append(args)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(maildir_files.os, "link", link)
    message = world.file()
    (outcome,) = world.deliver(world.recipient(message))
    assert tried
    assert outcome.state is RecipientState.DELIVERED
    (file,) = world.files()
    assert file.read_bytes() == world.expected()
    assert inode(file) != inode(world.forms[message.queue_id].path)


def test_where_the_kernel_cannot_copy_we_do(world: FileWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    def sendfile(*args: Any) -> int:
        raise OSError(errno.EINVAL, "not here")

    monkeypatch.setattr(maildir_files.os, "sendfile", sendfile)
    message = world.file(b"Subject: x\r\n\r\n" + b"0123456789\r\n" * 300_000, recipients=2)
    world.deliver(world.recipient(message, 2))
    (file,) = world.files(2)
    assert file.read_bytes().endswith(b"\n\n" + b"0123456789\n" * 300_000)


@pytest.mark.parametrize("change", ["cut", "gone", "unknown"])
def test_a_content_that_is_not_whole_is_not_delivered(world: FileWorld, change: str) -> None:
    message = world.file()
    path = Path(world.forms[message.queue_id].path)
    if change == "cut":
        os.truncate(path, 5000)
    elif change == "gone":
        path.unlink()
    else:
        world.forms.clear()
    good = world.file(account=2)
    bad, other = world.deliver(world.recipient(message), world.recipient(good, 2))
    assert bad.state is RecipientState.QUEUED
    assert bad.reply.startswith("451 4.3.0 The queued message cannot be read in full")
    assert [name for name, _ in world.events] == ["alarm"]
    assert not world.files()
    assert other.state is RecipientState.DELIVERED


@pytest.mark.parametrize("padding", [0, 50_000])
def test_a_loop_is_seen(world: FileWorld, padding: int) -> None:
    fields = b"".join(b"X-%d: %s\r\n" % (at, b"y" * 90) for at in range(padding // 90))
    message = world.file(fields + b"Delivered-To: user1@example.org\r\n" + CONTENT)
    (outcome,) = world.deliver(world.recipient(message))
    assert outcome.state is RecipientState.FAILED
    assert outcome.reply.startswith("554 5.4.6")
    assert not world.files()


def test_a_failed_sync_leaves_the_spools_name_alone(world: FileWorld) -> None:
    message = world.file()
    recipient = world.recipient(message)
    world.problem = OSError(errno.EIO, "broken")
    (outcome,) = world.deliver(recipient)
    assert outcome.state is RecipientState.QUEUED
    assert not world.files()
    assert Path(world.forms[message.queue_id].path).read_bytes() == world.expected()
    world.problem = None
    (outcome,) = world.deliver(again(recipient))
    assert outcome.state is RecipientState.DELIVERED
    (file,) = world.files()
    assert file.read_bytes() == world.expected()


@pytest.mark.parametrize("moved", [False, True])
def test_a_repetition_finds_its_own_file(world: FileWorld, moved: bool) -> None:
    recipient = world.recipient(world.file())
    world.deliver(recipient)
    (file,) = world.files()
    if moved:
        file = file.rename(file.parent.parent / "cur" / f"{file.name}:2,S")
    (outcome,) = world.deliver(again(recipient))
    assert outcome.state is RecipientState.DELIVERED
    assert world.files() == [file]
    assert file.read_bytes() == world.expected()


def test_a_repetition_that_nobody_told_of_makes_no_second_file(world: FileWorld) -> None:
    recipient = world.recipient(world.file())
    world.deliver(recipient)
    (outcome,) = world.deliver(recipient)
    assert outcome.state is RecipientState.DELIVERED
    assert len(world.files()) == 1


def test_what_a_killed_attempt_left_in_tmp_is_replaced(world: FileWorld) -> None:
    recipient = world.recipient(world.file())
    world.deliver(recipient)
    (file,) = world.files()
    file.unlink()
    (file.parent.parent / "tmp" / FileName.parse(file.name).unique).write_bytes(b"half")
    (outcome,) = world.deliver(again(recipient))
    assert outcome.state is RecipientState.DELIVERED
    assert world.files() == [file]
    assert file.read_bytes() == world.expected()
