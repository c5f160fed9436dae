# SPDX-License-Identifier: MIT
"""What the load can do by itself: no server can show more than smtp-source against smtp-sink on the same cores."""

from __future__ import annotations

import statistics

from attrs import frozen

from benchmarks.bench import Bench, Line
from benchmarks.load import Sink, send


@frozen
class Limit:
    """Sessions kept open, and a connection for each message."""

    name: str
    work: str
    count: int

    def run(self, bench: Bench) -> list[Line]:
        """Measure. Raises RoundFailed, PeerFailed."""
        sink = Sink(bench.port + 20, bench.place(self.name, "sink") / "counted")
        count = bench.messages(self.count)
        rates: dict[str, list[float]] = {"kept": [], "new": []}
        try:
            sink.start()
            for _ in range(bench.rounds):
                for way, found in rates.items():
                    sink.expect()
                    began, accepted = send(sink.port, count, keep=way == "kept")
                    sink.wait(count)
                    found.append(count / (accepted - began))
        finally:
            sink.stop()
        kept, new = (statistics.median(found) for found in rates.values())
        bench.say(f"{self.name}: {kept:,.0f}/s kept, {new:,.0f}/s with new connections")
        note = f"{kept:,.0f}/s over sessions kept open, {new:,.0f}/s with a connection for each message"
        return [Line(self.name, self.work, "messages/s", None, None, None, note, {"kept": kept, "new": new})]
