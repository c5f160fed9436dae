# SPDX-License-Identifier: MIT
"""Every wait for an SMTP client ends, whatever it sends meanwhile (HOSTILE F12, F13); none is timed, all are tiny."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from attrs import evolve

from polarismail.net.contracts import TransportSettings
from polarismail.serve.smtp_context import SessionSettings
from tests.serve.smtp_world import Client, SmtpWorld, eventually

SESSION = SessionSettings(soft_error_delay_seconds=0.0)
BRIEF = TransportSettings(linger_seconds=0.2)


def trickle(client: Client, octets: bytes, world: SmtpWorld) -> None:
    """Send an octet at a time, again and again, until the server has had enough."""
    for _ in range(2000):
        for at in range(len(octets)):
            try:
                client.socket.send(octets[at : at + 1])
            except OSError:
                return
            if world.connections == 0:
                return
            time.sleep(0.02)
    raise AssertionError("the server waits for ever")


@pytest.mark.parametrize("tls", ["none", "implicit"])
def test_an_idle_client_is_told_and_cut(tmp_path: Path, tls: str) -> None:
    with SmtpWorld(tmp_path, tls=tls, session=evolve(SESSION, command_seconds=0.3)) as world:
        with world.client() as client:
            assert client.reply() == 421
            assert client.reply() is None
        world.wait_until_empty()


def test_octets_of_a_command_buy_no_time(tmp_path: Path) -> None:
    with SmtpWorld(session=evolve(SESSION, command_seconds=0.5), transport=BRIEF) as world, world.client() as client:
        trickle(client, b"N" * 1000, world)
        world.wait_until_empty()


def test_a_content_that_trickles_in_is_cut_and_its_draft_abandoned(tmp_path: Path) -> None:
    session = evolve(SESSION, content_seconds=1.0, min_octets_per_second=100_000)
    with SmtpWorld(session=session, transport=BRIEF) as world, world.client() as client:
        client.begin()
        trickle(client, b"text\r\n", world)
        world.wait_until_empty()
        assert world.drafts[0].abandoned == 1 and not world.messages


def test_a_content_that_keeps_the_least_rate_does_not_go_on_for_ever() -> None:
    session = evolve(SESSION, min_octets_per_second=1, max_content_seconds=0.5)
    with SmtpWorld(session=session, transport=BRIEF) as world, world.client() as client:
        client.begin()
        trickle(client, b"text\r\n", world)
        world.wait_until_empty()
        assert world.drafts[0].abandoned == 1 and not world.messages


def test_octets_of_an_auth_exchange_buy_no_time(tmp_path: Path) -> None:
    with SmtpWorld(session=evolve(SESSION, command_seconds=0.5), transport=BRIEF) as world, world.client() as client:
        assert client.say("AUTH LOGIN") == 334
        trickle(client, b"A" * 1000, world)
        world.wait_until_empty()


def test_the_next_command_has_its_time_after_a_long_content() -> None:
    """What a content took is not taken from the command behind it."""
    session = evolve(SESSION, command_seconds=2.0, content_seconds=30.0)
    with SmtpWorld(session=session) as world, world.client() as client:
        client.begin()
        client.send(b"Subject: slow\r\n")
        time.sleep(2.5)
        client.send(b"\r\n.\r\n")
        assert client.reply() == 250
        time.sleep(0.3)
        assert client.say("QUIT") == 221


def start_nothing(raw: socket.socket) -> None:
    """Connect and say nothing."""


def start_record(raw: socket.socket) -> None:
    raw.sendall(b"\x16\x03\x01")


@pytest.mark.parametrize("begin", [start_nothing, start_record])
def test_a_handshake_that_never_ends_is_cut_on_an_implicit_listener(
    tmp_path: Path, begin: Callable[[socket.socket], None]
) -> None:
    """The greeting that waits for the handshake does not move its deadline."""
    transport = TransportSettings(handshake_seconds=0.3, write_seconds=300)
    world = SmtpWorld(tmp_path, tls="implicit", transport=transport)
    with world, socket.create_connection(("127.0.0.1", world.port), 10) as raw:
        begin(raw)
        eventually(lambda: world.connections == 1, "the connection")
        world.wait_until_empty()


def test_a_handshake_that_never_ends_is_cut_after_starttls(tmp_path: Path) -> None:
    transport = TransportSettings(handshake_seconds=0.3)
    with SmtpWorld(tmp_path, tls="starttls", transport=transport) as world, world.client() as client:
        assert client.say("STARTTLS") == 220
        trickle(client, b"\x16\x03\x01\x02\x00" + b"\x01" * 600, world)
        world.wait_until_empty()


@pytest.mark.parametrize("tls", ["none", "implicit"])
def test_a_client_that_never_reads_is_cut(tmp_path: Path, tls: str) -> None:
    """It asks and asks, reads nothing, and costs neither memory nor a connection for long."""
    session = evolve(SESSION, max_junk_commands=10**9)
    transport = TransportSettings(write_seconds=0.5, linger_seconds=0.3)
    with SmtpWorld(tmp_path, tls=tls, session=session, transport=transport) as world, world.client() as client:
        client.socket.setblocking(False)
        buffered = 0
        # Written without a pause; the server stops reading, then the kernel stops taking.
        deadline = time.monotonic() + 60
        while world.connections and time.monotonic() < deadline:
            try:
                client.socket.send(b"HELP\r\n" * 10000)
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break
            buffered = max([buffered, *(connection.engine.buffered for connection in list(world.factory.connections))])
        world.wait_until_empty()
        assert buffered <= 65536 * 4


def test_last_words_reach_a_client_that_is_still_sending() -> None:
    """The rest of what it sent is not read as commands, and does not make the kernel throw away our reply."""
    for _ in range(20):
        with SmtpWorld(transport=TransportSettings(linger_seconds=5)) as world, world.client() as client:
            client.send(b"x" * 400_000)
            assert client.reply() == 500
            assert client.reply() is None
            client.socket.close()
            world.wait_until_empty()


def test_a_client_that_goes_on_sending_after_the_last_words_is_cut() -> None:
    with SmtpWorld(transport=TransportSettings(linger_seconds=0.3)) as world, world.client() as client:
        client.send(b"GET / HTTP/1.0\r\n")
        assert client.reply() == 221
        trickle(client, b"x" * 1000, world)
        world.wait_until_empty()


def test_a_tls_client_that_never_says_goodbye_is_cut(tmp_path: Path) -> None:
    world = SmtpWorld(tmp_path, tls="implicit", transport=TransportSettings(linger_seconds=0.3))
    with world, world.client() as client:
        assert client.say("QUIT") == 221
        world.wait_until_empty()
