# SPDX-License-Identifier: MIT
"""The rows of submission: a connection, a full TLS handshake and a login for each message, over implicit TLS (RFC 8314).

The same certificate, the same argon2id hashes (19 MiB, two passes), the same accounts. Ours verifies and remembers logins
itself; Postfix asks Dovecot.
"""

from __future__ import annotations

from typing import Any

from attrs import frozen

from benchmarks.bench import Bar, Bench, Line, gauges_of
from benchmarks.dovecot import Dovecot
from benchmarks.load import Mailboxes
from benchmarks.peers import DOMAIN, PASSWORD, RECIPIENT, Polarismail, Postfix
from benchmarks.submit import measure_alone, submit
from benchmarks.throughput import Peer, median_rate, run_rounds, summarize
from polarismail.auth.passwords import PasswordSettings, hash_password

_USERS = tuple(f"user{number}" for number in range(20))
_NO_LIMIT = "[transport]\nhandshakes_per_minute = 0\n"
_NO_MEMORY = "[auth.logins]\nidle_seconds = 0.0\nlifetime_seconds = 0.0\n"


@frozen
class SubmissionRow:
    """With login caches (`cache`) or without, on both sides."""

    name: str
    work: str
    bar: Bar
    count: int
    cache: bool
    sessions: int = 20

    def run(self, bench: Bench) -> list[Line]:
        """Start both servers, measure, stop them. Raises RoundFailed, PeerFailed."""
        hashed = hash_password(PASSWORD, PasswordSettings())
        users = {f"{name}@{DOMAIN}": hashed for name in _USERS}
        ours = Polarismail(
            bench.place(self.name, "polarismail"),
            port=bench.port,
            workers=bench.workers,
            boxes=("box", *_USERS),
            certificate=bench.certificate(),
            extra=_NO_LIMIT + ("" if self.cache else _NO_MEMORY),
        )
        postfix = Postfix(
            bench.place(self.name, "postfix"),
            port=bench.port + 10,
            boxes=("box", *_USERS),
            certificate=bench.certificate(),
            logins=Dovecot(bench.place(self.name, "dovecot"), users, cache=self.cache),
        )
        rate, cpu = measure_alone(max(200, bench.messages(1000)), self.sessions)
        bench.say(f"{self.name}: the generator alone: {rate:.0f}/s, {cpu * 1e6:.0f} us CPU each")
        count = bench.messages(self.count)
        peers: list[Peer] = [ours, postfix]
        started: list[Any] = []
        try:
            for peer in peers:
                peer.start()
                started.append(peer)
            # Each worker has a memory of its own, and is to have seen every user.
            warm_up = 5 * len(users) if self.cache else 20
            samples = run_rounds(
                bench, self.name, peers, count, lambda peer, n: self._work(peer, n, list(users)), warm_up
            )
            details = {**summarize(samples), "gauges": gauges_of(ours), "messages": count}
        finally:
            for peer in reversed(started):
                peer.stop()
        details["generator"] = {"alone_rate": round(rate, 1), "cpu_microseconds": round(cpu * 1e6)}
        note = f"the generator alone, against canned replies: {rate:.0f}/s, {cpu * 1e6:.0f} us CPU each"
        our_rate, their_rate = (median_rate(samples[peer.name]) for peer in peers)
        return [Line(self.name, self.work, "messages/s", our_rate, their_rate, self.bar, note, details)]

    def _work(self, peer: Peer, count: int, users: list[str]) -> tuple[float, float, float]:
        mailboxes = Mailboxes([peer.new])
        began, accepted, _ = submit(
            peer.port + 1, count, sessions=self.sessions, users=users, password=PASSWORD, recipient=RECIPIENT
        )
        return began, accepted, mailboxes.wait(count)
