# SPDX-License-Identifier: MIT
"""Batches into maildirs: what is on disk when the receipts come, and what is left when they are bad."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polarismail.store import maildir as names
from polarismail.store.maildir_delivery import Delivery, MaildirWriter, Receipt, refusal, sync_file_system, to_disk
from polarismail.store.maildrop import SizeCache

OWNER = os.geteuid()
HEAD = b"Return-Path: <a@example.com>\r\nDelivered-To: anna@example.org\r\n"
BODY = b"Subject: hello\r\n\r\nline one\r\nline two\r\n"


def unique(number: int = 0) -> str:
    return names.render_unique(names.delivery_key(1795310235.0, "1abcdefghjkmn", number), "mail.example.org")


def delivery(path: Path, number: int = 0, body: bytes = BODY, *, may_repeat: bool = False) -> Delivery:
    return Delivery(str(path), OWNER, unique(number), to_disk(HEAD), to_disk(body), may_repeat)


def files(path: Path) -> list[str]:
    return sorted(
        f"{part}/{name}" for part in names.PARTS for name in (os.listdir(path / part) if (path / part).exists() else ())
    )


@pytest.fixture
def syncs() -> list[int]:
    return []


@pytest.fixture
def writer(tmp_path, syncs):
    def sync(descriptor: int) -> None:
        syncs.append(os.fstat(descriptor).st_dev)
        sync_file_system(descriptor)

    writer = MaildirWriter(str(tmp_path), open_maildirs=2, sync=sync)
    yield writer
    writer.close()


@pytest.mark.parametrize("made", range(4))
def test_a_maildir_whose_making_was_cut_off_is_completed(made: int, tmp_path, writer, monkeypatch) -> None:
    """Found by a power cut between two mkdirs: cur/ was never made, and a mail reader could not put anything there."""
    mkdir, left = os.mkdir, made

    def dies(*args: object, **settings: object) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        mkdir(*args, **settings)

    monkeypatch.setattr(os, "mkdir", dies)
    with pytest.raises(KeyboardInterrupt):
        names.create(str(tmp_path / "anna"), str(tmp_path))
    monkeypatch.undo()
    (receipt,) = writer.deliver([delivery(tmp_path / "anna")])
    assert receipt.reply.code == 250
    assert sorted(os.listdir(tmp_path / "anna")) == ["cur", "new", "tmp"]


def test_a_batch_costs_one_sync(tmp_path, writer, syncs) -> None:
    receipts = writer.deliver([delivery(tmp_path / f"user{at % 5}", at) for at in range(50)])
    assert all(receipt.reply.code == 250 and not receipt.repeated for receipt in receipts)
    assert len(syncs) == 1
    assert sum(len(os.listdir(tmp_path / f"user{at}" / "new")) for at in range(5)) == 50
    assert all(not os.listdir(tmp_path / f"user{at}" / "tmp") for at in range(5))


def test_the_file_has_our_fields_first_lf_line_ends_and_mode_0600(tmp_path, writer) -> None:
    (receipt,) = writer.deliver([delivery(tmp_path / "anna")])
    file = tmp_path / "anna" / "new" / receipt.name
    assert file.read_bytes() == (HEAD + BODY).replace(b"\r\n", b"\n")
    assert file.stat().st_mode & 0o777 == 0o600
    name = names.FileName.parse(receipt.name)
    assert (name.disk_octets, name.wire_octets) == (file.stat().st_size, len(HEAD + BODY))


def test_a_repeated_delivery_writes_the_same_name(tmp_path, writer) -> None:
    first = writer.deliver([delivery(tmp_path / "anna")])
    again = writer.deliver([delivery(tmp_path / "anna", may_repeat=True)])
    assert (again[0].repeated, again[0].name) == (True, first[0].name)
    careless = writer.deliver([delivery(tmp_path / "anna")])
    assert careless[0].name == first[0].name
    assert files(tmp_path / "anna") == [f"new/{first[0].name}"]


def test_a_copy_that_a_reader_moved_to_cur_is_found(tmp_path, writer) -> None:
    (first,) = writer.deliver([delivery(tmp_path / "anna")])
    os.rename(tmp_path / "anna" / "new" / first.name, tmp_path / "anna" / "cur" / f"{first.name}:2,FS")
    (again,) = writer.deliver([delivery(tmp_path / "anna", may_repeat=True)])
    assert again.repeated
    assert files(tmp_path / "anna") == [f"cur/{first.name}:2,FS"]


def test_another_host_name_does_not_make_a_second_copy(tmp_path, writer) -> None:
    (first,) = writer.deliver([delivery(tmp_path / "anna")])
    renamed = names.render_unique(names.key_of(first.name), "other.example.org")
    again = writer.deliver(
        [Delivery(str(tmp_path / "anna"), OWNER, renamed, to_disk(HEAD), to_disk(BODY), may_repeat=True)]
    )
    assert again[0].repeated
    assert files(tmp_path / "anna") == [f"new/{first.name}"]


@pytest.mark.parametrize("place", ["new", "cur"])
@pytest.mark.parametrize("torn", [b"", b"Return-Path: <a@ex", None])
def test_a_torn_copy_is_replaced_where_it_lies(tmp_path, writer, place: str, torn: bytes | None) -> None:
    (first,) = writer.deliver([delivery(tmp_path / "anna")])
    whole = (tmp_path / "anna" / "new" / first.name).read_bytes()
    seen = first.name + (":2,S" if place == "cur" else "")
    os.rename(tmp_path / "anna" / "new" / first.name, tmp_path / "anna" / place / seen)
    (tmp_path / "anna" / place / seen).write_bytes(bytes(len(whole)) if torn is None else torn)
    (again,) = writer.deliver([delivery(tmp_path / "anna", may_repeat=True)])
    assert again.reply.code == 250
    assert files(tmp_path / "anna") == [f"{place}/{seen}"]
    assert (tmp_path / "anna" / place / seen).read_bytes() == whole


def test_what_a_killed_attempt_left_in_tmp_is_taken_over(tmp_path, writer) -> None:
    names.create(str(tmp_path / "anna"), str(tmp_path))
    (tmp_path / "anna" / "tmp" / unique()).write_bytes(b"half of")
    (receipt,) = writer.deliver([delivery(tmp_path / "anna")])
    assert files(tmp_path / "anna") == [f"new/{receipt.name}"]


def test_a_link_planted_in_tmp_is_not_written_through(tmp_path, writer) -> None:
    names.create(str(tmp_path / "anna"), str(tmp_path))
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "anna" / "tmp" / unique()).symlink_to(tmp_path / "victim")
    (receipt,) = writer.deliver([delivery(tmp_path / "anna")])
    assert receipt.reply.code == 250
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_a_failed_sync_leaves_nothing_and_says_later(tmp_path) -> None:
    def sync(descriptor: int) -> None:
        if next(problems):
            raise OSError(errno.EIO, "injected")

    problems = iter([True, False, True])
    writer = MaildirWriter(str(tmp_path), sync=sync)
    receipts = writer.deliver([delivery(tmp_path / "anna", at) for at in range(3)])
    assert [(receipt.reply.code, receipt.alarm) for receipt in receipts] == [(451, True)] * 3
    assert files(tmp_path / "anna") == []
    (written,) = writer.deliver([delivery(tmp_path / "anna")])
    os.rename(tmp_path / "anna" / "new" / written.name, tmp_path / "anna" / "cur" / f"{written.name}")
    (repeated,) = writer.deliver([delivery(tmp_path / "anna", may_repeat=True)])
    assert repeated.reply.code == 451
    assert files(tmp_path / "anna") == []  # nobody knows any more whether that copy is on the disk
    writer.close()


def test_one_bad_maildir_does_not_keep_the_others(tmp_path, writer) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "tmp").symlink_to("/tmp")
    strange = Delivery(str(tmp_path / "ok"), OWNER + 1, unique(9), to_disk(HEAD), to_disk(BODY))
    receipts = writer.deliver(
        [
            delivery(tmp_path / "ok", 0),
            delivery(tmp_path / "file", 1),
            delivery(tmp_path / "linked", 2),
            strange,
            delivery(tmp_path / "ok", 3),
        ]
    )
    assert [receipt.reply.code for receipt in receipts] == [250, 451, 451, 451, 250]
    assert "belongs to uid" in receipts[3].reply.text
    assert len(os.listdir(tmp_path / "ok" / "new")) == 2


def test_a_maildir_that_was_moved_away_gets_no_more_mail(tmp_path, writer) -> None:
    writer.deliver([delivery(tmp_path / "anna", 0)])
    os.rename(tmp_path / "anna", tmp_path / "old")
    writer.deliver([delivery(tmp_path / "anna", 1)])
    assert len(os.listdir(tmp_path / "old" / "new")) == 1
    assert len(os.listdir(tmp_path / "anna" / "new")) == 1
    shutil.rmtree(tmp_path / "anna")
    (receipt,) = writer.deliver([delivery(tmp_path / "anna", 2)])
    assert receipt.reply.code == 250
    os.rmdir(tmp_path / "anna" / "tmp")
    (receipt,) = writer.deliver([delivery(tmp_path / "anna", 3)])
    assert receipt.reply.code == 250
    assert len(os.listdir(tmp_path / "anna" / "new")) == 2


def test_the_cache_of_directories_is_bounded(tmp_path, writer) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for turn in range(3):
        writer.deliver([delivery(tmp_path / f"user{at}", turn) for at in range(20)])
    assert len(os.listdir("/proc/self/fd")) - before <= 2 * 2 + 1
    writer.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_drafts_become_files_in_one_batch(tmp_path, writer, syncs) -> None:
    body = b"Subject: large\r\n\r\n" + b"0123456789\r\n" * 10_000
    drafts = [writer.open_draft(str(tmp_path / f"user{at}"), OWNER, unique(at), HEAD) for at in range(3)]
    for start in range(0, len(body), 4097):
        for draft in drafts:
            draft.write(body[start : start + 4097])
    for draft in drafts:
        draft.finish()
    receipts = writer.publish(drafts)
    assert len(syncs) == 1
    for at, receipt in enumerate(receipts):
        file = tmp_path / f"user{at}" / "new" / receipt.name
        assert file.read_bytes() == (HEAD + body).replace(b"\r\n", b"\n")
        assert names.FileName.parse(receipt.name).wire_octets == len(HEAD + body)
        assert names.FileName.parse(receipt.name).disk_octets == file.stat().st_size


def test_an_abandoned_draft_leaves_nothing(tmp_path, writer) -> None:
    draft = writer.open_draft(str(tmp_path / "anna"), OWNER, unique(), HEAD)
    draft.write(b"x" * 100_000)
    draft.abandon()
    draft.abandon()
    assert files(tmp_path / "anna") == []


def specified(octets: bytes) -> tuple[bytes, int]:
    """What lies on disk, and how long a reader makes it again."""
    disk = octets.replace(b"\r\n", b"\n")
    return disk, len(disk) + disk.count(b"\n") - disk.count(b"\r\n")


@given(st.lists(st.sampled_from([b"\r\n", b"a", b".", b"\0", b"\xff"])).map(b"".join))
@settings(deadline=None)
def test_line_ends_of_spooled_content_become_lf(octets: bytes) -> None:
    content = to_disk(octets)
    assert (content.disk, content.wire_octets) == specified(octets)
    assert content.wire_octets == len(octets)


@pytest.mark.parametrize("octets", [b"a\rb\r\n", b"a\nb\r\n", b"\r\r\n", b"\r", b"\n"])
def test_stray_line_ends_are_kept(octets: bytes) -> None:
    content = to_disk(octets)
    assert (content.disk, content.wire_octets) == specified(octets)


@given(st.binary(max_size=60).map(lambda raw: bytes(b"\r\na."[octet % 4] for octet in raw)), st.data())
@settings(deadline=None, max_examples=200)
def test_pieces_of_a_draft_may_be_cut_anywhere(tmp_path_factory, octets: bytes, data) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(octets)), max_size=6)))
    path = tmp_path_factory.getbasetemp() / "sliced"
    names.create(str(path), str(path.parent))
    writer = MaildirWriter(str(path.parent), sync=lambda descriptor: None)
    draft = writer.open_draft(str(path), OWNER, unique(), b"")
    for start, end in zip([0, *cuts], [*cuts, len(octets)], strict=True):
        draft.write(octets[start:end])
    draft.finish()
    (receipt,) = writer.publish([draft])
    disk, wire_octets = specified(octets)
    assert (path / "new" / receipt.name).read_bytes() == disk
    assert names.FileName.parse(receipt.name).wire_octets == wire_octets
    descriptor = os.open(path / "new" / receipt.name, os.O_RDONLY)
    assert SizeCache(1).octets(descriptor) == wire_octets
    os.close(descriptor)
    os.unlink(path / "new" / receipt.name)
    writer.close()


@pytest.mark.parametrize(
    ("number", "status"),
    [(errno.ENOSPC, "4.3.1"), (errno.EDQUOT, "4.2.2"), (errno.EIO, "4.3.0"), (errno.EMFILE, "4.3.0")],
)
def test_errors_of_the_disk_are_deferrals(number: int, status: str) -> None:
    receipt = refusal(OSError(number, os.strerror(number)))
    assert isinstance(receipt, Receipt)
    assert receipt.reply.is_transient
    assert receipt.reply.dotted == status


def test_a_full_disk_defers_and_leaves_no_half_files(tmp_path) -> None:
    mounted = tmp_path / "small"
    mounted.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", mounted], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        writer = MaildirWriter(str(mounted))
        receipts = writer.deliver([delivery(mounted / "anna", at, BODY + b"x" * 9000) for at in range(20)])
        good = [receipt for receipt in receipts if receipt.reply.is_positive]
        bad = [receipt for receipt in receipts if not receipt.reply.is_positive]
        assert good and bad
        assert {(receipt.reply.dotted, receipt.alarm) for receipt in bad} == {("4.3.1", True)}
        assert files(mounted / "anna") == sorted(f"new/{receipt.name}" for receipt in good)
        writer.close()
    finally:
        subprocess.run(["umount", mounted], check=True)
