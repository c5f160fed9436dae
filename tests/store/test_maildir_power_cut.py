# SPDX-License-Identifier: MIT
"""A power cut (an ext4 that shuts down) right behind the receipts: every file is there, whole, and so is its maildir.

Needs root, mkfs.ext4 and loop devices; skipped elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from polarismail.store import maildir as names
from polarismail.store.content_files import ContentFile, ContentFiles
from polarismail.store.interfaces import MaildirForm
from polarismail.store.maildir_delivery import Delivery, DiskContent, MaildirWriter, to_disk
from polarismail.store.maildir_files import FileDelivery, FileWriter
from polarismail.store.threads import Answers
from tests.crash.disk import Disk, why_not
from tests.reactor import reactor, run

TRACE = b"Received: from here by there;\n\tThu, 1 Jan 2026 00:00:00 +0000\n"
HEAD = to_disk(b"Return-Path: <a@example.com>\r\nDelivered-To: anna@example.org\r\n")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if reason := why_not():
        pytest.skip(reason)
    disk = Disk(tmp_path / "disk")
    disk.mount()
    (disk.path / "mail").mkdir()
    os.sync()
    yield disk
    disk.unmount()


def delivery(root: Path, number: int, *, may_repeat: bool = False) -> Delivery:
    unique = names.render_unique(names.delivery_key(1795310235, "1abcdefghjkmn", number), "h")
    content = to_disk(b"Subject: %d\r\n\r\n" % number + b"x" * 60_000 + b"\r\n")
    return Delivery(str(root / "example.org" / f"user{number % 3}"), 0, unique, HEAD, content, may_repeat)


def test_what_has_a_receipt_is_there_and_whole(disk: Disk) -> None:
    root = disk.path / "mail"
    writer = MaildirWriter(str(root))
    receipts = []
    for batch in range(3):
        receipts += writer.deliver([delivery(root, batch * 10 + at) for at in range(10)])
    writer.close()
    disk.cut_the_power()
    for number, receipt in enumerate(receipts):
        assert receipt.reply.code == 250
        expected = delivery(root, number)
        file = root / "example.org" / f"user{number % 3}" / "new" / receipt.name
        assert file.read_bytes() == expected.head.disk + expected.content.disk


def test_a_large_draft_with_a_receipt_is_there_and_whole(disk: Disk) -> None:
    root = disk.path / "mail"
    writer = MaildirWriter(str(root))
    draft = writer.open_draft(str(root / "anna"), 0, "1.Q1R0.h", b"A: b\r\n")
    for _ in range(50):
        draft.write(b"y" * 78 * 1000 + b"\r\n")
    draft.finish()
    (receipt,) = writer.publish([draft])
    writer.close()
    disk.cut_the_power()
    assert (root / "anna" / "new" / receipt.name).read_bytes() == b"A: b\n" + (b"y" * 78 * 1000 + b"\n") * 50


def file_in_the_spool(disk: Disk, number: int) -> MaildirForm:
    """As the spool leaves it when the row is about to be written."""
    files = ContentFiles(str(disk.path / "spool"), Answers(reactor), 1)
    file = ContentFile(number)
    front = (HEAD.disk + TRACE).replace(b"\n", b"\r\n")
    run(files.append_lines, file, [front, b"Subject: %d\r\n\r\n" % number + b"z" * 78 * 1000 + b"\r\n"])
    run(files.sync, file)
    form = MaildirForm(files.path_of(number), file.octets, len(HEAD.disk + TRACE), TRACE.replace(b"\n", b"\r\n"))
    files.stop()
    return form


def file_delivery(disk: Disk, number: int, form: MaildirForm, *, may_repeat: bool = False) -> FileDelivery:
    unique = names.render_unique(names.delivery_key(1795310235, "1abcdefghjkmn", number), "h")
    front = DiskContent(HEAD.disk + TRACE, HEAD.wire_octets + len(form.trace))
    return FileDelivery(str(disk.path / "mail" / "anna"), 0, unique, front, form, 1, True, may_repeat)


def file_octets(number: int) -> bytes:
    return HEAD.disk + TRACE + b"Subject: %d\n\n" % number + b"z" * 78 * 1000 + b"\n"


@pytest.mark.parametrize("earlier", [0, 1])
def test_a_linked_file_with_a_receipt_is_there_and_whole(disk: Disk, earlier: int) -> None:
    """`earlier`: with a batch before it, only the name is synced."""
    synced: list[int] = []

    def sync_directory(descriptor: int) -> None:
        synced.append(descriptor)
        os.fsync(descriptor)

    writer = FileWriter(str(disk.path / "mail"), sync_directory=sync_directory)
    receipts = []
    for number in range(earlier + 1):
        receipts += writer.deliver_files([file_delivery(disk, number, file_in_the_spool(disk, number))])
    writer.close()
    assert len(synced) == earlier
    disk.cut_the_power()
    for number, receipt in enumerate(receipts):
        assert receipt.reply.code == 250
        file = disk.path / "mail" / "anna" / "new" / receipt.name
        assert file.read_bytes() == file_octets(number)
        assert file.stat().st_nlink == 2  # the row may still refer to the spool's


def test_the_spools_file_outlives_a_link_that_was_cut_off_and_is_delivered_again(disk: Disk) -> None:
    def sync(descriptor: int) -> None:
        raise PowerGone

    form = file_in_the_spool(disk, 1)
    writer = FileWriter(str(disk.path / "mail"), sync=sync)
    with pytest.raises(PowerGone):
        writer.deliver_files([file_delivery(disk, 1, form)])
    writer.close()
    disk.cut_the_power()
    assert not list((disk.path / "mail").rglob("new/*"))  # else this test shows nothing
    assert Path(form.path).read_bytes() == file_octets(1)
    writer = FileWriter(str(disk.path / "mail"))
    (receipt,) = writer.deliver_files([file_delivery(disk, 1, form, may_repeat=True)])
    writer.close()
    os.unlink(form.path)  # the row has gone
    disk.cut_the_power()
    (file,) = (disk.path / "mail" / "anna" / "new").iterdir()
    assert (file.name, file.read_bytes()) == (receipt.name, file_octets(1))


class PowerGone(BaseException):
    """Stops the writer where it stands, as a power cut does."""


def test_a_delivery_that_a_power_cut_tore_is_repaired_by_its_repetition(disk: Disk) -> None:
    """Names can survive without contents: here the power goes between the journal's write-back and the sync."""
    root = disk.path / "mail"

    def sync(descriptor: int) -> None:
        os.fsync(descriptor)  # of the directory alone: names, no contents
        raise PowerGone

    writer = MaildirWriter(str(root), sync=sync)
    with pytest.raises(PowerGone):
        writer.deliver([delivery(root, at) for at in range(6)])
    writer.close()
    disk.cut_the_power()
    torn = [file for file in root.rglob("new/*") if file.stat().st_size == 0]
    assert torn  # else this test shows nothing
    writer = MaildirWriter(str(root))
    receipts = writer.deliver([delivery(root, at, may_repeat=True) for at in range(6)])
    writer.close()
    disk.cut_the_power()
    for number, receipt in enumerate(receipts):
        expected = delivery(root, number)
        new = root / "example.org" / f"user{number % 3}" / "new"
        assert (new / receipt.name).read_bytes() == expected.head.disk + expected.content.disk
    assert len(list(root.rglob("new/*"))) == 6
