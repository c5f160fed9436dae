# SPDX-License-Identifier: MIT
"""Memory that runs short: seen, said, the door closed until there is enough; none left: the process ends (HOSTILE E4)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.task import Clock

from polarismail.headroom import EXIT_STATUS, Headroom, MemorySettings, limit_of_system, used_octets


def test_the_door_is_closed_and_caches_go_until_there_is_enough() -> None:
    clock, used, done = Clock(), [100], []
    events: list[Any] = []
    headroom = Headroom(
        clock,
        MemorySettings(soft_part=0.5),
        2,
        lambda *event: events.append(event),
        lambda closed: done.append(f"door {closed}"),
        [lambda: done.append("shrunk")],
        lambda: done.append("relieved"),
        used=lambda: used[0],
        allowed=lambda: 1000,
    )
    headroom.start()
    used[0] = 251  # of half of 500
    clock.advance(2)
    assert headroom.is_short and done == ["shrunk", "relieved", "door True"]
    used[0] = 240
    clock.advance(2)
    assert headroom.is_short
    used[0] = 200
    clock.advance(2)
    headroom.stop()
    assert not headroom.is_short and done == ["shrunk", "relieved", "door True", "relieved", "door False"]
    assert events == [
        ("memory-short", {"used_octets": 251, "limit_octets": 500}),
        ("memory-enough", {"used_octets": 200, "limit_octets": 500}),
    ]
    assert not clock.getDelayedCalls()


@pytest.mark.parametrize(
    ("group", "files", "limit"),
    [
        ("0::/a/b", {}, 8192),
        ("0::/a/b", {"sys/fs/cgroup/a/memory.max": "4096\n", "sys/fs/cgroup/a/b/memory.max": "max\n"}, 4096),
        ("4:memory:/x\n0::/", {"sys/fs/cgroup/memory/x/memory.limit_in_bytes": "2048\n"}, 2048),
        ("4:memory:/x\n0::/", {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, 8192),
        ("nonsense:/:", {}, 8192),
    ],
)
def test_the_least_limit_counts(group: str, files: dict[str, str], limit: int, tmp_path: Path) -> None:
    for name, text in {"proc/meminfo": "MemTotal: 8 kB\n", "proc/self/cgroup": f"{group}\n", **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert limit_of_system(str(tmp_path)) == limit


def test_this_machine_can_be_asked() -> None:
    assert 1 << 20 < used_octets() < limit_of_system()


def test_a_process_without_memory_ends_whoever_met_it() -> None:
    """In a child whose address space is bounded: the failure of a Deferred that nobody waits for is enough."""
    program = """
import gc, resource
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import globalLogBeginner
from polarismail.headroom import Headroom, MemorySettings
globalLogBeginner.beginLoggingTo([], redirectStandardIO=False)
Headroom(Clock(), MemorySettings(), 1, print, print, [], print).start()
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
waiting = Deferred()
waiting.addCallback(lambda octets: bytes(octets))
waiting.callback(1 << 32)
del waiting
gc.collect()
print("still here")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (EXIT_STATUS, ""), ended.stderr
    assert "out of memory" in ended.stderr


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="soft_part"):
        MemorySettings(soft_part=1.5)
    with pytest.raises(ValueError, match="look_seconds"):
        MemorySettings(look_seconds=0)
