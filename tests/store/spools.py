# SPDX-License-Identifier: MIT
"""Spools for tests: one place (a database and a directory) that any number of "processes" open, leave, or crash in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twisted.internet.defer import gatherResults

from polarismail.store.database import Database
from polarismail.store.interfaces import Committed, Front, Outcome, QueuedRecipient, Submission
from polarismail.store.spool import Spool, SpoolSettings
from polarismail.values.address import Mailbox
from polarismail.values.envelope import LOCAL, DsnRequest, Envelope, Recipient, RecipientState, SessionFacts
from polarismail.values.errors import Unavailable
from tests.databases import database_url
from tests.reactor import reactor, run

SENDER = Mailbox("sender", "example.org")
TRACE = b"Received: from here by there; Thu, 1 Jan 2026 00:00:00 +0000\r\n"
FACTS = SessionFacts("mx", "ESMTPS", "192.0.2.1", 4242, "mail.example.org")
LEASE_SECONDS = 1.2


def to(*addresses: str, local: bool = True) -> tuple[Recipient, ...]:
    """Recipients, with account numbers from 1."""
    boxes = [Mailbox.parse(address) for address in addresses]
    return tuple(
        Recipient(box, box, LOCAL if local else box.domain, at if local else None, DsnRequest("FAILURE", None))
        for at, box in enumerate(boxes, 1)
    )


def envelope(*addresses: str, local: bool = True) -> Envelope:
    return Envelope(SENDER, to(*(addresses or ("user@example.com",)), local=local), body="8BITMIME")


def done(recipient: QueuedRecipient, state: RecipientState = RecipientState.DELIVERED) -> Outcome:
    return Outcome(recipient, state, "250 2.0.0 OK", remote="local")


def later(recipient: QueuedRecipient, when: float) -> Outcome:
    return Outcome(recipient, RecipientState.QUEUED, "451 4.7.1 Later", when, "mx[192.0.2.9]:25")


class Process:
    """One process's database and spool; every call blocks until it is answered."""

    def __init__(self, url: str, directory: Path, settings: SpoolSettings | None = None, **options: Any) -> None:
        self.clock = 1_800_000_000.0
        self.directory = directory
        self.database = Database(url, reactor=reactor, lease_seconds=LEASE_SECONDS, **options)
        run(self.database.start)
        self.spool = Spool(self.database, str(directory), reactor, settings, now=lambda: self.clock)
        run(self.spool.start)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.spool, name)
        return lambda *args, **kwargs: run(method, *args, **kwargs)

    def write(self, *pieces: bytes, front: Front | None = None) -> Any:
        """A draft with this content, written with back-pressure."""

        async def write() -> Any:
            draft = self.spool.draft(front)
            try:
                for piece in pieces:
                    waits = draft.write(piece)
                    if waits is not None:
                        await waits
            except Unavailable:
                draft.abandon()
                raise
            return draft

        return run(write)

    def accept(self, content: bytes = b"Subject: x\r\n\r\nx\r\n", *addresses: str, **extra: Any) -> Committed:
        local = extra.pop("local", True)
        pieces = [content[at : at + 50_000] for at in range(0, len(content), 50_000)]
        committed = self.commit(
            Submission(self.write(*pieces), envelope(*addresses, local=local), FACTS, TRACE, **extra)
        )
        assert isinstance(committed, Committed)
        return committed

    def read_all(self, message: Any, octets: int = 100_000) -> bytes:
        found = b""
        while piece := self.read(message, len(found), octets):
            found += piece
        return found

    def together(self, *calls: Callable[[], Any]) -> list[Any]:
        """Make these calls so that one group holds them all; returns (worked, value or error) of each."""
        gate = threading.Event()

        async def submit() -> Any:
            first = self.database.write(lambda connection: gate.wait(20)).addErrback(lambda failure: None)
            waiting = [call() for call in calls]
            results = gatherResults([one.addBoth(_as_result) for one in waiting])
            gate.set()
            await first
            return await results

        return run(submit)

    def files(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir())

    def stop(self) -> None:
        run(self.spool.stop)
        run(self.database.stop)

    def crash(self) -> None:
        """End without a word: what it owned is still marked as its own, and its drafts stay where they are."""
        self.database._joins = False
        self.stop()


def _as_result(value: Any) -> tuple[bool, Any]:
    failed = hasattr(value, "getErrorMessage")
    return not failed, value.value if failed else value


class Place:
    """Where processes meet."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind, self.directory = kind, directory
        self.url = database_url(kind, directory, "main")
        self._open: list[Process] = []

    def open(self, settings: SpoolSettings | None = None, **options: Any) -> Process:
        process = Process(self.url, self.directory / "content", settings, **options)
        self._open.append(process)
        return process

    def stop(self) -> None:
        for process in self._open:
            process.stop()


@contextmanager
def open_place(kind: str, directory: Path) -> Iterator[Place]:
    place = Place(kind, directory)
    try:
        yield place
    finally:
        place.stop()
