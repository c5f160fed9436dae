# SPDX-License-Identifier: MIT
"""A maildir as one POP3 session sees it: locked, in a stable order, honest about sizes, deleting at commit only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from polarismail.store import maildir as names
from polarismail.store.maildrop import (
    Maildrop,
    MaildropInUse,
    MaildropSettings,
    MessageGone,
    SizeCache,
    open_maildrop,
)

OWNER = os.geteuid()


def put(path: Path, name: str, octets: bytes = b"Subject: x\n\nbody\n", part: str = "new") -> None:
    names.create(str(path), str(path.parent))
    (path / part / name).write_bytes(octets)


def session(path: Path, **bounds: int) -> Maildrop:
    return open_maildrop(
        str(path),
        OWNER,
        SizeCache(10),
        settings=MaildropSettings(**bounds),
        create=lambda: names.create(str(path), str(path.parent)),
    )


def content(maildrop: Maildrop, number: int) -> bytes:
    entry = maildrop.get(number)
    assert entry is not None
    with open(maildrop.open_message(entry), "rb") as file:
        return file.read()


def test_no_mail_yet_is_an_empty_maildrop(tmp_path) -> None:
    maildrop = session(tmp_path / "anna")
    assert maildrop.totals() == (0, 0)
    assert maildrop.get(1) is None
    maildrop.close()
    maildrop.close()


def test_messages_are_in_order_of_delivery_whatever_the_directory(tmp_path) -> None:
    put(tmp_path / "anna", "300.c.h,W=18")
    put(tmp_path / "anna", "100.a.h,W=18:2,S", part="cur")
    put(tmp_path / "anna", "200.b.h,W=18:2,", part="cur")
    put(tmp_path / "anna", "200.a.h,W=18")
    maildrop = session(tmp_path / "anna")
    assert [entry.uidl for _, entry in maildrop.numbered()] == ["100.a.h", "200.a.h", "200.b.h", "300.c.h"]
    maildrop.close()


def test_sizes_count_crlf(tmp_path) -> None:
    put(tmp_path / "anna", "1.told.h,S=17,W=99")
    put(tmp_path / "anna", "2.counted.h,S=17", b"a\nb\r\nc\n")
    put(tmp_path / "anna", "3.empty.h", b"")
    maildrop = session(tmp_path / "anna")
    assert [entry.octets for _, entry in maildrop.numbered()] == [99, len(b"a\r\nb\r\nc\r\n"), 0]
    assert maildrop.totals() == (3, 108)
    maildrop.close()


def test_unique_ids_differ_and_stay(tmp_path) -> None:
    put(tmp_path / "anna", "1.same.h,S=17")
    put(tmp_path / "anna", "1.same.h,S=18", part="cur")
    put(tmp_path / "anna", "2.bad name\n:2,")
    put(tmp_path / "anna", "3." + "x" * 100)
    maildrop = session(tmp_path / "anna")
    first = [entry.uidl for _, entry in maildrop.numbered()]
    maildrop.close()
    assert len(set(first)) == 4
    assert all(0 < len(uidl) <= 70 and uidl.isascii() and uidl.isprintable() and " " not in uidl for uidl in first)
    for name in os.listdir(tmp_path / "anna" / "new"):
        os.rename(tmp_path / "anna" / "new" / name, tmp_path / "anna" / "cur" / f"{name.partition(':')[0]}:2,S")
    maildrop = session(tmp_path / "anna")
    assert [entry.uidl for _, entry in maildrop.numbered()] == first
    maildrop.close()


def test_what_is_no_message_is_not_shown(tmp_path) -> None:
    put(tmp_path / "anna", "1.good.h")
    new = tmp_path / "anna" / "new"
    (tmp_path / "secret").write_bytes(b"not yours")
    (new / "2.link").symlink_to(tmp_path / "secret")
    os.mkfifo(new / "3.fifo")
    (new / "4.directory").mkdir()
    put(tmp_path / "anna", "5.unreadable")
    (new / "5.unreadable").chmod(0)
    put(tmp_path / "anna", ".hidden")
    maildrop = session(tmp_path / "anna")
    assert [entry.uidl for _, entry in maildrop.numbered()] == ["1.good.h"]
    assert maildrop.skipped == 4
    maildrop.close()


@pytest.mark.skipif(OWNER != 0, reason="only root can give a file away")
def test_a_file_of_somebody_else_is_not_shown(tmp_path) -> None:
    put(tmp_path / "anna", "1.theirs.h")
    os.chown(tmp_path / "anna" / "new" / "1.theirs.h", 12345, -1)
    maildrop = session(tmp_path / "anna")
    assert maildrop.totals()[0] == 0
    maildrop.close()


def test_a_missing_directory_is_no_error(tmp_path) -> None:
    put(tmp_path / "anna", "1.x.h")
    os.rmdir(tmp_path / "anna" / "cur")
    maildrop = session(tmp_path / "anna")
    assert maildrop.totals()[0] == 1
    maildrop.close()


def test_two_sessions_of_one_process_exclude_one_another(tmp_path) -> None:
    first = session(tmp_path / "anna")
    with pytest.raises(MaildropInUse):
        session(tmp_path / "anna")
    first.close()
    session(tmp_path / "anna").close()


def test_two_processes_exclude_one_another_and_death_lets_go(tmp_path) -> None:
    put(tmp_path / "anna", "1.x.h")
    script = (
        "import sys; from pathlib import Path; from tests.store.test_maildrop import session;"
        "held = session(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "anna")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdin is not None and other.stdout is not None
    assert other.stdout.readline() == b"locked\n"
    with pytest.raises(MaildropInUse):
        session(tmp_path / "anna")
    other.kill()
    other.wait()
    other.stdin.close()
    other.stdout.close()
    session(tmp_path / "anna").close()


def test_nothing_is_deleted_before_commit(tmp_path) -> None:
    put(tmp_path / "anna", "1.a.h")
    put(tmp_path / "anna", "2.b.h:2,S", part="cur")
    put(tmp_path / "anna", "3.c.h")
    maildrop = session(tmp_path / "anna")
    for number in (1, 2):
        entry = maildrop.get(number)
        assert entry is not None
        entry.deleted = True
    assert maildrop.get(1) is None
    assert maildrop.totals()[0] == 1
    maildrop.close()
    maildrop = session(tmp_path / "anna")
    assert maildrop.totals()[0] == 3
    for number in (1, 2):
        maildrop.entries[number - 1].deleted = True
    maildrop.reset()
    assert maildrop.totals()[0] == 3
    for number in (1, 2):
        maildrop.entries[number - 1].deleted = True
    assert maildrop.commit() == 0
    maildrop.close()
    assert os.listdir(tmp_path / "anna" / "new") == ["3.c.h"]
    assert os.listdir(tmp_path / "anna" / "cur") == []


def test_mail_that_comes_during_a_session_shows_in_the_next(tmp_path) -> None:
    maildrop = session(tmp_path / "anna")
    put(tmp_path / "anna", "1.x.h")
    assert maildrop.totals()[0] == 0
    maildrop.close()
    maildrop = session(tmp_path / "anna")
    assert maildrop.totals()[0] == 1
    maildrop.close()


def test_a_file_that_another_reader_renamed_is_found_again(tmp_path) -> None:
    put(tmp_path / "anna", "1.x.h,S=17", b"one\n")
    put(tmp_path / "anna", "2.y.h,S=17", b"two\n")
    put(tmp_path / "anna", "3.z.h,S=17", b"three\n")
    maildrop = session(tmp_path / "anna")
    os.rename(tmp_path / "anna/new/1.x.h,S=17", tmp_path / "anna/cur/1.x.h,S=17:2,S")
    os.rename(tmp_path / "anna/new/2.y.h,S=17", tmp_path / "anna/cur/2.y.h,S=17:2,RS")
    os.unlink(tmp_path / "anna/new/3.z.h,S=17")
    assert content(maildrop, 1) == b"one\n"
    with pytest.raises(MessageGone):
        content(maildrop, 3)
    maildrop.entries[1].deleted = maildrop.entries[2].deleted = True
    assert maildrop.commit() == 0
    assert os.listdir(tmp_path / "anna" / "cur") == ["1.x.h,S=17:2,S"]
    maildrop.close()


def test_a_link_put_in_the_place_of_a_message_is_not_read(tmp_path) -> None:
    put(tmp_path / "anna", "1.x.h")
    (tmp_path / "secret").write_bytes(b"not yours")
    maildrop = session(tmp_path / "anna")
    os.unlink(tmp_path / "anna/new/1.x.h")
    (tmp_path / "anna/new/1.x.h").symlink_to(tmp_path / "secret")
    with pytest.raises(MessageGone):
        content(maildrop, 1)
    maildrop.close()


def test_a_huge_maildrop_shows_its_newest_messages(tmp_path) -> None:
    for number in range(10):
        put(tmp_path / "anna", f"{number}.x.h,W=10")
    maildrop = session(tmp_path / "anna", max_messages=4)
    assert [entry.uidl for _, entry in maildrop.numbered()] == ["6.x.h", "7.x.h", "8.x.h", "9.x.h"]
    assert maildrop.skipped == 6
    maildrop.close()


def test_no_descriptor_is_left_open(tmp_path) -> None:
    put(tmp_path / "anna", "1.x.h")
    before = len(os.listdir("/proc/self/fd"))
    maildrop = session(tmp_path / "anna")
    with pytest.raises(MaildropInUse):
        session(tmp_path / "anna")
    content(maildrop, 1)
    maildrop.entries[0].deleted = True
    maildrop.commit()
    maildrop.close()
    assert len(os.listdir("/proc/self/fd")) == before
