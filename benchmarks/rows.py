# SPDX-License-Identifier: MIT
"""The rows of the table, in its order, with what is asked of each."""

from __future__ import annotations

from typing import Protocol

from benchmarks.backlog import Backlog
from benchmarks.bench import Bar, Bench, Line
from benchmarks.connections import Connections
from benchmarks.limit import Limit
from benchmarks.submission import SubmissionRow
from benchmarks.throughput import Throughput


class Row(Protocol):
    """One piece of work, which gives one line of the table or several."""

    @property
    def name(self) -> str:
        """What `--rows` calls it."""

    @property
    def work(self) -> str:
        """What is done."""

    def run(self, bench: Bench) -> list[Line]:
        """Measure. Raises RoundFailed, PeerFailed."""


_ROWS: tuple[Row, ...] = (
    Limit("limit", "the load itself: smtp-source against smtp-sink", 20000),
    Throughput("kept", "receive, deliver: 4 KB, 20 sessions kept open", Bar(3.5, 6), 8000),
    Throughput("new", "the same, a new connection for each message", Bar(2, 4), 6000, keep=False),
    Throughput("100k", "the same as the first, 100 KB", Bar(1.5, 2), 2000, octets=100 * 1024),
    Throughput("1m", "the same, 1 MB", Bar(1.2, 2), 300, octets=1024 * 1024),
    Throughput("recipients", "4 KB to 50 mailboxes each", Bar(2, 4), 600, recipients=50),
    Throughput("relay", "receive, relay to smtp-sink: 4 KB", Bar(2, 4), 6000, relay=True),
    SubmissionRow("submit", "submission: TLS and AUTH for each message, login caches on", Bar(1, 2), 500, cache=True),
    SubmissionRow("submit-uncached", "the same, no login caches", Bar(1, 2), 300, cache=False),
    Backlog("backlog", "many recipients wait for their next attempt", 6000),
    Connections("idle", "memory for each idle connection", Bar(10, 5, "figure", "below"), 1000, 200),
    Connections("idle-tls", "the same, in TLS", Bar(45, 30, "figure", "below"), 1000, 200, tls=True),
)
ROWS: dict[str, Row] = {row.name: row for row in _ROWS}
