# SPDX-License-Identifier: MIT
"""Clients that go on sending whatever is killed under them, and the account of what became of their messages."""

from __future__ import annotations

import contextlib
import random
import smtplib
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.e2e.server import Helper, Server, wait_until


def maildir_subjects(server: Server, name: str) -> Counter[str]:
    """Subject of every delivered file of an account: read from disk, so that no mailbox access stands between."""
    row = next(each for each in server.json("account", "list") if each["address"] == name)
    maildir = Path(row["maildir"])
    if not maildir.is_absolute():
        maildir = server.directory / "mail" / maildir
    found: Counter[str] = Counter()
    for folder in ("new", "cur"):
        for entry in (maildir / folder).iterdir() if (maildir / folder).is_dir() else ():
            for line in entry.read_text(errors="replace").splitlines():
                if line.startswith("Subject: "):
                    found[line.removeprefix("Subject: ")] += 1
                    break
    return found


class Sender(threading.Thread):
    """Sends numbered messages until told to stop; remembers which got a 250 and which ended in doubt."""

    def __init__(self, server: Server, number: int, recipients: list[str]) -> None:
        super().__init__(daemon=True)
        self.server, self.number, self.recipients = server, number, recipients
        self.acknowledged: set[str] = set()
        self.doubtful: set[str] = set()
        self.enough = threading.Event()

    def run(self) -> None:
        count = 0
        while not self.enough.is_set():
            try:
                with self.server.smtp("submission", "ann@here.test") as client:
                    while not self.enough.is_set():
                        count += 1
                        self.send(client, f"{self.number}-{count}")
            except (OSError, smtplib.SMTPException):
                time.sleep(0.05)  # the server was killed; it comes back

    def send(self, client: smtplib.SMTP, subject: str) -> None:
        size = random.choice((100, 4000, 100_000))
        self.doubtful.add(subject)  # until we know better
        client.mail("ann@here.test")
        for recipient in self.recipients:
            code, text = client.rcpt(recipient)
            assert code == 250, text
        code, _ = client.data(
            f"From: ann@here.test\r\nSubject: {subject}\r\n\r\n{'x' * 70}\r\n" + ("y" * 70 + "\r\n") * (size // 72)
        )
        if code == 250:
            self.acknowledged.add(subject)
            self.doubtful.discard(subject)


def sent_by(senders: Sequence[Sender]) -> tuple[set[str], set[str]]:
    """Stop the senders; what got a 250, and what ended in doubt."""
    for sender in senders:
        sender.enough.set()
    for sender in senders:
        sender.join(30)
    acknowledged = set().union(*(sender.acknowledged for sender in senders))
    return acknowledged, set().union(*(sender.doubtful for sender in senders))


def check_that_nothing_is_lost(
    server: Server, sink: Helper, acknowledged: set[str], doubtful: set[str], *, most_repeats: int
) -> None:
    """DURABILITY: each acknowledged message for bob and for the sink has arrived at both; twice only where the outcome was
    not yet durable, and never in a maildir."""
    with contextlib.suppress(AssertionError):  # the assertions below say more than "the queue is not empty"
        wait_until(lambda: not server.json("queue", "list"), "the queue to empty", 90)
    local = maildir_subjects(server, "bob@here.test")
    remote = Counter(
        line.removeprefix("Subject: ")
        for message in sink.received()
        for line in message["content"].split("\r\n")[:20]
        if line.startswith("Subject: ")
    )
    assert acknowledged - set(local) == set(), "acknowledged, but not in the maildir"
    assert acknowledged - set(remote) == set(), "acknowledged, but not at the remote"
    assert (set(local) | set(remote)) <= acknowledged | doubtful
    repeated_local = {subject for subject, count in local.items() if count > 1}
    repeated_remote = {subject for subject, count in remote.items() if count > 1}
    print(f"{len(acknowledged)} acknowledged, {len(doubtful)} in doubt, delivered twice: {len(repeated_remote)} remote")
    assert not repeated_local, "local delivery is idempotent, whatever is killed (DURABILITY rule 5)"
    # Remote: a transaction whose final 250 was not recorded when the kill came; at most what one kill found under way.
    assert len(repeated_remote) <= most_repeats
