# SPDX-License-Identifier: MIT
"""Memory that runs short is noticed before the kernel kills: newcomers are told 421, caches are given up; and where it has run
out all the same, the process ends at once and is started anew, instead of going on half broken.

The limit is the least of the machine's memory, that of the process's control groups, and `limit_octets`; each worker has an
even share of it. A look reads one line of /proc, every few seconds.

Guarantees: no message that was promised is lost by the end of the process (docs: durability). HOSTILE E4.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from attrs import frozen
from twisted.logger import ILogObserver, LogEvent, globalLogPublisher
from zope.interface import provider

from polarismail.values.events import RecordEvent

_PAGE_OCTETS = os.sysconf("SC_PAGE_SIZE")
_MARGIN = 0.95
"""It has ended when so much of what is too much is in use."""
EXIT_STATUS = 70


@frozen
class MemorySettings:
    """`[memory]`: how much is too much."""

    limit_octets: int = 0  # 0: what the machine and the control groups allow
    soft_part: float = 0.75
    look_seconds: float = 2.0

    def __attrs_post_init__(self) -> None:
        if not 0 < self.soft_part <= 1:
            raise ValueError(f"soft_part: expected more than 0 and at most 1, found {self.soft_part:g}")
        if self.look_seconds <= 0:
            raise ValueError("look_seconds: expected more than 0")


def limit_of_system(root: str = "/") -> int:
    """Octets that this process and its fellows may use. `root`: where /proc and /sys are."""
    found = [1 << 62]
    with suppress(OSError, ValueError), open(os.path.join(root, "proc/meminfo")) as file:
        found.append(int(file.readline().split()[1]) * 1024)
    for path in _limit_files(root):
        with suppress(OSError, ValueError), open(path) as file:
            found.append(int(file.read()))  # "max" is none
    return min(found)


def _limit_files(root: str) -> Iterator[str]:
    """Of this process's control groups and those around them, version 2 and 1."""
    with suppress(OSError, ValueError), open(os.path.join(root, "proc/self/cgroup")) as file:
        for line in file:
            _, kinds, group = line.rstrip("\n").split(":", 2)
            if kinds not in ("", "memory"):
                continue
            base, name = (
                ("sys/fs/cgroup", "memory.max") if not kinds else ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
            )
            parts = [part for part in group.split("/") if part not in ("", "..")]
            for depth in range(len(parts) + 1):
                yield os.path.join(root, base, *parts[:depth], name)


def used_octets() -> int:
    """What this process has in memory."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE_OCTETS


class Headroom:
    """Watches this process. `close_door(True)` turns newcomers away; `shrink` are caches to give up, once; `relieve` is asked
    at each look to let go of some of what is in hand."""

    def __init__(
        self,
        reactor: Any,
        settings: MemorySettings,
        workers: int,
        record_event: RecordEvent,
        close_door: Callable[[bool], None],
        shrink: Iterable[Callable[[], Any]],
        relieve: Callable[[], Any],
        *,
        used: Callable[[], int] = used_octets,
        allowed: Callable[[], int] = limit_of_system,
    ) -> None:
        self._reactor, self._settings, self._workers = reactor, settings, workers
        self._record_event, self._close_door, self._shrink = record_event, close_door, tuple(shrink)
        self._relieve, self._used, self._allowed = relieve, used, allowed
        self._call: Any = None
        self._limit = 0
        self.is_short = False

    def start(self) -> None:
        """Begin to look."""
        globalLogPublisher.addObserver(end_without_memory)
        self.reconfigure(self._settings)
        self.look()

    def stop(self) -> None:
        """End. Idempotent."""
        globalLogPublisher.removeObserver(end_without_memory)
        call, self._call = self._call, None
        if call is not None:
            call.cancel()

    def reconfigure(self, settings: MemorySettings) -> None:
        """Other bounds, from the next look on."""
        self._settings = settings
        self._limit = min(settings.limit_octets or 1 << 62, self._allowed()) // self._workers

    def statistics(self) -> dict[str, Any]:
        """For `polarismail status`."""
        return {"used_octets": self._used(), "limit_octets": self._limit, "short": self.is_short}

    def look(self) -> None:
        """Judge now, and again in a while."""
        self._call = self._reactor.callLater(self._settings.look_seconds, self.look)
        used, soft = self._used(), self._limit * self._settings.soft_part
        is_short = used > soft * (_MARGIN if self.is_short else 1.0)
        if is_short and not self.is_short:
            for shrink in self._shrink:
                shrink()
            gc.collect()
        if is_short:
            self._relieve()
        if is_short != self.is_short:
            self.is_short = is_short
            self._close_door(is_short)
            self._record_event(
                "memory-short" if is_short else "memory-enough", {"used_octets": used, "limit_octets": self._limit}
            )


@provider(ILogObserver)
def end_without_memory(event: LogEvent) -> None:
    """A log observer: a failure that is a MemoryError, whoever met it, ends the process."""
    failure = event.get("log_failure")
    if failure is not None and failure.check(MemoryError) is not None:
        # Nothing that needs memory any more: not even an orderly stop.
        with suppress(Exception):
            sys.stderr.write("polarismail: out of memory, this process ends\n")
        os._exit(EXIT_STATUS)
