# SPDX-License-Identifier: MIT
"""Fills a queue as if its mail had been deferred, through each server's own means: ours through its spool's accept and
record, Postfix's by copies of a queue file that it wrote itself, under names that fit their inodes.

usage: python -m benchmarks.backlog_filling CONFIG RECIPIENTS DUE      (ours; the server must not run)
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import react

from polarismail.config import load
from polarismail.store.database import Database
from polarismail.store.interfaces import Committed, Outcome, Submission
from polarismail.store.spool import Spool
from polarismail.values.address import Mailbox
from polarismail.values.envelope import Envelope, Recipient, RecipientState, SessionFacts

_CONTENT = b"Subject: waiting\r\n\r\n" + (b"x" * 76 + b"\r\n") * 12  # 1 KB
_TRACE = b"Received: from client.test ([192.0.2.1]) by pm.lab.test with ESMTP; Wed, 25 Nov 2026 12:00:00 +0000\r\n"
_REPLY = "451 4.4.1 No connection"
_AT_ONCE = 500
# Nobody waits longer than four hours: a due time beyond that is taken for a fault of the clock, and is due at once.
_SOONEST_SECONDS, _LATEST_SECONDS = 7200.0, 14000.0
DOMAINS = 2000


def next_attempt(at: int, due: int, now: float, chance: random.Random) -> float:
    """When recipient `at` is tried again: the first `due` are due, the others not while anybody measures."""
    return now - 1.0 if at < due else now + chance.uniform(_SOONEST_SECONDS, _LATEST_SECONDS)


async def fill(reactor: Any, config_path: str, recipients: int, due: int) -> None:
    """So many messages of one recipient each, over DOMAINS domains, each attempted once; `due` of them are due now."""
    config = load(config_path)
    chance = random.Random(1)
    database = Database(config.database_url, reactor=reactor, lock_path=config.lock_path)
    await database.start()
    spool = Spool(database, config.paths.spool, reactor, config.spool)
    await spool.start()
    facts = SessionFacts("mx", "ESMTP", "192.0.2.1", 4242, "client.test")
    for start in range(0, recipients, _AT_ONCE):
        commits = []
        for at in range(start, min(start + _AT_ONCE, recipients)):
            box = Mailbox(f"user{at}", f"domain{at % DOMAINS}.test")
            envelope = Envelope(Mailbox("a", "remote.test"), (Recipient(box, box, box.domain),))
            draft = spool.draft()
            draft.write(_CONTENT)
            commits.append(spool.commit(Submission(draft, envelope, facts, _TRACE)))
        accepted = [one for one in await gatherResults(commits) if isinstance(one, Committed)]
        now = time.time()
        outcomes = [
            Outcome(one.recipients[0], RecipientState.QUEUED, _REPLY, next_attempt(start + at, due, now, chance))
            for at, one in enumerate(accepted)
        ]
        await spool.record(outcomes)
    await spool.stop()
    await database.stop()


def fill_postfix(queue: Path, recipients: int, due: int) -> None:
    """Copies of the one file in Postfix's deferred queue, until there are so many. Postfix must be stopped.

    A short queue ID is microseconds and the inode, both in hexadecimal; `postsuper`, which Postfix runs when it starts,
    would rename what does not fit.
    """
    chance = random.Random(1)
    (sample,) = (path for path in (queue / "deferred").rglob("*") if path.is_file())
    octets, owner = sample.read_bytes(), sample.stat()
    os.utime(sample, (time.time() + _LATEST_SECONDS,) * 2)
    draft = queue / "deferred" / "draft"
    now = time.time()
    for at in range(recipients - 1):
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o700)
        os.write(descriptor, octets)
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
        moment = next_attempt(at, due, now, chance)
        os.utime(descriptor, (moment, moment))
        name = f"{chance.randrange(1 << 20):05X}{os.fstat(descriptor).st_ino:X}"
        os.close(descriptor)
        directory = queue / "deferred" / name[0]
        if not directory.exists():
            directory.mkdir(mode=0o700)
            shutil.chown(directory, owner.st_uid, owner.st_gid)
        os.rename(draft, directory / name)


if __name__ == "__main__":
    react(lambda reactor: Deferred.fromCoroutine(fill(reactor, sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
