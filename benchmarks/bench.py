# SPDX-License-Identifier: MIT
"""What every row has in common: where it works, what it is measured against, and how its servers are asked about themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from attrs import asdict, define, field, frozen

from benchmarks.peers import ROOT, Certificate, Polarismail
from polarismail.net.tls import make_self_signed


@frozen
class Bar:
    """What is asked of a row, and what it aims at. `of`: whether the ratio ours / Postfix is meant, or our own figure;
    `direction`: whether to be above or below."""

    asked: float
    aim: float | str
    of: Literal["ratio", "figure"] = "ratio"
    direction: Literal["above", "below"] = "above"

    def is_met(self, value: float | None) -> bool:
        """Whether what was measured is enough."""
        if value is None:
            return False
        return value >= self.asked if self.direction == "above" else value < self.asked

    def render(self, value: float | str) -> str:
        """For the table: `2x`, `<10`."""
        if isinstance(value, str):
            return value
        return f"{'<' if self.direction == 'below' else ''}{value:g}{'x' if self.of == 'ratio' else ''}"


@define
class Line:
    """One line of the table: a figure of each server. None: not measured, and `note` says why."""

    row: str
    work: str
    unit: str
    polarismail: float | None
    postfix: float | None
    bar: Bar | None = None
    note: str = ""
    details: dict[str, Any] = field(factory=dict)  # CPU, lag, waits, rounds

    @property
    def ratio(self) -> float | None:
        """Ours / Postfix."""
        return self.polarismail / self.postfix if self.polarismail is not None and self.postfix else None

    @property
    def met(self) -> bool | None:
        """Whether it is what was asked; None where nothing was."""
        if self.bar is None:
            return None
        return self.bar.is_met(self.ratio if self.bar.of == "ratio" else self.polarismail)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "ratio": self.ratio, "met": self.met}


@define
class Bench:
    """One run. Ports: `port` and the two dozen after it."""

    directory: Path
    port: int = 2600
    rounds: int = 5
    count: int | None = None  # messages a round, instead of each row's own
    scale: float = 1.0  # of each row's own counts
    workers: int | None = None
    backlog: int = 200_000  # recipients that wait, in the row of that name

    def messages(self, count: int) -> int:
        """How many a round has, where a row would have `count`."""
        return self.count or max(20, int(count * self.scale))

    def place(self, row: str, name: str) -> Path:
        """A directory of its own for a server of a row. Nothing in it is deleted before the run ends: ext4 looks at each
        inode that was freed within the last seconds before it makes a new file, so that whoever comes next would pay."""
        path = self.directory / row / name
        path.mkdir(parents=True)
        os.chmod(path.parent, 0o755)
        os.chmod(path, 0o755)
        return path

    def certificate(self) -> Certificate:
        """One for both servers."""
        chain, key = self.directory / "chain.pem", self.directory / "key.pem"
        if not chain.exists():
            make_self_signed("lab.test", str(chain), str(key), ca_path=str(self.directory / "ca.pem"))
            os.chmod(key, 0o600)
        return Certificate(chain, key)

    def say(self, text: str) -> None:
        """Progress, for whoever watches."""
        print(f"  {text}", file=sys.stderr, flush=True)


def ask_status(peer: Polarismail) -> dict[str, Any]:
    """What the server says about itself. Raises CalledProcessError."""
    done = subprocess.run(
        [peer.python, "-m", "polarismail.cli.main", "status", "--config", str(peer.config), "--json"],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def gauges_of(peer: Polarismail) -> dict[str, Any]:
    """Lag and commit wait since the server's start: the worst over its workers, and each worker's share of the messages."""
    status = ask_status(peer)
    processes = [found for found in status.get("workers", []) if "commits" in found] or [status]
    commits = [found["commits"] for found in processes if found.get("commits")]
    taken = [found["jobs"].get("accept", 0) for found in commits]
    return {
        "lag_seconds": max(found["lag"]["longest_seconds"] for found in processes),
        "stalls": sum(found["lag"]["stalls"] for found in processes),
        "lock_wait_p99_seconds": max(found["lock_wait_seconds"]["p99"] for found in commits),
        "lock_wait_max_seconds": max(found["lock_wait_seconds"]["max"] for found in commits),
        "answer_p99_seconds": max(found["answer_seconds"]["p99"] for found in commits),
        "answer_max_seconds": max(found["answer_seconds"]["max"] for found in commits),
        "group_jobs_p50": max(found["group_jobs"]["p50"] for found in commits),
        "worker_messages": taken,
    }
