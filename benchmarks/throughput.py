# SPDX-License-Identifier: MIT
"""Rows of the table that are messages a second: both servers in turn, several rounds, medians.

The figure of a round is what was sent divided by the time until all of it is where it belongs: files in Maildirs, or at the
next hop. Whoever goes first changes from round to round. What a round left in memory is on disk before the next one begins.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from attrs import define, field, frozen

from benchmarks.bench import Bar, Bench, Line, gauges_of
from benchmarks.load import Mailboxes, Sink, send
from benchmarks.peers import DOMAIN, RECIPIENT, Polarismail, Postfix
from benchmarks.usage import cpu_by_process, cpu_of_tree

Peer = Polarismail | Postfix


@define
class Sample:
    """One round of one server."""

    rate: float
    accepted_rate: float
    cpu_microseconds: float  # for each message, all processes
    shares: list[float] = field(factory=list)  # of the CPU, by process that lived throughout


def measure(peer: Peer, count: int, work: Callable[[], tuple[float, float, float]]) -> Sample:
    """One round: `work` sends `count` and returns when it began, when all was accepted, and when all was there."""
    os.sync()
    time.sleep(0.5)
    cpu, processes = cpu_of_tree(peer.roots), cpu_by_process(peer.roots)
    began, accepted, arrived = work()
    used = cpu_of_tree(peer.roots) - cpu
    after = cpu_by_process(peer.roots)
    each = [after[pid] - before for pid, before in processes.items() if pid in after]
    return Sample(
        count / (max(arrived, accepted) - began),
        count / (accepted - began),
        used / count * 1e6,
        [round(part / used, 3) for part in each] if used else [],
    )


def run_rounds(
    bench: Bench,
    row: str,
    peers: list[Peer],
    count: int,
    work: Callable[[Peer, int], tuple[float, float, float]],
    warm_up: int = 20,
) -> dict[str, list[Sample]]:
    """A warm-up of a quarter of a round, or of `warm_up` messages, then all rounds. Raises RoundFailed."""
    for peer in peers:
        bench.say(f"{row}: {peer.name}: warm-up")
        work(peer, max(warm_up, count // 4))
    samples: dict[str, list[Sample]] = {peer.name: [] for peer in peers}
    for at in range(bench.rounds):
        for peer in peers if at % 2 == 0 else reversed(peers):
            sample = measure(peer, count, lambda peer=peer: work(peer, count))  # type: ignore[misc]
            samples[peer.name].append(sample)
            bench.say(f"{row}: {peer.name:12} {sample.rate:7.0f}/s {sample.cpu_microseconds:7.0f} us CPU")
    return samples


def summarize(samples: dict[str, list[Sample]]) -> dict[str, Any]:
    """The details of a line."""
    found: dict[str, Any] = {}
    for name, rounds in samples.items():
        found[name] = {
            "rates": [round(one.rate, 1) for one in rounds],
            "accepted_rate": round(statistics.median(one.accepted_rate for one in rounds), 1),
            "cpu_microseconds": round(statistics.median(one.cpu_microseconds for one in rounds)),
        }
    found["polarismail"]["cpu_shares"] = samples["polarismail"][-1].shares
    return found


def median_rate(samples: list[Sample]) -> float:
    """Of the rounds."""
    return statistics.median(one.rate for one in samples)


@frozen
class Throughput:
    """Receive and deliver, or relay."""

    name: str
    work: str
    bar: Bar
    count: int
    octets: int = 4096
    keep: bool = True
    sessions: int = 20
    recipients: int = 1
    relay: bool = False

    def run(self, bench: Bench) -> list[Line]:
        """Start both servers, measure, stop them. Raises RoundFailed, PeerFailed."""
        sink = Sink(bench.port + 20, bench.place(self.name, "sink") / "counted") if self.relay else None
        peers = self._peers(bench)
        started: list[Any] = []
        try:
            if sink is not None:
                sink.start()
                started.append(sink)
            for peer in peers:
                peer.start()
                started.append(peer)
            count = bench.messages(self.count)
            samples = run_rounds(bench, self.name, peers, count, lambda peer, n: self._work(peer, n, sink))
            ours = peers[0]
            assert isinstance(ours, Polarismail)
            details = {**summarize(samples), "gauges": gauges_of(ours), "messages": count, "octets": self.octets}
        finally:
            for one in reversed(started):
                one.stop()
        rates = {name: median_rate(rounds) * self.recipients for name, rounds in samples.items()}
        unit = "recipients/s" if self.recipients > 1 else "messages/s"
        return [Line(self.name, self.work, unit, rates["polarismail"], rates["postfix"], self.bar, details=details)]

    def _peers(self, bench: Bench) -> list[Peer]:
        boxes = ("box", *(f"{number}box" for number in range(2, self.recipients + 1)))
        aliases = {"out": "out@sink.test"} if self.relay else {}
        sink = bench.port + 20
        return [
            Polarismail(
                bench.place(self.name, "polarismail"),
                port=bench.port,
                workers=bench.workers,
                boxes=boxes,
                aliases=aliases,
                smtp_port=sink if self.relay else None,
            ),
            Postfix(
                bench.place(self.name, "postfix"),
                port=bench.port + 10,
                boxes=boxes,
                aliases=aliases,
                smtp_port=sink,
            ),
        ]

    def _work(self, peer: Peer, count: int, sink: Sink | None) -> tuple[float, float, float]:
        mailboxes = Mailboxes(peer.new_directories)
        if sink is not None:
            sink.expect()
        began, accepted = send(
            peer.port,
            count,
            octets=self.octets,
            sessions=self.sessions,
            keep=self.keep,
            recipient=f"out@{DOMAIN}" if self.relay else RECIPIENT,
            recipients=self.recipients,
        )
        arrived = sink.wait(count) if sink is not None else mailboxes.wait(count * self.recipients)
        return began, accepted, arrived
