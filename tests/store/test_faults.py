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

from polarismail.values.errors import SpoolFull
from tests.reactor import run
from tests.store.committing_child import content
from tests.store.spools import TRACE, Place, done, open_place

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
        if not process.files():
            break
        time.sleep(0.02)  # it is removed behind our back
    process.accept(content(4000))
    assert process.counts().messages == 1
    place.stop()
