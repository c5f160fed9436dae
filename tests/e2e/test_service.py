# SPDX-License-Identifier: MIT
"""The process itself: how it ends, how it fails to begin, what signals do."""

from __future__ import annotations

import contextlib
import os
import signal
import smtplib
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dialogues.runner import LivePeer
from tests.e2e.server import Server, wait_until

TEXT = "From: a@else.test\r\nSubject: x\r\n\r\nHello\r\n"


def line_of(raw: socket.socket) -> bytes:
    """One line, octet by octet: what follows is somebody else's."""
    line = b""
    while not line.endswith(b"\n"):
        octet = raw.recv(1)
        if not octet:
            return line
        line += octet
    return line


def test_stop_says_goodbye_to_everybody_and_lets_a_message_come_to_its_end(make_server: Callable[..., Server]) -> None:
    server = make_server(extra="[transport]\nlinger_seconds = 2.0\n").start()
    host, ports = "127.0.0.1", server.ports
    with contextlib.ExitStack() as stack:
        idle = {
            name: stack.enter_context(
                LivePeer(host, ports[name], tls=server.tls, implicit=name in ("submissions", "pop3s"))
            )
            for name in ("mx", "mx-alt", "submission", "submissions", "pop3", "pop3s")
        }
        for name, peer in idle.items():
            greeting = peer.read_line()
            assert greeting is not None and greeting.startswith(b"+OK" if "pop3" in name else b"220 ")
        # One that has begun a handshake, one that never will, one in the middle of a message.
        stack.enter_context(socket.create_connection((host, ports["submissions"]), 10))
        begun = stack.enter_context(socket.create_connection((host, ports["pop3s"]), 10))
        begun.sendall(b"\x16\x03\x01")
        writing = stack.enter_context(LivePeer(host, ports["mx"]))
        writing.send(b"HELO me.test\r\n")
        writing.read_line(), writing.read_line()
        writing.send(b"MAIL FROM:<a@else.test>\r\nRCPT TO:<bob@here.test>\r\nDATA\r\n")
        assert [writing.read_line()[:3] for _ in range(3)] == [b"250", b"250", b"354"]
        server.signal(signal.SIGTERM)
        for name, peer in idle.items():
            line = peer.read_line()
            assert line is not None and line.startswith(b"-ERR " if "pop3" in name else b"421 4.3.2 "), name
            assert peer.read_line() is None
            peer.close()
        writing.send(b"Subject: late\r\n\r\nstill here\r\n.\r\n")
        assert writing.read_line()[:3] == b"250"
        assert writing.read_line()[:3] == b"421"
        assert writing.read_line() is None
        writing.close()
        assert server.process is not None
        assert server.process.wait(25) in (0, -signal.SIGTERM)
    assert "Traceback" not in server.twistd_log()
    assert [event["event"] for event in server.events()][-1] == "stopped"
    server.start()
    assert b"still here" in server.wait_for_messages("bob@here.test", 1)[0]


def test_stop_does_not_wait_for_a_client_that_never_ends(make_server: Callable[..., Server]) -> None:
    """A content that nobody finishes is dropped after the time that transactions have to finish."""
    server = make_server(extra="[transport]\ndrain_seconds = 3\n").start()
    with LivePeer("127.0.0.1", server.ports["mx"]) as peer:
        peer.send(b"HELO me.test\r\n")
        peer.read_line(), peer.read_line()
        peer.send(b"MAIL FROM:<a@else.test>\r\nRCPT TO:<bob@here.test>\r\nDATA\r\n")
        assert [peer.read_line()[:3] for _ in range(3)] == [b"250", b"250", b"354"]
        peer.send(b"x" * 200_000 + b"\r\n")
        assert server.stop() in (0, -signal.SIGTERM)
    assert "Traceback" not in server.twistd_log()
    assert "Traceback" not in (server.directory / "log" / "events.log").read_text()
    assert not [path for path in (server.directory / "state" / "spool").rglob("*") if path.is_file()]


@pytest.mark.parametrize("seconds", [0.3, 0.8, 1.2, 1.6, 2.0])
def test_stop_while_it_starts(make_server: Callable[..., Server], seconds: float) -> None:
    server = make_server()
    server.make_accounts()
    server.spawn()
    assert server.process is not None
    time.sleep(seconds)
    server.signal(signal.SIGTERM)
    assert server.process.wait(30) in (0, -signal.SIGTERM)
    assert "Traceback" not in server.twistd_log()


def test_what_cannot_be_opened_ends_the_start_with_status_1(make_server: Callable[..., Server]) -> None:
    server = make_server()
    server.make_accounts()
    for path in (server.directory / "state").glob("polarismail.db*"):
        path.write_bytes(b"this is no database" * 1000)
    server.spawn()
    assert server.process is not None
    assert server.process.wait(30) == 1
    assert "cannot start" in server.twistd_log()
    for port in server.ports.values():
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port), 1)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda server: server.config.write_text("hostname = 7\n"), "hostname: expected"),
        (lambda server: (server.directory / "state").write_text(""), "state"),
        (lambda server: (server.directory / "log" / "events.log").mkdir(parents=True), "events.log"),
    ],
    ids=["configuration", "state", "log"],
)
def test_a_start_that_fails_names_the_fault_and_ends_with_status_1(
    make_server: Callable[..., Server], damage: Callable[[Server], object], words: str
) -> None:
    server = make_server()
    damage(server)
    server.spawn()
    assert server.process is not None
    assert server.process.wait(30) == 1
    assert words in server.twistd_log()


@pytest.mark.parametrize("workers", [1, 2])
def test_without_a_certificate_the_rest_is_served_and_a_reload_brings_tls(
    make_server: Callable[..., Server], workers: int
) -> None:
    """HOSTILE E11."""
    server = make_server(workers=workers)
    good = (server.directory / "key.pem").read_text()
    (server.directory / "key.pem").write_text("no key")
    server.start()
    with server.smtp("mx") as client:
        assert client.docmd("STARTTLS")[0] == 454
        client.sendmail("who@else.test", ["bob@here.test"], TEXT)
    with pytest.raises((OSError, smtplib.SMTPException)), server.smtp("submissions"):
        raise AssertionError("there is TLS without a certificate")
    (event,) = wait_until(lambda: server.events("certificate_missing"), "the alert")
    assert event["level"] == "critical" and "key.pem: expected a private key" in event["text"]
    (server.directory / "key.pem").write_text(good)
    server.signal(signal.SIGHUP)
    wait_until(lambda: server.events("reloaded"), "the reload")
    with server.smtp("mx") as client, server.smtp("submissions", "ann@here.test"):
        assert client.starttls(context=server.tls)[0] == 220


def greylists(server: Server) -> bool:
    with server.smtp("mx") as client:
        client.mail("who@else.test")
        return client.rcpt("bob@here.test")[0] == 451


def test_a_reload_that_fails_late_changes_nothing(make_server: Callable[..., Server]) -> None:
    """The file is good, the certificate is not: neither is taken, and the next reload is told the same."""
    server = make_server().start()
    key = server.directory / "key.pem"
    good = key.read_bytes()
    key.write_bytes(b"no key")
    server.write_config(greylisting=True, extra="[smtp]\nmax_message_octets = 12345\n[connections]\nper_address = 1\n")
    server.signal(signal.SIGHUP)
    (event,) = wait_until(lambda: server.events("reload-failed"), "the refusal in the log")
    assert "key.pem" in event["problem"]
    assert not greylists(server)
    with server.smtp("submissions") as client, server.smtp("mx") as another:
        assert client.esmtp_features["size"] == another.esmtp_features["size"] == "52428800"
    key.write_bytes(good)
    server.signal(signal.SIGHUP)
    (event,) = wait_until(lambda: server.events("reloaded"), "the reload")
    assert event["needs_restart"] == ""
    assert greylists(server)
    with server.smtp("mx") as client:
        assert client.esmtp_features["size"] == "12345"
        with socket.create_connection(("127.0.0.1", server.ports["mx"]), 10) as raw:
            assert line_of(raw).startswith(b"421 ")


def test_what_needs_a_restart_is_said_as_often_as_it_is_asked(make_server: Callable[..., Server]) -> None:
    server = make_server().start()
    text = server.config.read_text().replace('hostname = "mail.here.test"', 'hostname = "other.here.test"')
    server.config.write_text(text.replace("[dns]", "[dns]\n") + "[directory]\npoll_seconds = 0.4\n")
    for times in (1, 2):
        server.signal(signal.SIGHUP)
        events = wait_until(
            lambda times=times: found if len(found := server.events("reloaded")) == times else None, "the reload"
        )
        assert events[-1]["needs_restart"] == "hostname, directory"
    with socket.create_connection(("127.0.0.1", server.ports["mx"]), 10) as raw:
        assert b"mail.here.test" in line_of(raw)
        raw.sendall(b"EHLO me.test\r\n")
        assert b"mail.here.test" in line_of(raw)


def test_sigusr1_reopens_the_log_and_nothing_else(make_server: Callable[..., Server]) -> None:
    server = make_server().start()
    log = server.directory / "log" / "events.log"
    log.rename(log.with_suffix(".1"))
    server.config.write_text("broken")
    server.signal(signal.SIGUSR1)
    wait_until(log.exists, "a fresh log file")
    with server.smtp("mx") as client:
        client.sendmail("who@else.test", ["bob@here.test"], TEXT)
    wait_until(lambda: server.events("received"), "the event in the fresh file")
    assert not server.events("reload-failed")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the server's descriptors are nobody else's to see")
def test_descriptors_are_given_back(make_server: Callable[..., Server]) -> None:
    """Connections that end in every bad way leave nothing open."""
    server = make_server(extra="[transport]\nhandshake_seconds = 0.5\nlinger_seconds = 0.5\n").start()

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{server.pid}/fd"))

    with server.smtp("mx") as client:
        client.sendmail("who@else.test", ["bob@here.test"], TEXT)
    server.wait_for_messages("bob@here.test", 1)
    before = descriptors()
    for name, port in server.ports.items():
        for octets in (b"", b"\x16\x03\x01", b"EHLO me.test\r\nMAIL", b"GET / HTTP/1.1\r\n\r\n", b"x" * 100_000):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 10) as raw:
                raw.sendall(octets)
                if name[-1] != "s":
                    raw.recv(10)
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.ports["mx"]), 10) as raw:
        raw.sendall(b"HELO x\r\n")
        time.sleep(0.2)
        raw.sendall(b"MAIL FROM:<>\r\nRCPT TO:<bob@here.test>\r\nDATA\r\n")
        time.sleep(0.2)
        raw.sendall(b"x" * 300_000)
    wait_until(lambda: descriptors() <= before, f"{before} descriptors, as before")
    wait_until(lambda: not _spooled(server), "the draft to go")
    assert "Traceback" not in (server.directory / "log" / "events.log").read_text()


def _spooled(server: Server) -> list[Path]:
    return [path for path in (server.directory / "state" / "spool").rglob("*") if path.is_file()]
