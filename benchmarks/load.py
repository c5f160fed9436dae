# SPDX-License-Identifier: MIT
"""The load and the proof of its arrival: Postfix's smtp-source and smtp-sink, and mailboxes that are watched cheaply.

A round counts only when every message is where it belongs: whatever is missing raises RoundFailed.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from attrs import define, field

from benchmarks.peers import RECIPIENT, SENDER, wait_for_port

_LOOK_SECONDS = 0.1
# No more arrivals for so long: worth a count.
_SETTLED_SECONDS = 0.2
_PATIENCE_SECONDS = 120.0


class RoundFailed(Exception):
    """A round that must not become a figure; the text says what was missing."""


def send(
    port: int,
    count: int,
    *,
    octets: int = 4096,
    sessions: int = 20,
    keep: bool = True,
    recipient: str = RECIPIENT,
    recipients: int = 1,
) -> tuple[float, float]:
    """Have smtp-source send `count` messages. Returns when it began and when the last was accepted (time.time)."""
    command = ["smtp-source", *(["-d"] if keep else []), "-s", str(sessions), "-m", str(count), "-l", str(octets)]
    command += ["-r", str(recipients), "-f", SENDER, "-t", recipient, f"127.0.0.1:{port}"]
    began = time.time()
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    ended = time.time()
    if done.returncode:
        raise RoundFailed(f"smtp-source to port {port}: {done.stderr.strip() or done.returncode}")
    return began, ended


class Mailboxes:
    """Watches the new/ directories of one server.

    Files are counted only when nothing has arrived for a while; until then one look is one stat of each directory. The
    moment of the last arrival is the directories' own: the time of their last change (to 4 ms, as the kernel keeps it).
    """

    def __init__(self, directories: Sequence[Path]) -> None:
        self._directories = directories
        self._before = self._count()

    def wait(self, count: int) -> float:
        """Until `count` more files are there. Returns when the last of them came (time.time). Raises RoundFailed."""
        counted_at = 0.0
        began = time.time()
        while True:
            time.sleep(_LOOK_SECONDS)
            now, changed = time.time(), self._changed()
            if now - changed < _SETTLED_SECONDS:
                continue
            if changed != counted_at:
                counted_at, there = changed, self._count() - self._before
                if there > count:
                    raise RoundFailed(f"{there} messages where {count} were sent, in {self._directories[0]}")
                if there == count:
                    return changed
            if now - max(began, changed) > _PATIENCE_SECONDS:
                raise RoundFailed(f"{there} of {count} messages came to {self._directories[0]}, and no more")

    def _changed(self) -> float:
        return max((os.stat(path).st_mtime for path in self._directories if path.exists()), default=1.0)

    def _count(self) -> int:
        return sum(_count_files(path) for path in self._directories)


def _count_files(directory: Path) -> int:
    try:
        with os.scandir(directory) as entries:
            return sum(1 for _ in entries)
    except FileNotFoundError:
        return 0


@define
class Sink:
    """smtp-sink, which counts what it is sent into a file: its size changes with each message, its time with the last."""

    port: int
    output: Path
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _before: int = field(default=0, init=False)

    def start(self) -> None:
        """Start it. Raises PeerFailed."""
        user = ["-u", "nobody"] if os.geteuid() == 0 else []
        with open(self.output, "wb") as output:
            self._process = subprocess.Popen(
                ["smtp-sink", "-c", "-m", "1000", *user, f"127.0.0.1:{self.port}", "1000"],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        wait_for_port(self.port, self._process)

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def expect(self) -> None:
        """What comes from now on is counted."""
        self._before = self._count()

    def wait(self, count: int) -> float:
        """Until so many more messages have come. Returns when the last did (time.time). Raises RoundFailed."""
        began = time.time()
        while True:
            time.sleep(_LOOK_SECONDS)
            # In this order: what changes the file later, such as the end of a session, is not the last message.
            changed, there = self.output.stat().st_mtime, self._count() - self._before
            if there >= count:
                time.sleep(_SETTLED_SECONDS)
                if (there := self._count() - self._before) > count:
                    raise RoundFailed(f"{there} messages at smtp-sink where {count} were sent")
                return changed
            if time.time() - max(began, changed) > _PATIENCE_SECONDS:
                raise RoundFailed(f"{there} of {count} messages came to smtp-sink, and no more")

    def _count(self) -> int:
        return max((int(n) for n in re.findall(rb"mesg=(\d+)\r", self._tail())), default=0)

    def _tail(self) -> bytes:
        with open(self.output, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            return file.read()
