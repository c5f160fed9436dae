# SPDX-License-Identifier: MIT
"""CPU of accepting and removing small messages, by size of group: the committer's thread, and the reactor's.

python -m benchmarks.spool [URL]          (without one: SQLite in a temporary directory)
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import react

from polarismail.store.committer import Committer, Job
from polarismail.store.database import Database
from polarismail.store.interfaces import Outcome, Submission
from polarismail.store.spool import Spool
from polarismail.values.address import Mailbox
from polarismail.values.envelope import LOCAL, Envelope, Recipient, RecipientState, SessionFacts

CONTENT = b"Subject: x\r\n\r\n" + (b"a" * 76 + b"\r\n") * 51  # 4 KB
TRACE = b"Received: from mail.example.org (mail.example.org [192.0.2.1]) by mx.example.com\r\n" * 3
USER = Mailbox("user", "example.com")
ENVELOPE = Envelope(Mailbox("sender", "example.org"), (Recipient(USER, USER, LOCAL, 3),), body="8BITMIME")
FACTS = SessionFacts("mx", "ESMTPS", "192.0.2.1", 4242, "mail.example.org")


class TimedCommitter(Committer):
    """Counts the CPU that its groups take."""

    spent = 0.0
    groups = 0

    def _commit(self, group: Sequence[Job], *, again: bool = False) -> None:
        begun = time.thread_time()
        super()._commit(group, again=again)
        TimedCommitter.spent += time.thread_time() - begun
        TimedCommitter.groups += 1


async def measure(spool: Spool, size: int, groups: int) -> None:
    """Print the medians over so many groups."""
    samples: dict[str, list[float]] = {"accept": [], "accept, reactor": [], "record": [], "record, reactor": []}

    def submit() -> Deferred[Any]:
        draft = spool.draft()
        draft.write(CONTENT)
        return spool.commit(Submission(draft, ENVELOPE, FACTS, TRACE))

    async def timed(name: str, calls: Sequence[Any]) -> list[Any]:
        TimedCommitter.spent, begun = 0.0, time.thread_time()
        results = await gatherResults([call() for call in calls])
        samples[f"{name}, reactor"].append((time.thread_time() - begun) / size * 1e6)
        samples[name].append(TimedCommitter.spent / size * 1e6)
        return list(results)

    for _ in range(groups):
        accepted = await timed("accept", [submit] * size)
        outcomes = [
            Outcome(one.recipients[0], RecipientState.DELIVERED, "250 2.0.0 OK", remote="local") for one in accepted
        ]
        await timed("record", [lambda outcome=outcome: spool.record([outcome]) for outcome in outcomes])
    figures = "   ".join(f"{name} {statistics.median(values):6.1f}" for name, values in samples.items())
    print(f"group of {size:4}: {figures}   us per message")


async def run(reactor: Any, directory: str, url: str) -> None:
    """Measure on a fresh database."""
    database = Database(url, reactor=reactor)
    await database.start()
    assert database._committer is not None
    database._committer.__class__ = TimedCommitter
    spool = Spool(database, f"{directory}/content", reactor)
    await spool.start()
    for size, groups in ((100, 200), (20, 400), (1, 400), (100, 200)):
        await measure(spool, size, groups)
    await spool.stop()
    await database.stop()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        url = sys.argv[1] if len(sys.argv) > 1 else f"sqlite:///{directory}/main.db"
        react(lambda reactor: Deferred.fromCoroutine(run(reactor, directory, url)))
