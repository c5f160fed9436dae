# SPDX-License-Identifier: MIT
"""Disks that fail or fill up: no promise is made that cannot be kept, and outcomes are recorded as long as that is possible."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from polarismail.store.interfaces import Committed, Submission
from polarismail.values.errors import SpoolFull, Unavailable
from tests.reactor import run
from tests.store.committing_child import content
from tests.store.spools import FACTS, TRACE, Place, done, envelope, open_place

HERE = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(("call", "when"), [("fdatasync", 30), ("fdatasync", 31), ("pwrite64", 301), ("fsync", 6)])
def test_an_io_error_ends_all_promises(call: str, when: int, tmp_path: Path) -> None:
    """The error comes from under the real interpreter, at the n-th call; SQLite uses fdatasync and pwrite64, we fsync."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    with open_place("sqlite", tmp_path) as place:
        trace = tmp_path / "trace"
        child = subprocess.run(
            [
                *("strace", "-f", "-qq", "-o", str(trace), "-e", f"trace={call}"),
                *("-e", f"inject={call}:error=EIO:when={when}+"),
                *(sys.executable, "-m", "tests.store.committing_child", place.url, str(tmp_path / "content"), "stop"),
            ],
            capture_output=True,
            cwd=HERE,
            timeout=60,
            check=False,
        )
        assert "INJECTED" in trace.read_text(), child.stderr.decode()
        lines = child.stdout.decode().splitlines()
        assert lines[-1] == "unhealthy", child.stderr.decode()
        accepted = {line[1:14]: int(line[15:]) for line in lines if line[0] == "+"}
        begun = {line[1:14] for line in lines if line[0] == "~"}
        removed = {line[1:14] for line in lines if line[0] == "-"}
        survivor = place.open()
        there = {one.message.queue_id: one.message for one in survivor.claim(survivor.clock + 10**9, 100_000)}
        assert accepted.keys() - begun <= there.keys()
        assert not removed & there.keys()
        for queue_id, message in there.items():
            size = accepted.get(queue_id)
            octets = survivor.read_all(message)
            assert octets == TRACE + content(size) if size else octets.startswith(TRACE)


def test_a_server_that_drops_us_is_tried_again(tmp_path: Path) -> None:
    with open_place("postgresql", tmp_path) as place:
        process = place.open()
        before = process.accept(b"x")
        hang_up = text("SELECT pg_terminate_backend(pg_backend_pid())")
        results = process.together(
            lambda: process.spool.commit(Submission(process.spool.draft(), envelope(), FACTS, TRACE)),
            lambda: process.spool.record([done(before.recipients[0])]),
            lambda: process.database.write(lambda connection: connection.execute(hang_up)),
        )
        assert [type(error) for _, error in results] == [Unavailable] * 3
        assert process.spool.healthy
        process.record([done(before.recipients[0])])
        process.accept(b"y")
        assert process.claim(process.clock, 10) == []
        assert process.counts().messages == 1


def test_what_is_in_doubt_is_taken_up_again(tmp_path: Path) -> None:
    """The commit went through, but nobody heard of it: the message is delivered, not forgotten until the next start."""
    with open_place("postgresql", tmp_path) as place:
        process = place.open()
        draft = process.write(b"x" * 100_000)

        async def lose_the_answer() -> None:
            committed = await process.spool.commit(Submission(draft, envelope(), FACTS, TRACE))
            assert isinstance(committed, Committed)
            process.spool._doubt(draft)

        run(lose_the_answer)
        assert process.next_due() == 0.0
        (claimed,) = process.claim(process.clock, 10)
        assert claimed.message.queue_id == draft.queue_id
        run(draft.drop)
        assert process.read_all(claimed.message) == TRACE + b"x" * 100_000
        assert process.next_due() is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """16 MB of tmpfs."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "polarismail-test", str(mounted)]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("may not mount a tmpfs here")
    yield mounted
    subprocess.run(["umount", "-l", str(mounted)], check=True)


def test_a_full_disk_takes_no_mail_but_lets_it_go(small_disk: Path) -> None:
    place = Place("sqlite", small_disk)
    process = place.open(reserve_octets=4 * 1024 * 1024)
    reserve = small_disk / "main.db.reserve"
    assert reserve.stat().st_size == 4 * 1024 * 1024
    before = [process.accept(content(4000)) for _ in range(20)]
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        room = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        file.write(b"x" * (room - 200_000))
    with pytest.raises(SpoolFull):
        for _ in range(200):
            before.append(process.accept(content(20_000)))
    assert process.database.full
    assert process.spool.healthy
    assert not reserve.exists()
    with pytest.raises(SpoolFull):
        run(process.spool.draft)
    # Every outcome is recorded, and what leaves makes room.
    for committed in before:
        process.record([done(committed.recipients[0])])
    assert process.counts().messages == 0
    filler.unlink()
    for _ in range(100):
        if not process.database.full:
            break
        time.sleep(0.05)
    assert reserve.exists()
    process.accept(content(4000))
    place.stop()


def test_a_large_draft_on_a_full_disk(small_disk: Path) -> None:
    place = Place("sqlite", small_disk)
    process = place.open(reserve_octets=1024)
    with pytest.raises(SpoolFull):
        process.accept(content(30_000_000))
    assert process.spool.healthy
    for _ in range(200):
        if not process.files() and os.statvfs(small_disk).f_bavail > 1000:
            break
        time.sleep(0.02)  # it is removed behind our back
    process.accept(content(4000))
    assert process.counts().messages == 1
    place.stop()
