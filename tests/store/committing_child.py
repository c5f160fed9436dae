# SPDX-License-Identifier: MIT
"""Commits and removes messages as fast as it can until it is killed; says on its output what has been acknowledged.

    python -m tests.store.committing_child URL DIRECTORY [stop]

With `stop` it ends, saying `unhealthy`, when the spool does not take mail any more.

Lines: `+QUEUE-ID SIZE` accepted, `~QUEUE-ID` about to be removed, `-QUEUE-ID` its recipients recorded. But for `~` a line is
written after the answer, so everything that was read from the pipe had been promised.
"""

from __future__ import annotations

import os
import sys

from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import react

from polarismail.store.database import Database
from polarismail.store.interfaces import Submission
from polarismail.store.nodes import LEASE_SECONDS
from polarismail.store.spool import Spool
from polarismail.values.errors import Unavailable
from tests.store.spools import FACTS, TRACE, done, envelope


def content(size: int) -> bytes:
    """What a message of this size holds."""
    return (b"%d\r\n" % size) * (size // 4 + 1)


async def run(url: str, directory: str, stops: bool) -> None:
    database = Database(url, reactor=reactor, lease_seconds=float(os.environ.get("LEASE_SECONDS", LEASE_SECONDS)))
    await database.start()
    spool = Spool(database, directory, reactor)
    await spool.start()

    def say(line: str) -> None:
        os.write(1, line.encode())  # one write of a short line: whole or not at all

    async def commit_on(at: int) -> None:
        # Who was asleep may have lost what it was about to commit: in doubt it says nothing, and goes on.
        while True:
            try:
                await commit(at)
            except Unavailable:
                assert spool.healthy

    async def commit(at: int) -> None:
        number = 0
        while True:
            number += 1
            # Every eighth is too large for its row.
            size = 70_000 + at * 1000 if number % 8 == 0 else 200 + at * 7 + number % 50
            draft = spool.draft()
            waits = draft.write(content(size))
            if waits is not None:
                await waits
            committed = await spool.commit(Submission(draft, envelope("a@example.com", "b@example.com"), FACTS, TRACE))
            say(f"+{committed.message.queue_id} {size}\n")
            if number % 3 == 0:
                say(f"~{committed.message.queue_id}\n")
                await spool.record([done(one) for one in committed.recipients])
                say(f"-{committed.message.queue_id}\n")

    async def until_unhealthy(at: int) -> None:
        try:
            await commit(at)
        except Unavailable:
            # A few commits later at the latest, the one whose sync failed has told the others.
            assert not spool.healthy, "refused, but healthy"

    if stops:
        await gatherResults([Deferred.fromCoroutine(until_unhealthy(at)) for at in range(20)])
        say("unhealthy\n")
        return
    work = commit_on if "LEASE_SECONDS" in os.environ else commit
    await gatherResults([Deferred.fromCoroutine(work(at)) for at in range(20)])


if __name__ == "__main__":
    react(lambda _: Deferred.fromCoroutine(run(sys.argv[1], sys.argv[2], len(sys.argv) > 3)))
