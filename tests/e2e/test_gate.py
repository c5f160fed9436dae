# SPDX-License-Identifier: MIT
"""The gate before a real server: listed, early, patient and known clients, over a reload and a restart."""

from __future__ import annotations

import signal
import smtplib
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.server import Helper, Server, wait_until

# A wait that no test has time for: who is served, was let in at once.
_LONG, _SHORT = 3600.0, 0.5


def gate(seconds: float) -> str:
    """The tests' own loopback address does not wait; others of loopback do."""
    return (
        f'[gate]\nwait_seconds = {seconds}\nallow_networks = ["127.0.0.1/32"]\n'
        '[[gate.lists]]\nname = "bl.test"\nweight = 2\n'
        '[[gate.lists]]\nname = "silent.test"\nweight = 5\n'
        '[[gate.allow_lists]]\nname = "wl.test"\nanswers = ["127.0.*.1..3"]\n'
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("gate")
    dns = Helper(
        directory,
        "dns",
        {
            "9.9.9.127.bl.test": {"A": ["127.0.0.2"]},
            "9.9.9.127.silent.test": "TIMEOUT",
            "8.8.8.127.wl.test": {"A": ["127.0.5.2"]},
        },
    )
    made = Server(directory / "server", dns_port=dns.port, extra=gate(_SHORT)).start()
    try:
        yield made
    finally:
        made.stop()
        dns.stop()


def connect(server: Server, address: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.ports["mx"]), 30, (address, 0))


def deliver(server: Server, address: str, subject: str) -> None:
    with smtplib.SMTP("127.0.0.1", server.ports["mx"], "client.test", 30, (address, 0)) as client:
        client.sendmail("joe@else.test", ["ann@here.test"], f"Subject: {subject}\r\n\r\nHello\r\n")


def counts(server: Server) -> dict[str, int]:
    """Of all workers."""
    total: dict[str, int] = {}
    for worker in server.json("status")["workers"]:
        for name, value in worker["gate"].items():
            total[name] = total.get(name, 0) + value
    return total


def reload(server: Server, seconds: float) -> None:
    before = len(server.events("reloaded"))
    server.write_config(extra=gate(seconds))
    server.signal(signal.SIGHUP)
    wait_until(lambda: len(server.events("reloaded")) > before, "no reload")


def test_who_is_listed_is_told_by_whom(server: Server) -> None:
    with connect(server, "127.9.9.9") as client, client.makefile("rb") as lines:
        assert lines.read() == b"554 5.7.1 Client 127.9.9.9 is listed by bl.test\r\n"
    (event,) = wait_until(lambda: server.events("gate-refused"), "no event")
    assert (event["client"], event["why"]) == ("127.9.9.9", "listed")


def test_who_talks_before_the_greeting_is_turned_away(server: Server) -> None:
    with connect(server, "127.1.1.1") as client, client.makefile("rb") as lines:
        client.sendall(b"EHLO impatient.test\r\n")
        assert lines.read() == b"554 5.5.0 Protocol synchronisation error\r\n"
    assert counts(server)["early_talkers"] == 1


def test_a_patient_stranger_is_let_in_and_at_once_from_then_on(server: Server) -> None:
    deliver(server, "127.2.2.2", "after a wait")
    wait_until(lambda: counts(server)["known_unwritten"] == 0, "the pass is not written")  # for other workers
    reload(server, _LONG)
    deliver(server, "127.2.2.2", "at once")
    deliver(server, "127.0.0.1", "always at once")
    deliver(server, "127.8.8.8", "on an allow list")
    assert len(server.wait_for_messages("ann@here.test", 4)) == 4
    stranger = connect(server, "127.3.3.3")
    wait_until(lambda: counts(server)["waiting"] == 1, "the stranger does not wait")
    found: Any = counts(server)
    assert found["patient"] == 1 and found["known"] >= 1 and found["vouched_for"] == 1
    with stranger, stranger.makefile("rb") as lines:
        server.stop()
        assert lines.read() == b"421 4.3.2 Service is shutting down, try again later\r\n"
    server.start()
    deliver(server, "127.2.2.2", "at once after a restart")
    server.wait_for_messages("ann@here.test", 5)


def test_submission_and_pop3_have_no_gate(server: Server) -> None:
    reload(server, _LONG)
    for port in ("submission", "pop3"):
        with socket.create_connection(("127.0.0.1", server.ports[port]), 30, ("127.3.3.4", 0)) as client:
            assert client.recv(3) in (b"220", b"+OK")
    plain = socket.create_connection(("127.0.0.1", server.ports["submissions"]), 30, ("127.3.3.4", 0))
    with server.tls.wrap_socket(plain, server_hostname="localhost") as secure:
        assert secure.recv(3) == b"220"


def test_a_gate_that_is_switched_off_stands_open(server: Server) -> None:
    before = len(server.events("reloaded"))
    server.write_config(extra=gate(_LONG).replace("[gate]\n", "[gate]\nenabled = false\n"))
    server.signal(signal.SIGHUP)
    wait_until(lambda: len(server.events("reloaded")) > before, "no reload")
    deliver(server, "127.3.3.5", "no gate")
