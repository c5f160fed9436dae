# SPDX-License-Identifier: MIT
"""What a 250 promises: kept through twenty kills under load; and memory that does not follow the size of messages."""

from __future__ import annotations

import contextlib
import random
import smtplib
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.e2e.server import Helper, Server, wait_until

KILLS = 20
MIB = 1 << 20


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
        code, _ = client.data(f"Subject: {subject}\r\n\r\n{'x' * 70}\r\n" + ("y" * 70 + "\r\n") * (size // 72))
        if code == 250:
            self.acknowledged.add(subject)
            self.doubtful.discard(subject)


def test_twenty_kills_under_load_lose_nothing(
    make_server: Callable[..., Server], make_helper: Callable[..., Helper]
) -> None:
    """DURABILITY: each acknowledged (message, recipient) arrives; twice only where the outcome was not yet durable."""
    random.seed(20261122)
    sink = make_helper("sink")
    dns = make_helper("dns", {"there.test": {"MX": [[10, "mx.there.test"]]}, "mx.there.test": {"A": ["127.0.0.1"]}})
    server = make_server(dns_port=dns.port, remote_port=sink.port).start()
    senders = [Sender(server, number, ["bob@here.test", "zoe@there.test"]) for number in range(4)]
    for sender in senders:
        sender.start()
    for _ in range(KILLS):
        time.sleep(random.uniform(0.2, 0.7))
        server.kill()
        server.start()
    time.sleep(0.5)
    for sender in senders:
        sender.enough.set()
    for sender in senders:
        sender.join(30)
    acknowledged = set().union(*(sender.acknowledged for sender in senders))
    doubtful = set().union(*(sender.doubtful for sender in senders))
    assert len(acknowledged) >= KILLS, "hardly anything was sent between the kills"
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
    assert len(repeated_remote) <= KILLS * len(senders) * 5


def resident_octets(pid: int) -> int:
    """Memory of the process that is not shared with others, at its peak so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def test_ten_messages_of_50_mb_at_once_raise_memory_by_less_than_32_mb(make_server: Callable[..., Server]) -> None:
    server = make_server(extra="[smtp]\nmax_message_octets = 62914560\n").start()
    # One message warms up what every process pays once: threads, caches, compiled statements.
    with server.smtp("mx") as client:
        client.sendmail("who@else.test", ["bob@here.test"], "Subject: warm\r\n\r\n" + ("z" * 70 + "\r\n") * 20000)
    server.wait_for_messages("bob@here.test", 1)
    before = resident_octets(server.pid)
    line = b"x" * 70 + b"\r\n"
    block = line * (MIB // len(line))
    blocks = 50 * MIB // len(block)
    codes: list[int] = []

    def send(number: int) -> None:
        with server.smtp("mx") as client:
            client.mail("who@else.test")
            client.rcpt("bob@here.test")
            assert client.docmd("DATA")[0] == 354
            assert client.sock is not None
            client.sock.sendall(f"Subject: big {number}\r\n\r\n".encode())
            for _ in range(blocks):
                client.sock.sendall(block)
            client.sock.sendall(b".\r\n")
            client.sock.settimeout(120)
            codes.append(client.getreply()[0])

    threads = [threading.Thread(target=send, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert codes == [250] * 10
    wait_until(lambda: not server.json("queue", "list"), "ten deliveries", 90)
    raised = resident_octets(server.pid) - before
    subjects = maildir_subjects(server, "bob@here.test")
    assert sum(count for subject, count in subjects.items() if subject.startswith("big ")) == 10
    print(f"memory rose by {raised / MIB:.1f} MiB")
    assert raised < 32 * MIB
