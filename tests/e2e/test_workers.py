# SPDX-License-Identifier: MIT
"""Several workers behind one set of sockets: shared, watched, replaced, and never two of them at one site."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.crash import IS_LONG
from tests.e2e.senders import Sender, check_that_nothing_is_lost, sent_by
from tests.e2e.server import Helper, Server, wait_until

MAIL = "From: ann@here.test\r\nSubject: through workers\r\n\r\nHi\r\n"
ZONE = {
    "there.test": {"MX": [[10, "mx.there.test"]]},
    "mx.there.test": {"A": ["127.0.0.1"]},
    "slow.test": {"MX": [[10, "mx.slow.test"]]},
    "mx.slow.test": {"A": ["127.0.0.1"]},
}
KILLS = 15 if IS_LONG else 8  # the pauses before another worker double, up to half a minute


def workers_of(server: Server, count: int = 2) -> list[dict[str, Any]]:
    """What each worker says of itself, once there are so many."""

    def all_of_them() -> list[dict[str, Any]] | None:
        with contextlib.suppress(AssertionError):
            found: list[dict[str, Any]] = server.json("status").get("workers", [])
            return found if len(found) == count else None
        return None

    return wait_until(all_of_them, f"{count} workers")


def living(server: Server) -> dict[int, int]:
    """The process of each worker that is ready, by the log: it costs less to read than a command."""
    found: dict[int, int] = {}
    for row in server.events():
        if row["event"] == "worker-ready":
            found[row["worker"]] = row["pid"]
        elif row["event"] == "worker-ended":
            found.pop(row["worker"], None)
    return found


def greet(server: Server, port: str = "mx") -> socket.socket:
    """A connection that has its greeting."""
    connection = socket.create_connection(("127.0.0.1", server.ports[port]), 10)
    assert connection.recv(4) == b"220 "
    return connection


def test_clients_are_shared_evenly(make_server: Callable[..., Server]) -> None:
    server = make_server(workers=2).start()
    assert {each["worker"] for each in workers_of(server)} == {0, 1}
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(greet(server))
        sessions = [each["sessions"] for each in workers_of(server)]
        assert sum(sessions) == 20
        assert min(sessions) >= 8, sessions
    wait_until(lambda: sum(each["sessions"] for each in workers_of(server)) == 0, "the sessions to end")


def test_limits_hold_over_all_workers(make_server: Callable[..., Server]) -> None:
    server = make_server(workers=2, extra="[connections]\ntotal = 5\nper_address = 3\n").start()
    workers_of(server)

    def answers(address: str, count: int) -> list[bytes]:
        found = []
        for _ in range(count):
            connection = stack.enter_context(
                socket.create_connection(("127.0.0.1", server.ports["mx"]), 10, source_address=(address, 0))
            )
            found.append(connection.recv(3))
        return found

    with contextlib.ExitStack() as stack:
        wait_until(lambda: sum(each["sessions"] for each in workers_of(server)) == 0, "the first clients to leave")
        assert answers("127.0.0.2", 4) == [b"220"] * 3 + [b"421"]
        assert answers("127.0.0.3", 3) == [b"220"] * 2 + [b"421"]


def test_one_worker_alone_speaks_to_a_site(
    make_server: Callable[..., Server], make_helper: Callable[..., Helper]
) -> None:
    """Mail for one site comes in on both workers and goes out from one; the other hands it over."""
    sink = make_helper("sink")
    dns = make_helper("dns", dict(ZONE))
    server = make_server(
        workers=2, dns_port=dns.port, remote_port=sink.port, relay_extra="idle_seconds = 90.0\n"
    ).start()
    workers_of(server)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.smtp("submission", "ann@here.test")) for _ in range(6)]
        for at in range(60):
            clients[at % 6].sendmail("ann@here.test", ["zoe@there.test"], MAIL)
        wait_until(lambda: len(sink.received()) >= 60, "sixty messages at the sink")
        found = workers_of(server)
    assert len(sink.received()) == 60
    talking = [each["worker"] for each in found if each["relay"]["by_site"]]
    assert len(talking) == 1, found
    (owner,) = [each for each in found if each["worker"] == talking[0]]
    (other,) = [each for each in found if each["worker"] != talking[0]]
    assert other["handed_over"]["sent"] == owner["handed_over"]["received"] >= 10
    assert owner["handed_over"]["sent"] == other["handed_over"]["received"] == 0
    wait_until(lambda: not server.json("queue", "list"), "the queue to empty")


def test_operators_reach_mail_that_waits_in_any_worker(
    make_server: Callable[..., Server], make_helper: Callable[..., Helper]
) -> None:
    """Each command is answered by whichever worker accepts it; a site that is down keeps its mail waiting."""
    dns = make_helper("dns", dict(ZONE))
    server = make_server(workers=2, dns_port=dns.port, remote_port=1).start()
    workers_of(server)
    for _ in range(4):
        with server.smtp("submission", "ann@here.test") as client:
            client.sendmail("ann@here.test", ["zoe@there.test"], MAIL)
    wait_until(lambda: all(row["attempts"] for row in server.json("queue", "list")), "the first attempts")
    rows = server.json("queue", "list")
    assert len(rows) == 4
    server.command("queue", "hold", "--all")
    assert {row["state"] for row in server.json("queue", "list")} == {"held"}
    server.command("queue", "delete", "--all")
    assert server.json("queue", "list") == []


def test_a_changed_account_is_seen_by_every_worker_when_the_command_returns(make_server: Callable[..., Server]) -> None:
    server = make_server(workers=2).start()
    workers_of(server)
    for _ in range(4):
        assert server.messages("ann@here.test") == []  # the login is remembered on both, with luck
    server.command("account", "passwd", "ann@here.test", "--password-stdin", input="other words")
    for _ in range(6):
        assert server.messages("ann@here.test", "other words") == []


def test_a_worker_that_dies_is_replaced_and_its_mail_goes_on(
    make_server: Callable[..., Server], make_helper: Callable[..., Helper]
) -> None:
    """Nothing answers at the site at first; the worker that has its mail is killed; the other delivers once it may."""
    sink = make_helper("sink")
    dns = make_helper("dns", {**ZONE, "there.test": "TIMEOUT"})
    server = make_server(workers=2, dns_port=dns.port, remote_port=sink.port).start()
    before = workers_of(server)
    for _ in range(8):
        with server.smtp("submission", "ann@here.test") as client:
            client.sendmail("ann@here.test", ["zoe@there.test"], MAIL)
    dns.write(dict(ZONE))
    os.kill(before[0]["pid"], signal.SIGKILL)
    wait_until(
        lambda: {each["pid"] for each in workers_of(server)} != {each["pid"] for each in before}, "another worker"
    )
    server.command("queue", "retry", "--all")
    wait_until(lambda: len(sink.received()) >= 8, "eight messages at the sink", 60)
    wait_until(lambda: not server.json("queue", "list"), "the queue to empty")
    assert len(sink.received()) == 8
    (ended,) = server.events("worker-ended")
    assert ended["how"] == "was killed by signal 9"
    assert server.process is not None and server.process.poll() is None


def test_workers_killed_at_random_under_load_lose_nothing(
    make_server: Callable[..., Server], make_helper: Callable[..., Helper]
) -> None:
    random.seed(20261125)
    sink = make_helper("sink")
    dns = make_helper("dns", dict(ZONE))
    server = make_server(workers=2, dns_port=dns.port, remote_port=sink.port).start()
    workers_of(server)
    senders = [Sender(server, number, ["bob@here.test", "zoe@there.test"]) for number in range(4)]
    for sender in senders:
        sender.start()
    for _ in range(KILLS):
        time.sleep(random.uniform(0.1, 0.6))
        pids = wait_until(lambda: list(living(server).values()), "a worker to kill")
        with contextlib.suppress(ProcessLookupError):
            os.kill(random.choice(pids), signal.SIGKILL)
    time.sleep(0.5)
    acknowledged, doubtful = sent_by(senders)
    assert len(acknowledged) >= KILLS, "hardly anything was sent between the kills"
    workers_of(server)
    check_that_nothing_is_lost(server, sink, acknowledged, doubtful, most_repeats=KILLS * len(senders) * 5)
    assert len(server.events("worker-ended")) >= KILLS // 2, "the same worker was killed again and again"


def test_a_stop_lets_transactions_finish_and_says_421_to_the_rest(make_server: Callable[..., Server]) -> None:
    server = make_server(workers=2).start()
    workers_of(server)
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(greet(server)) for _ in range(4)]
        busy = [stack.enter_context(server.smtp("mx")) for _ in range(4)]
        for client in busy:
            client.mail("who@else.test")
            client.rcpt("bob@here.test")
            assert client.docmd("DATA")[0] == 354
        server.signal(signal.SIGTERM)
        for connection in idle:
            connection.settimeout(10)
            said = b""
            while b"\n421" not in said and (piece := connection.recv(1000)):
                said += piece
            assert b"421 4.3.2" in said, said
        for client in busy:
            client.send(MAIL.encode() + b".\r\n")
            assert client.getreply()[0] == 250
    assert server.process is not None and server.process.wait(45) == -signal.SIGTERM  # as twistd ends
    assert {each["event"] for each in server.events()[-4:]} >= {"stopped"}
    server.start()
    server.wait_for_messages("bob@here.test", 4)


def test_workers_go_with_their_supervisor(make_server: Callable[..., Server]) -> None:
    server = make_server(workers=2).start()
    pids = [each["pid"] for each in workers_of(server)]
    os.kill(server.pid, signal.SIGKILL)
    assert server.process is not None
    server.process.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "the workers to stop")


def test_a_start_waits_for_what_a_killed_server_still_holds(make_server: Callable[..., Server]) -> None:
    """Its workers live a moment longer than their supervisor, and so do its ports and its control socket."""
    server = make_server(workers=2).start()
    workers_of(server)
    with server.smtp("mx") as client:
        client.mail("who@else.test")
        client.rcpt("bob@here.test")
        os.kill(server.pid, signal.SIGKILL)
        assert server.process is not None
        server.process.wait()
        server.start()
    workers_of(server)


def test_what_keeps_a_worker_from_starting_ends_the_start(make_server: Callable[..., Server]) -> None:
    server = make_server(workers=2)
    server.make_accounts()
    database = server.directory / "state" / "polarismail.db"
    database.write_bytes(b"this is no database" * 1000)
    server.spawn()
    assert server.process is not None and server.process.wait(60) == 1
    assert "cannot start" in server.twistd_log()
