# SPDX-License-Identifier: MIT
"""The rows of a full queue: starting with many recipients that wait for their next attempt, and taking new mail beside them.

One recipient in a hundred is due when the server starts, and goes to smtp-sink before anything else is measured. The rate of
new mail is compared with that of a second server of the same kind whose queue is empty, in turn.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import Any

from attrs import define, frozen

from benchmarks.backlog_filling import fill_postfix
from benchmarks.bench import Bar, Bench, Line, gauges_of
from benchmarks.load import Mailboxes, RoundFailed, Sink, send
from benchmarks.peers import ROOT, Polarismail, Postfix
from benchmarks.throughput import Peer, run_rounds, summarize
from benchmarks.usage import pss_octets

_DUE_PART = 100


@define
class _Started:
    """What a start was like."""

    seconds: float  # from the start of the program until a message was accepted
    megabytes: float  # once what was due is gone


@frozen
class Backlog:
    """`count`: messages a round of new mail."""

    name: str
    work: str
    count: int

    def run(self, bench: Bench) -> list[Line]:
        """Fill, start, measure, stop. Raises RoundFailed, PeerFailed."""
        sink = Sink(bench.port + 20, bench.place(self.name, "sink") / "counted")
        full, empty = self._ours(bench, "polarismail", 0), self._ours(bench, "polarismail-empty", 4)
        postfix, postfix_empty = self._postfix(bench, "postfix", 10), self._postfix(bench, "postfix-empty", 14)
        due = bench.backlog // _DUE_PART
        bench.say(f"{self.name}: filling both with {bench.backlog:,} recipients")
        self._fill_ours(full, bench.backlog, due)
        self._fill_postfix(postfix, bench.backlog, due)
        started: list[Any] = []
        starts: dict[str, _Started] = {}
        peers: list[Peer] = [full, empty, postfix, postfix_empty]
        try:
            sink.start()
            started.append(sink)
            for peer in peers:
                started.append(peer)
                starts[peer.name] = self._start(peer, sink, due if peer in (full, postfix) else 0)
                found = starts[peer.name]
                bench.say(
                    f"{self.name}: {peer.name:17} took mail after {found.seconds:.1f} s, {found.megabytes:.0f} MB"
                )
            samples = run_rounds(bench, self.name, peers, bench.messages(self.count), self._work)
            gauges = gauges_of(full)
        finally:
            for one in reversed(started):
                one.stop()
        rates = {name: statistics.median(one.rate for one in rounds) for name, rounds in samples.items()}
        details = {**summarize(samples), "gauges": gauges, "backlog": bench.backlog, "due": due}
        return self._lines(bench, starts, rates, details)

    def _lines(
        self, bench: Bench, starts: dict[str, _Started], rates: dict[str, float], details: dict[str, Any]
    ) -> list[Line]:
        ours, none, theirs, theirs_none = (
            starts[name] for name in ("polarismail", "polarismail-empty", "postfix", "postfix-empty")
        )
        our_part, their_part = (rates[name] / rates[f"{name}-empty"] for name in ("polarismail", "postfix"))
        waiting = f"{bench.backlog:,} recipients wait"
        memory = f"with an empty queue {none.megabytes:.0f} and {theirs_none.megabytes:.0f} MB"
        rate = ", ".join(f"{name} {value:,.0f}/s" for name, value in rates.items())
        return [
            Line(
                self.name,
                f"{waiting}: from start to mail taken",
                "seconds",
                ours.seconds,
                theirs.seconds,
                Bar(10, "at 1M", "figure", "below"),
                f"with an empty queue {none.seconds:.1f} and {theirs_none.seconds:.1f} s",
            ),
            Line(self.name, f"{waiting}: memory", "MB", ours.megabytes, theirs.megabytes, None, memory),
            Line(
                self.name,
                f"{waiting}: rate of new mail / empty queue",
                "part",
                our_part,
                their_part,
                Bar(0.9, "at 1M", "figure"),
                rate,
                details,
            ),
        ]

    def _ours(self, bench: Bench, name: str, offset: int) -> Polarismail:
        return Polarismail(
            bench.place(self.name, name),
            port=bench.port + offset,
            name=name,
            workers=bench.workers,
            smtp_port=bench.port + 20,
        )

    def _postfix(self, bench: Bench, name: str, offset: int) -> Postfix:
        return Postfix(bench.place(self.name, name), port=bench.port + offset, name=name, smtp_port=bench.port + 20)

    def _fill_ours(self, peer: Polarismail, recipients: int, due: int) -> None:
        peer.prepare()
        command = [sys.executable, "-m", "benchmarks.backlog_filling", str(peer.config), str(recipients), str(due)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise RoundFailed(f"the queue was not filled: {done.stderr[-1000:]}")

    def _fill_postfix(self, peer: Postfix, recipients: int, due: int) -> None:
        # Nobody listens at the next hop yet: the one message is deferred, and becomes the pattern of all.
        peer.start()
        send(peer.port, 1, recipient="user@domain0.test", octets=1024)
        for _ in range(300):
            if any(files for _, _, files in os.walk(peer.directory / "queue" / "deferred")):
                break
            time.sleep(0.1)
        peer.stop()
        fill_postfix(peer.directory / "queue", recipients, due)

    def _start(self, peer: Peer, sink: Sink, due: int) -> _Started:
        os.sync()
        sink.expect()
        mailboxes = Mailboxes([peer.new])
        began = time.time()
        peer.start()
        _, accepted = send(peer.port, 1)
        mailboxes.wait(1)
        if due:
            sink.wait(due)
        time.sleep(2.0)
        return _Started(accepted - began, pss_octets(peer.roots) / 1e6)

    def _work(self, peer: Peer, count: int) -> tuple[float, float, float]:
        mailboxes = Mailboxes([peer.new])
        began, accepted = send(peer.port, count)
        return began, accepted, mailboxes.wait(count)
