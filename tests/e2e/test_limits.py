# SPDX-License-Identifier: MIT
"""Places, space and memory that run out under a real server, and what status and log say of it (HOSTILE E1, E4, E6)."""

from __future__ import annotations

import contextlib
import signal
import smtplib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server import Server, wait_until


def connect(server: Server, source: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.ports["mx"]), 10, source_address=(source, 0))


def workers_of(server: Server) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.json("status")["workers"]
    return found


def sessions(server: Server) -> int:
    return sum(each["connections"]["smtp"]["sessions"] for each in workers_of(server))


def deliver(server: Server) -> None:
    with server.smtp() as client:
        client.sendmail("stranger@there.test", ["ann@here.test"], b"Subject: x\r\n\r\ntext\r\n")


def test_slow_clients_that_hold_all_places_do_not_keep_an_honest_one_out(make_server: Callable[..., Server]) -> None:
    server = make_server(workers=2, extra="[connections]\ntotal = 20\n").start()
    wait_until(lambda: not sessions(server), "the look at the start to end")
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(server, f"127.0.{at}.1")) for at in range(20)]
        for each in slow:
            assert each.recv(3) == b"220"
            each.send(b"E")
        time.sleep(1.1)
        for _ in range(5):
            deliver(server)
        assert sum(each["connections"]["smtp"]["put_out"] for each in workers_of(server)) >= 1
        wait_until(lambda: server.events("stress-begins") and server.events("connections-refused"), "the log", 15)
    wait_until(lambda: len(server.events("stress-ends")) == len(server.events("stress-begins")), "the end of stress")
    server.wait_for_messages("ann@here.test", 5)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """Where the next server's spool will be: a file system of 16 MB and 400 inodes."""
    path = tmp_path / "server" / "state" / "spool"
    path.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,nr_inodes=400", "x", str(path)], capture_output=True)
    if done.returncode:
        pytest.skip("no tmpfs may be mounted")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_no_mail_is_begun_where_there_is_no_room_for_it(small: Path, make_server: Callable[..., Server]) -> None:
    extra = "[smtp]\nmax_message_octets = 4000000\n[space]\nlook_seconds = 0.1\n"
    server = make_server(extra=extra).start()
    deliver(server)

    def refuses() -> bool:
        with server.smtp() as client:
            client.ehlo("me.test")
            code, text = client.mail("a@b.test")
            assert (code, text[:5]) in ((250, b"2.1.0"), (452, b"4.3.1"))
            return code == 452

    (small / "filler").write_bytes(b"x" * 9_000_000)
    wait_until(refuses, "452 without octets")
    assert server.json("status")["space"]["spool"]["short"] is True
    (small / "filler").unlink()
    wait_until(lambda: not refuses(), "mail with octets")
    fillers = [small / f"filler-{at}" for at in range(392)]
    for each in fillers:
        each.touch()
    wait_until(refuses, "452 without inodes")
    for each in fillers:
        each.unlink()
    wait_until(lambda: not refuses(), "mail with inodes")
    deliver(server)
    server.wait_for_messages("ann@here.test", 2)
    assert [each["path"] for each in server.events("space-short")] == [str(small)] * 2
    assert len(server.events("space-enough")) == 2


def test_memory_that_runs_short_turns_newcomers_away_and_keeps_who_is_there(make_server: Callable[..., Server]) -> None:
    server = make_server().start()
    with server.smtp() as kept:
        kept.ehlo("me.test")
        server.write_config(extra="[memory]\nlimit_octets = 1000000\nlook_seconds = 0.1\n")
        server.signal(signal.SIGHUP)
        wait_until(lambda: server.events("memory-short"), "the log")
        with connect(server, "127.0.0.1") as raw:
            assert raw.makefile("rb").read().startswith(b"421 4.3.2 ")
        kept.sendmail("stranger@there.test", ["ann@here.test"], b"Subject: x\r\n\r\ntext\r\n")
        server.write_config(extra="")
        server.signal(signal.SIGHUP)
        wait_until(lambda: server.events("memory-enough"), "the log")
    deliver(server)
    server.wait_for_messages("ann@here.test", 2)


def test_strangers_that_guess_learn_nothing_more_on_any_worker(make_server: Callable[..., Server]) -> None:
    extra = (
        "[limits]\ntrusted_networks = []\nunknown_recipients_per_day = 4\n[session]\nsoft_error_delay_seconds = 0.0\n"
    )
    server = make_server(workers=2, extra=extra).start()
    workers_of(server)
    codes = []
    with contextlib.ExitStack() as stack:
        for at in range(6):
            client = stack.enter_context(server.smtp())
            client.ehlo("me.test")
            client.mail("a@b.test")
            codes.append(client.rcpt(f"guess{at}@here.test")[0])
        assert codes == [550] * 4 + [450] * 2
        assert client.rcpt("ann@here.test")[0] == 450
    with pytest.raises(smtplib.SMTPRecipientsRefused):
        deliver(server)
    with server.smtp("submission", "ann@here.test") as client:
        client.sendmail("ann@here.test", ["bob@here.test"], b"From: ann@here.test\r\n\r\ntext\r\n")
