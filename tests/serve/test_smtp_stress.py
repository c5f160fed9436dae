# SPDX-License-Identifier: MIT
"""When places run out: less time for all, also for who is here; and a place for an honest newcomer (HOSTILE E6, F12)."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from polarismail.net import eviction
from polarismail.net.contracts import Hurry, TransportSettings
from polarismail.net.limits import ConnectionLimits
from polarismail.net.stress import Stress, StressSettings
from polarismail.serve import smtp_session
from polarismail.serve.smtp_context import SessionSettings
from tests.reactor import reactor, run
from tests.serve.smtp_world import Client, SmtpWorld, eventually

SETTINGS = StressSettings(hurry=Hurry(command_seconds=0.3))


@contextlib.contextmanager
def stressed(
    folder: Path | None = None, *, total: int = 5, settings: StressSettings = SETTINGS, **given: Any
) -> Iterator[Any]:
    """A world with so many places, and its Stress, which looks when it is told to."""
    with SmtpWorld(folder, limits=ConnectionLimits(total=total), **given) as world:
        yield world, Stress(reactor, world.counter, settings, lambda *event: world.events.append(event), "smtp")


def fill(world: SmtpWorld, number: int, stack: contextlib.ExitStack) -> list[Client]:
    return [stack.enter_context(world.client()) for _ in range(number)]


def test_who_is_here_already_gets_less_time_and_who_has_logged_in_does_not() -> None:
    with stressed() as (world, stress), contextlib.ExitStack() as stack:
        clients = fill(world, 4, stack)
        assert clients[0].say("AUTH PLAIN AGFubgBzZWNyZXQ=") == 235
        run(stress.look)
        assert stress.is_stressed()
        for client in clients[1:]:
            assert [client.reply(), client.reply()] == [421, None]
        assert clients[0].say("NOOP") == clients[0].say("RSET") == clients[0].say("NOOP") == 250
        eventually(lambda: world.connections == 1, "the others to go")
        run(stress.look)
        assert not stress.is_stressed()
        assert [name for name, _ in world.events] == ["stress-begins", "stress-ends"]
        assert world.events[0][1] == {"protocol": "smtp", "sessions": 4, "places": 5}


def test_one_error_or_command_without_use_is_enough_under_stress(tmp_path: Path) -> None:
    calm = StressSettings(hurry=Hurry(command_seconds=300.0))
    with stressed(tmp_path, settings=calm, tls="starttls") as (world, stress), contextlib.ExitStack() as stack:
        clients = fill(world, 4, stack)
        run(stress.look)
        assert [clients[0].say("NOOP"), clients[0].say("NOOP"), clients[0].reply()] == [250, 421, None]
        assert [clients[1].say("BOGUS"), clients[1].reply(), clients[1].reply()] == [500, 421, None]
        # An honest client's EHLO, STARTTLS, EHLO and RSET are not too many.
        assert clients[2].say("STARTTLS") == 220
        clients[2].start_tls()
        clients[2].hello()
        assert clients[2].say("RSET") == 250
        clients[2].begin()
        clients[2].send(b"text\r\n.\r\n")
        assert clients[2].reply() == 250
        for client in clients[:2]:
            client.socket.close()
        eventually(lambda: world.connections == 2, "the others to go")
        run(stress.look)
        assert not stress.is_stressed()
        assert [clients[3].say("NOOP") for _ in range(3)] == [250] * 3


def test_time_that_was_cut_is_given_back() -> None:
    settings = StressSettings(hurry=Hurry(command_seconds=1.0))
    with stressed(settings=settings) as (world, stress), contextlib.ExitStack() as stack:
        clients = fill(world, 4, stack)
        run(stress.look)
        for client in clients[1:]:
            client.socket.close()
        eventually(lambda: world.connections == 1, "the others to go")
        run(stress.look)
        time.sleep(1.2)
        assert clients[0].say("NOOP") == 250


@pytest.mark.parametrize("tls", ["none", "implicit"])
def test_a_newcomer_has_the_place_of_who_kept_us_waiting_longest(
    tmp_path: Path, tls: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eviction, "LEAST_SECONDS", 0.05)
    with stressed(tmp_path, total=3, tls=tls) as (world, stress), contextlib.ExitStack() as stack:
        login, slow, slower = fill(world, 3, stack)
        assert login.say("AUTH PLAIN AGFubgBzZWNyZXQ=") == 235
        assert slow.say("NOOP") == 250
        slower.send(b"N")
        time.sleep(0.2)
        newcomer = stack.enter_context(world.client())
        with contextlib.suppress(ConnectionResetError):
            assert slower.reply() in (421, None)
        newcomer.begin()
        newcomer.send(b"text\r\n.\r\n")
        assert newcomer.reply() == 250
        assert login.say("NOOP") == slow.say("NOOP") == 250
        assert run(stress.statistics)["put_out"] == 1
        run(stress.look)
        assert ("connections-refused", {"protocol": "smtp", "sessions": 3, "put_out": 1}) in world.events


def test_a_content_that_keeps_the_least_rate_is_not_put_out_before_one_that_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(eviction, "LEAST_SECONDS", 0.05)
    with stressed(total=2) as (world, _), contextlib.ExitStack() as stack:
        brisk, trickling = fill(world, 2, stack)
        trickling.begin()
        brisk.begin()
        brisk.send(b"x" * 70 + b"\r\n")
        brisk.send((b"x" * 70 + b"\r\n") * 100)
        time.sleep(0.3)
        stack.enter_context(world.client())
        with contextlib.suppress(ConnectionResetError):
            assert trickling.reply() in (421, None)
        assert world.drafts[0].abandoned == 1
        brisk.send(b".\r\n")
        assert brisk.reply() == 250


def test_commands_now_and_then_keep_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who names a recipient each moment is never slow, but never brings a message either."""
    monkeypatch.setattr(eviction, "LEAST_SECONDS", 0.05)
    monkeypatch.setattr(smtp_session, "_PATIENCE", 1.0)
    with stressed(total=2) as (world, _), contextlib.ExitStack() as stack:
        busy, bringer = fill(world, 2, stack)
        assert busy.say("MAIL FROM:<a@b.test>") == 250
        for at in range(20):
            assert busy.say(f"RCPT TO:<u{at}@here.test>") == 250
            time.sleep(0.01)
        bringer.begin()
        bringer.send(b".\r\n")
        assert bringer.reply() == 250
        assert busy.say("RCPT TO:<last@here.test>") == 250
        stack.enter_context(world.client())
        with contextlib.suppress(ConnectionResetError):
            assert busy.reply() in (421, None)
        assert bringer.say("QUIT") == 221


def test_the_newcomer_is_told_to_come_again_where_nobody_keeps_us_waiting() -> None:
    with stressed(total=1) as (world, stress), world.client():
        newcomer = Client(socket.create_connection(("127.0.0.1", world.port), 10), world)
        assert newcomer.reply() == 421 and newcomer.lines == ["4.3.2 Too busy now, try again in a minute"]
        assert newcomer.reply() is None
        newcomer.socket.close()
        assert run(stress.statistics)["refused"] == {"total": 1}


def test_a_flood_is_not_read_for_ever_when_we_have_closed() -> None:
    """A line without end is dropped, then its connection; what still comes has a bound, too."""
    transport = TransportSettings(linger_seconds=600.0, linger_octets=200_000)
    with SmtpWorld(transport=transport) as world, world.client() as client:
        with pytest.raises(OSError):
            for _ in range(400):
                client.send(b"x" * 65536)
        world.wait_until_empty()


def test_settings_under_stress_are_never_wider() -> None:
    session = SessionSettings(command_seconds=5.0, hard_errors=1)
    assert session.hurried(Hurry(command_seconds=10.0)).command_seconds == 5.0
    assert evolve(session, content_seconds=5.0).hurried(Hurry()).content_seconds == 5.0
    with pytest.raises(ValueError, match="ends_at"):
        StressSettings(begins_at=0.5, ends_at=0.6)


def test_neither_tls_nor_another_client_brings_back_the_time_from_before(tmp_path: Path) -> None:
    """What a session was given when it began is no longer what strangers have, neither under stress nor after it."""
    given: Any = {"tls": "starttls", "xclient_networks": ("127.0.0.1/32",)}
    with stressed(tmp_path, **given) as (world, stress), contextlib.ExitStack() as stack:
        clients = fill(world, 4, stack)
        run(stress.look)
        for client, command in zip(clients, ("STARTTLS", "XCLIENT ADDR=192.0.2.7"), strict=False):
            assert client.say(command) == 220
        clients[0].start_tls()
        for client in clients:
            assert [client.reply(), client.reply()] == [421, None]


def test_a_session_that_began_under_stress_is_free_of_it_later(tmp_path: Path) -> None:
    settings = StressSettings(hurry=Hurry(command_seconds=300.0))
    with stressed(tmp_path, tls="starttls", settings=settings) as (world, stress), contextlib.ExitStack() as stack:
        early = fill(world, 4, stack)
        run(stress.look)
        late = stack.enter_context(world.client())
        for client in early:
            client.socket.close()
        eventually(lambda: world.connections == 1, "the others to go")
        run(stress.look)
        assert late.say("STARTTLS") == 220
        late.start_tls()
        late.hello()
        assert [late.say("NOOP") for _ in range(3)] == [250] * 3


def test_a_goodbye_behind_a_message_is_not_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within TLS it takes a round trip: a reset meanwhile may take the 250 with it, and the client sends a second copy."""
    monkeypatch.setattr(eviction, "LEAST_SECONDS", 60.0)
    transport = TransportSettings(linger_seconds=600.0)
    with SmtpWorld(tmp_path, tls="implicit", transport=transport) as world, world.client() as client:
        made = eviction.Eviction(world.counter)
        client.send(b"MAIL FROM:<a@b.test>\r\nRCPT TO:<bob@here.test>\r\nBDAT 6 LAST\r\na: b\r\nQUIT\r\n")
        eventually(lambda: any(each._ended for each in world.factory.connections), "the goodbye")
        assert not run(made.make_room)
        assert [client.reply() for _ in range(4)] == [250, 250, 250, 221]
