# SPDX-License-Identifier: MIT
"""Whether the file systems have room for more mail, seen before they are full: what is refused at MAIL costs nobody anything.

A disk that is full breaks what was promised slowly; so new mail ends while delivery, reports and logs still have room.

Guarantees: a look blocks a thread of its own and nothing else, so that a file system that hangs delays nobody; what begins at
one filling ends at another, so that it does not flap. A file system that does not count inodes (btrfs) has enough of them.
HOSTILE E1.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

from attrs import frozen
from twisted.internet.defer import Deferred
from twisted.logger import Logger

from polarismail.values.events import RecordEvent

_MARGIN = 1.05
"""How much more than what is too little is enough again."""


@frozen
class SpaceSettings:
    """`[space]`: what must be free, of what users other than root may use (KumoMTA: 10 %)."""

    min_free_part: float = 0.1
    enough_octets: int = 10737418240  # so much is enough, whatever part it is; 0: never
    min_free_messages: float = 2.0  # of smtp.max_message_octets
    min_free_inodes_part: float = 0.02
    look_seconds: float = 5.0

    def __attrs_post_init__(self) -> None:
        if self.min_free_part >= 1 or self.min_free_inodes_part >= 1:
            raise ValueError("min_free_part and min_free_inodes_part: expected less than 1")
        if self.look_seconds <= 0:
            raise ValueError("look_seconds: expected more than 0")


@frozen
class Filling:
    """What one file system has."""

    free_octets: int
    total_octets: int
    free_inodes: int
    total_inodes: int  # 0: not counted

    @classmethod
    def of(cls, path: str) -> Filling:
        """Of the file system of `path`, or where it does not exist yet, of its parent. Raises OSError."""
        while not os.path.exists(path) and os.path.dirname(path) != path:
            path = os.path.dirname(path)
        found = os.statvfs(path)
        return cls(found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize, found.f_favail, found.f_files)


def is_short(filling: Filling, settings: SpaceSettings, message_octets: int, *, margin: float = 1.0) -> bool:
    """Whether it has too little room for more mail."""
    needed = settings.min_free_part * filling.total_octets
    if settings.enough_octets:
        needed = min(needed, settings.enough_octets)
    needed = max(needed, settings.min_free_messages * message_octets)
    return (
        filling.free_octets < needed * margin
        or filling.free_inodes < settings.min_free_inodes_part * filling.total_inodes * margin
    )


class Space:
    """Looks at named paths every few seconds. Everything but the look is on the reactor's thread."""

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        paths: Mapping[str, str],
        settings: SpaceSettings,
        message_octets: int,
        record_event: RecordEvent,
    ) -> None:
        self._reactor, self._paths, self._record_event = reactor, dict(paths), record_event
        self._settings, self._message_octets = settings, message_octets
        self.is_short = False  # no mail is taken
        self.free_octets: float = float("inf")  # where a content would go; more than this is not begun
        self._fillings: dict[str, Filling] = {}
        self._short: set[str] = set()
        self._stopping = threading.Event()
        self._failed: set[str] = set()
        self._when_seen: Deferred[None] | None = None

    def start(self) -> Deferred[None]:
        """Begin to look; fires after the first look."""
        seen: Deferred[None] = Deferred()
        self._when_seen = seen  # gone with the first look, which may come before the next line
        threading.Thread(target=self._run, name="space", daemon=True).start()
        return seen

    def stop(self) -> None:
        """End. Idempotent."""
        self._stopping.set()

    def reconfigure(self, settings: SpaceSettings, message_octets: int) -> None:
        """Other bounds, from the next look on."""
        self._settings, self._message_octets = settings, message_octets

    def statistics(self) -> dict[str, Any]:
        """For `polarismail status`."""
        return {
            name: {
                "free_octets": seen.free_octets,
                "free_inodes": seen.free_inodes if seen.total_inodes else None,
                "short": name in self._short,
            }
            for name, seen in self._fillings.items()
        }

    def _run(self) -> None:
        while not self._stopping.is_set():
            seen: dict[str, Filling | OSError] = {}
            for name, path in self._paths.items():
                try:
                    seen[name] = Filling.of(path)
                except OSError as problem:
                    seen[name] = problem
            if self._stopping.is_set():
                return
            self._reactor.callFromThread(self.judge, seen)
            self._stopping.wait(self._settings.look_seconds)

    def judge(self, seen: Mapping[str, Filling | OSError]) -> None:
        """Take what a look has found. What could not be looked at stays as it was."""
        for name, found in seen.items():
            if isinstance(found, OSError):
                if name not in self._failed:
                    self._failed.add(name)
                    self.log.warn("{path} cannot be looked at: {why}", path=self._paths[name], why=str(found))
                continue
            self._failed.discard(name)
            self._fillings[name] = found
            was_short = name in self._short
            now_short = is_short(found, self._settings, self._message_octets, margin=_MARGIN if was_short else 1.0)
            if now_short != was_short:
                self._short ^= {name}
                self._tell("space-short" if now_short else "space-enough", name, found)
        self.is_short = bool(self._short)
        self.free_octets = min([each.free_octets for each in self._fillings.values()], default=float("inf"))
        waiting, self._when_seen = self._when_seen, None
        if waiting is not None:
            waiting.callback(None)

    def _tell(self, event: str, name: str, found: Filling) -> None:
        fields = {"path": self._paths[name], "free_octets": found.free_octets, "total_octets": found.total_octets}
        if found.total_inodes:
            fields |= {"free_inodes": found.free_inodes, "total_inodes": found.total_inodes}
        self._record_event(event, fields)
