# SPDX-License-Identifier: MIT
"""What a 250 promises: kept through twenty kills under load; and memory that does not follow the size of messages."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.e2e.senders import Sender, check_that_nothing_is_lost, maildir_subjects, sent_by
from tests.e2e.server import Helper, Server, wait_until

KILLS = 20
MIB = 1 << 20


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
    acknowledged, doubtful = sent_by(senders)
    assert len(acknowledged) >= KILLS, "hardly anything was sent between the kills"
    check_that_nothing_is_lost(server, sink, acknowledged, doubtful, most_repeats=KILLS * len(senders) * 5)


def resident_octets(pid: int) -> int:
    """Memory of the process that is not shared with others, at its peak so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def test_ten_messages_of_50_mb_at_once_raise_memory_by_less_than_32_mb(make_server: Callable[..., Server]) -> None:
    server = make_server(extra="[smtp]\nmax_message_octets = 62914560\n")
    server.forks = False  # what it has from a parent would be counted, or not, as the kernel likes
    server.start()
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
