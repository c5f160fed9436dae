# SPDX-License-Identifier: MIT
"""How much an SMTP client may err, waste, or connect: HOSTILE section 0, F14, A4."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
from attrs import evolve

from polarismail.net.contracts import TransportSettings
from polarismail.net.limits import ConnectionCounter, ConnectionLimits
from polarismail.serve.smtp_context import SessionSettings
from polarismail.wire.smtp_states import ServerSettings
from tests.serve.smtp_world import SmtpWorld, eventually

SESSION = SessionSettings(soft_error_delay_seconds=0.0)


def test_twenty_errors_end_the_session() -> None:
    with SmtpWorld() as world, world.client() as client:
        assert [client.say("BOGUS") for _ in range(20)] == [500] * 20
        assert [client.reply(), client.reply()] == [421, None]


def test_errors_slow_the_session_down() -> None:
    """From the soft limit on each error is answered at once, and the next command waits."""
    with SmtpWorld(session=evolve(SESSION, soft_errors=2, soft_error_delay_seconds=0.5)) as world:
        with world.client() as client:
            assert client.say("BOGUS") == 500
            client.send(b"BOGUS\r\nNOOP\r\n")
            assert client.reply() == 500
            (connection,) = world.factory.connections
            assert connection.engine.buffered == len(b"NOOP\r\n")
            assert client.reply() == 250
            client.send(b"BOGUS\r\nNOOP\r\n")
            assert client.reply() == 500
        world.wait_until_empty()


@pytest.mark.parametrize("command", ["NOOP", "RSET", "HELP", "VRFY x", "EHLO me.test", "HELO me.test"])
def test_commands_that_bring_no_mail_are_limited(command: str) -> None:
    with SmtpWorld(session=evolve(SESSION, max_junk_commands=5)) as world, world.client() as client:
        codes = [client.say(command) for _ in range(6)]
        assert all(code in (250, 214, 252) for code in codes[:5])
        assert codes[5] == 421
        assert client.reply() is None


def test_budgets_begin_anew_with_each_message() -> None:
    """A client that keeps its connection, and says RSET or NOOP in between, may send as many messages as it likes."""
    with SmtpWorld(session=evolve(SESSION, max_junk_commands=5, hard_errors=3)) as world, world.client() as client:
        for _ in range(20):
            assert client.say("RSET") == client.say("NOOP") == 250
            assert client.say("BOGUS") == 500
            client.begin()
            client.send(b".\r\n")
            assert client.reply() == 250
        assert client.say("QUIT") == 221


def test_a_refused_message_restores_nothing() -> None:
    with SmtpWorld(session=evolve(SESSION, hard_errors=3)) as world, world.client() as client:
        for _ in range(2):
            client.begin()
            client.send(b"\0\r\n.\r\n")
            assert client.reply() == 554
        assert client.say("BOGUS") == 500
        assert client.reply() == 421


def test_recipients_beyond_the_limit_do_not_cost_those_before_it_their_message() -> None:
    """RFC 5321 §4.5.3.1.10: the rest is told 452, however many, and the client goes on with DATA."""
    with SmtpWorld(engine=ServerSettings(max_recipients=100)) as world, world.client() as client:
        client.send(b"MAIL FROM:<a@b.test>\r\n" + b"".join(b"RCPT TO:<u%d@here.test>\r\n" % n for n in range(150)))
        assert [client.reply() for _ in range(151)] == [250] * 101 + [452] * 50
        assert client.say("DATA") == 354
        client.send(b".\r\n")
        assert client.reply() == 250
        assert len(world.messages[0][1].recipients) == 100


def test_recipients_that_are_told_to_come_again_are_no_errors_but_have_an_end() -> None:
    settings = ServerSettings(max_recipients=50)
    with SmtpWorld(engine=settings) as world, world.client() as client:
        assert client.say("MAIL FROM:<a@b.test>") == 250
        assert [client.say(f"RCPT TO:<later{n}@here.test>") for n in range(50)] == [451] * 50
        assert client.say("RCPT TO:<bob@here.test>") == 250
        client.send(b"RCPT TO:<later@here.test>\r\n" * 40)
        codes = [client.reply() for _ in range(22)]
        assert codes == [451] * 20 + [421, None]


def test_guessing_recipients_is_limited() -> None:
    with SmtpWorld() as world, world.client() as client:
        assert client.say("MAIL FROM:<a@b.test>") == 250
        codes = [client.say(f"RCPT TO:<unknown{n}@here.test>") for n in range(10)]
        assert codes == [550] * 10 and [client.reply(), client.reply()] == [421, None]


def test_each_guess_waits_longer_than_the_last() -> None:
    """Three are a mistake; from then on the commands behind an answer wait, and nothing that follows a 421 is answered."""
    session = SessionSettings(soft_error_delay_seconds=0.05, max_unknown_recipients=6)
    with SmtpWorld(session=session) as world, world.client() as client:
        assert client.say("MAIL FROM:<a@b.test>") == 250
        client.send(b"RCPT TO:<unknown@here.test>\r\n" * 7)
        codes, times = [], []
        for _ in range(8):
            codes.append(client.reply())
            times.append(time.monotonic())
        assert codes == [550] * 6 + [421, None]
        assert times[4] - times[3] >= 0.1 and times[5] - times[4] >= 0.2


def test_whoever_has_logged_in_may_name_more_that_do_not_exist() -> None:
    with SmtpWorld() as world, world.client() as client:
        assert client.say("AUTH PLAIN AGFubgBzZWNyZXQ=") == 235
        assert client.say("MAIL FROM:<a@b.test>") == 250
        assert [client.say(f"RCPT TO:<unknown{n}@here.test>") for n in range(15)] == [550] * 15


def test_the_reception_sees_the_recipients_so_far_and_one_of_each() -> None:
    with SmtpWorld() as world, world.client() as client:
        assert client.say("MAIL FROM:<a@b.test>") == 250
        for name in ("bob", "ann", "bob"):
            assert client.say(f"RCPT TO:<{name}@here.test>") == 250
        assert [len(envelope.recipients) for envelope in world.envelopes] == [0, 1, 2]
        assert client.say("DATA") == 354
        client.send(b".\r\n")
        assert client.reply() == 250
        assert [str(r.forward_path) for r in world.messages[0][1].recipients] == ["bob@here.test", "ann@here.test"]


# -- connections ----------------------------------------------------------------------------------------------------------


def test_one_connection_too_many_is_refused_and_not_counted() -> None:
    with SmtpWorld(limits=ConnectionLimits(total=10, per_address=2)) as world:
        with world.client(), world.client():
            for _ in range(5):
                with socket.create_connection(("127.0.0.1", world.port), 10) as raw:
                    assert raw.makefile("rb").read().startswith(b"421 4.7.0 ")
            assert world.connections == 2
        world.wait_until_empty()
        with world.client():
            assert world.connections == 1


def test_clients_beyond_the_limit_cannot_wait_for_a_handshake(tmp_path: Path) -> None:
    """They hold no descriptor: nothing would ever end a handshake that nobody counts."""
    with SmtpWorld(tmp_path, tls="implicit", limits=ConnectionLimits(total=1)) as world:
        with world.client():
            for _ in range(5):
                try:
                    with socket.create_connection(("127.0.0.1", world.port), 10) as raw:
                        assert raw.recv(100) == b""
                except ConnectionResetError:
                    continue
        world.wait_until_empty()


@pytest.mark.parametrize("octets", [b"", b"\x16\x03\x01", b"no TLS at all\r\n\r\n", b"\x80" * 1000])
def test_a_handshake_that_fails_is_counted_down_once(tmp_path: Path, octets: bytes) -> None:
    with SmtpWorld(tmp_path, tls="implicit") as world:
        with socket.create_connection(("127.0.0.1", world.port), 10) as raw:
            raw.sendall(octets)
            eventually(lambda: world.connections <= 1, "the connection")
        world.wait_until_empty()
        assert not world.logged


def test_a_network_is_an_ipv4_address_or_an_ipv6_64() -> None:
    counter = ConnectionCounter(ConnectionLimits(total=100, per_address=2))
    assert counter.admit("192.0.2.1") and counter.admit("::ffff:192.0.2.1")
    assert not counter.admit("192.0.2.1")
    assert counter.admit("192.0.2.2")
    assert counter.admit("2001:db8::1") and counter.admit("2001:db8::ffff:1")
    assert not counter.admit("2001:db8::2")
    assert counter.admit("2001:db8:0:1::1")
    counter.leave("2001:db8::1")
    assert counter.admit("2001:db8::3")
    assert counter.total == 6


def test_a_network_around_many_clients_has_a_limit_and_loopback_has_none() -> None:
    counter = ConnectionCounter(ConnectionLimits(total=100, per_address=5, per_network=2))
    assert counter.admit("192.0.2.1") and counter.admit("192.0.2.2") and not counter.admit("::ffff:192.0.2.3")
    assert counter.admit("192.0.3.1")
    assert (
        counter.admit("2001:db8:1:1::1") and counter.admit("2001:db8:1:2::1") and not counter.admit("2001:db8:1:3::1")
    )
    assert all(counter.admit(f"127.0.0.{at}") for at in range(1, 6))
    assert counter.refused == {"network": 2} and counter.total == 10
    counter.limits = ConnectionLimits(total=100, per_address=5, per_network=0)
    assert counter.admit("192.0.2.4")


def test_all_connections_together_have_a_limit_that_may_change() -> None:
    counter = ConnectionCounter(ConnectionLimits(total=2, per_address=2))
    assert counter.admit("192.0.2.1") and counter.admit("192.0.2.2") and not counter.admit("192.0.2.3")
    counter.limits = ConnectionLimits(total=1)
    counter.leave("192.0.2.1")
    assert not counter.admit("192.0.2.3")
    counter.leave("192.0.2.2")
    assert counter.admit("192.0.2.3") and counter.total == 1


def test_too_many_handshakes_from_one_address_on_an_implicit_listener(tmp_path: Path) -> None:
    with SmtpWorld(tmp_path, tls="implicit", transport=TransportSettings(handshakes_per_minute=2)) as world:
        for _ in range(2):
            with world.client() as client:
                assert client.say("NOOP") == 250
        with pytest.raises(OSError), world.client():  # an ssl.SSLError is one
            pass
        world.wait_until_empty()


def test_too_many_handshakes_from_one_address_by_starttls(tmp_path: Path) -> None:
    with SmtpWorld(tmp_path, tls="starttls", transport=TransportSettings(handshakes_per_minute=1)) as world:
        with world.client() as client:
            assert client.say("STARTTLS") == 220
            client.start_tls()
            client.hello()
        with world.client() as client:
            assert client.say("STARTTLS") == 421
            assert client.reply() is None
        world.wait_until_empty()
