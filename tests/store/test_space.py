# SPDX-License-Identifier: MIT
"""Free space: judged before it is used up, on real file systems; what cannot be looked at changes nothing (HOSTILE E1)."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from polarismail.store.space import Filling, Space, SpaceSettings, is_short

GIB, MESSAGE = 1 << 30, 50 << 20


@pytest.mark.parametrize(
    ("free", "total", "short"),
    [
        (50 * GIB, 100 * GIB, False),
        (9 * GIB, 100 * GIB, True),  # below a tenth
        (20 * GIB, 1000 * GIB, False),  # ten are enough
        (9 * GIB, 1000 * GIB, True),
        (90 << 20, 200 << 20, True),  # below two messages
        (110 << 20, 200 << 20, False),
    ],
)
def test_octets(free: int, total: int, short: bool) -> None:
    assert is_short(Filling(free, total, 0, 0), SpaceSettings(), MESSAGE) is short


def test_inodes_count_where_they_are_counted() -> None:
    plenty = 50 * GIB, 100 * GIB
    assert is_short(Filling(*plenty, 19, 1000), SpaceSettings(), MESSAGE)
    assert not is_short(Filling(*plenty, 20, 1000), SpaceSettings(), MESSAGE)
    assert not is_short(Filling(*plenty, 0, 0), SpaceSettings(), MESSAGE)


class Reactor:
    """Calls from threads are made at once, there."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def callFromThread(self, function: Callable[..., Any], *args: Any) -> None:
        with self.lock:
            function(*args)


def space(settings: SpaceSettings, events: list[Any], **paths: str) -> Space:
    return Space(Reactor(), paths, settings, 1000, lambda *event: events.append(event))


def test_it_begins_and_ends_at_different_fillings_and_is_said_once() -> None:
    events: list[Any] = []
    watched = space(SpaceSettings(min_free_part=0.5, enough_octets=0), events, spool="/s", mail="/m")
    for free in (60, 49, 51, 48, 52, 53):
        watched.judge({"spool": Filling(free * 1000, 100_000, 0, 0), "mail": Filling(70_000, 100_000, 5, 9)})
    assert [(name, fields["path"], fields["free_octets"]) for name, fields in events] == [
        ("space-short", "/s", 49_000),
        ("space-enough", "/s", 53_000),
    ]
    assert not watched.is_short and watched.free_octets == 53_000
    watched.judge({"mail": Filling(1000, 100_000, 5, 9)})
    assert watched.is_short and watched.free_octets == 1000
    assert watched.statistics()["mail"] == {"free_octets": 1000, "free_inodes": 5, "short": True}
    watched.judge({"mail": OSError(5, "I/O error"), "spool": OSError(5, "I/O error")})
    assert watched.is_short


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=100", "x", str(tmp_path)], capture_output=True
    )
    if done.returncode:
        pytest.skip("no tmpfs may be mounted")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_real_file_system(tmpfs: Path) -> None:
    settings = SpaceSettings(look_seconds=0.01)
    assert not is_short(Filling.of(str(tmpfs)), settings, 1000)
    assert Filling.of(str(tmpfs / "not" / "yet")) == Filling.of(str(tmpfs))
    (tmpfs / "file").write_bytes(b"x" * 1_000_000)
    assert is_short(Filling.of(str(tmpfs)), settings, 1000)
    (tmpfs / "file").unlink()
    for at in range(98):
        (tmpfs / str(at)).touch()
    assert is_short(Filling.of(str(tmpfs)), settings, 1000)


def test_a_thread_looks_and_looks_again(tmp_path: Path) -> None:
    seen = threading.Event()
    watched = space(SpaceSettings(look_seconds=0.01), [], spool=str(tmp_path), gone="/proc/self/fd/9999/x")
    looks = []
    judge = watched.judge

    def note(found: Any) -> None:
        judge(found)
        looks.append(threading.current_thread().name)
        if len(looks) == 3:
            seen.set()

    watched.judge = note  # type: ignore[method-assign]
    fired: list[None] = []
    watched.start().addCallback(fired.append)
    assert seen.wait(10)
    watched.stop()
    assert fired == [None] and set(looks) == {"space"}
    assert watched.free_octets <= os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="less than 1"):
        SpaceSettings(min_free_part=1.0)
    with pytest.raises(ValueError, match="look_seconds"):
        SpaceSettings(look_seconds=0)
