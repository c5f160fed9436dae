# SPDX-License-Identifier: MIT
"""What a server uses: CPU and memory of a process and of all that descend from it, from /proc.

A process that has ended is not lost: its parent has waited for it and carries its time on. So the sum over a tree only
grows, in steps of one clock tick (10 ms), and differences of it are what was used between.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def tree(roots: Iterable[int]) -> list[int]:
    """These processes and all their descendants that live now, parents first."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    waiting = list(roots)
    while waiting:
        pid = waiting.pop(0)
        found.append(pid)
        waiting += children.get(pid, ())
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of one process, without its children."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS if fields else 0.0


def cpu_of_tree(roots: Iterable[int]) -> float:
    """User and system time of all of them, those that have ended included."""
    total = 0
    for pid in tree(roots):
        if fields := _stat(pid):
            total += sum(int(field) for field in fields[11:15])
    return total / _TICKS


def cpu_by_process(roots: Iterable[int]) -> dict[int, float]:
    """User and system time of each that lives, without its children."""
    return {pid: cpu_seconds(pid) for pid in tree(roots)}


def pss_octets(roots: Iterable[int]) -> int:
    """Proportional set size: what is shared is divided by how many share it."""
    total = 0
    for pid in tree(roots):
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))
    return total


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; nothing where the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
