# SPDX-License-Identifier: MIT
"""XCLIENT and XFORWARD over sockets: from whom, what they change, and what they cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from polarismail.net.limits import ConnectionCounter, ConnectionLimits
from polarismail.serve.smtp_context import SessionSettings
from tests.reactor import run
from tests.serve.smtp_world import Client, SmtpWorld

FRONT = ("127.0.0.1/32",)


def send_mail(client: Client, recipient: str = "bob@here.test") -> list[int | None]:
    client.send(f"MAIL FROM:<a@b.test>\r\nRCPT TO:<{recipient}>\r\nBDAT 6 LAST\r\na: b\r\n".encode())
    return [client.reply() for _ in range(3)]


@pytest.mark.parametrize("networks", [(), ("192.0.2.0/24", "127.0.0.2/32")])
def test_others_are_refused_and_offered_nothing(networks: tuple[str, ...]) -> None:
    session = SessionSettings(max_junk_commands=5, soft_error_delay_seconds=0.0)
    with SmtpWorld(xclient_networks=networks, session=session) as world, world.client() as client:
        assert not any("XCLIENT" in line or "XFORWARD" in line for line in client.hello())
        assert client.say("XCLIENT ADDR=127.0.0.1 LOGIN=ann") == 550
        assert client.say("XFORWARD ADDR=192.0.2.7") == 550
        assert send_mail(client) == [250, 250, 250]
        assert world.facts[0].client_address == "127.0.0.1" and world.logins == ["stranger"]
        codes = [client.say("XCLIENT ADDR=192.0.2.7") for _ in range(6)]
        assert codes[-1] == 421


def test_xclient_makes_it_another_clients_session() -> None:
    with SmtpWorld(xclient_networks=FRONT) as world, world.client() as client:
        assert "XCLIENT NAME ADDR PORT PROTO HELO LOGIN" in client.lines
        assert client.say("AUTH PLAIN AGFubgBzZWNyZXQ=") == 235
        said = "NAME=spike.example ADDR=192.0.2.7 PORT=1025 PROTO=SMTP HELO=spike"
        assert client.say(f"XCLIENT {said}") == 220
        assert world.logouts == ["ann"]
        assert client.say("MAIL FROM:<a@b.test>") == 503
        client.hello()
        assert send_mail(client, "x@away.test") == [250, 550, 554]
        client.say("RSET")
        assert send_mail(client) == [250, 250, 250]
        facts = world.facts[-1]
        assert (facts.client_name, facts.client_address, facts.client_port) == ("spike.example", "192.0.2.7", 1025)
        assert (facts.helo, facts.protocol, facts.account) == ("spike", "SMTP", "")
        # It is still the front end that speaks, and it may speak for the next one.
        assert client.say("XCLIENT ADDR=IPV6:2001:db8::1 HELO=[UNAVAILABLE] PROTO=ESMTP") == 220
        client.hello()
        assert send_mail(client) == [250, 250, 250]
        facts = world.facts[-1]
        assert (facts.client_address, facts.helo, facts.protocol) == ("2001:db8::1", "me.test", "ESMTP")


def test_within_a_transaction_it_is_out_of_order() -> None:
    with SmtpWorld(xclient_networks=FRONT) as world, world.client() as client:
        assert client.say("MAIL FROM:<a@b.test>") == 250
        assert client.say("XCLIENT ADDR=192.0.2.7") == 503
        assert client.say("XFORWARD ADDR=192.0.2.7") == 503
        assert client.say("RSET") == 250
        assert client.say("XCLIENT ADDR=nonsense") == 501
        assert send_mail(client) == [250, 250, 250]
        assert world.facts[-1].client_address == "127.0.0.1"


def test_an_unknown_address_is_in_no_network() -> None:
    with SmtpWorld(xclient_networks=FRONT) as world, world.client() as client:
        assert client.say("XCLIENT ADDR=[UNAVAILABLE] NAME=[TEMPUNAVAIL]") == 220
        client.hello()
        assert send_mail(client) == [250, 250, 250]
        assert world.facts[-1].client_address == "unknown"
        assert world.facts[-1].client_name == ""


def test_a_login_that_is_vouched_for() -> None:
    with SmtpWorld(xclient_networks=FRONT, plaintext_auth="never") as world, world.client() as client:
        assert client.say("XCLIENT LOGIN=ann") == 220
        assert client.say("XCLIENT ADDR=192.0.2.7") == 220  # the rest, because lines are short
        assert not any(line.startswith("AUTH") for line in client.hello())
        assert send_mail(client, "x@away.test") == [250, 250, 250]
        assert world.logins[-1] == "ann"
        assert world.facts[-1].protocol == "ESMTPA"
        assert client.say("XCLIENT LOGIN=[UNAVAILABLE]") == 220
        client.hello()
        assert send_mail(client, "x@away.test")[:2] == [250, 550]
    world.wait_until_empty()
    assert world.logins.count("ann") == world.logouts.count("ann")


def test_a_login_that_nobody_has_changes_nothing() -> None:
    with SmtpWorld(xclient_networks=FRONT) as world, world.client() as client:
        assert client.say("XCLIENT ADDR=192.0.2.7 LOGIN=eve") == 535
        assert client.say("XCLIENT ADDR=192.0.2.7 LOGIN=broken") == 454
        assert send_mail(client) == [250, 250, 250]
        assert world.facts[-1].client_address == "127.0.0.1" and world.logins[-1] == "stranger"
        fields = {"client": "192.0.2.7", "listener": "smtp", "login": "eve"}
        assert world.events == [("login-failed", fields)]


def test_a_submission_listener_takes_the_login_for_its_own() -> None:
    from polarismail.wire.smtp_states import submission_settings

    world = SmtpWorld(role="submission", engine=submission_settings(), xclient_networks=FRONT)
    with world, world.client() as client:
        assert client.say("MAIL FROM:<a@b.test>") == 530
        assert client.say("XCLIENT ADDR=192.0.2.7") == 220
        client.hello()
        assert client.say("MAIL FROM:<a@b.test>") == 530
        assert client.say("XCLIENT LOGIN=ann") == 220
        client.hello()
        assert send_mail(client) == [250, 250, 250]


def test_connections_count_for_the_client_that_is_spoken_for() -> None:
    world = SmtpWorld(xclient_networks=FRONT, limits=ConnectionLimits(total=10, per_address=2))
    with world:
        with world.client() as one, world.client() as two:
            assert one.say("XCLIENT ADDR=192.0.2.7") == 220
            assert two.say("XCLIENT ADDR=192.0.2.7") == 220
            with world.client() as three:
                assert three.say("XCLIENT ADDR=192.0.2.7") == 421
                assert three.reply() is None
            with world.client() as four, world.client() as five:
                assert four.say("XCLIENT ADDR=192.0.2.8") == 220
                assert five.say("NOOP") == 250
        world.wait_until_empty()
        assert not run(lambda: world.counter._hosts or world.counter._networks)


def test_moving_a_count_keeps_the_total() -> None:
    counter = ConnectionCounter(ConnectionLimits(total=2, per_address=1))
    assert counter.admit("192.0.2.1") and counter.admit("192.0.2.2")
    assert counter.move("192.0.2.1", "192.0.2.3")  # though there is no room for one more
    assert not counter.move("192.0.2.2", "192.0.2.3")
    assert counter.move("192.0.2.2", "192.0.2.2")
    counter.leave("192.0.2.3")
    counter.leave("192.0.2.2")
    assert counter.total == 0 and not counter._hosts and not counter._networks


def test_xforward_is_told_on_and_decides_nothing() -> None:
    with SmtpWorld(xclient_networks=FRONT) as world, world.client() as client:
        client.send(b"XFORWARD NAME=spike.example ADDR=192.0.2.7\r\nXFORWARD IDENT=4Xyz HELO=spike\r\n")
        assert [client.reply(), client.reply()] == [250, 250]
        assert send_mail(client) == [250, 250, 250]
        facts = world.messages[-1][0]
        assert facts.origin == "spike.example[192.0.2.7] helo=spike id=4Xyz"
        assert (facts.client_address, facts.helo) == ("127.0.0.1", "me.test")
        assert send_mail(client) == [250, 250, 250]
        assert world.messages[-1][0].origin == ""  # until the end of the transaction
        assert client.say("XFORWARD IDENT=1") == 250
        assert client.say("RSET") == 250
        assert send_mail(client) == [250, 250, 250]
        assert world.messages[-1][0].origin == ""


def test_over_lmtp_too() -> None:
    with SmtpWorld(role="lmtp", xclient_networks=FRONT) as world, world.client(hello=False) as client:
        assert client.say("LHLO front.test") == 250
        assert client.say("XFORWARD ADDR=192.0.2.7 PROTO=ESMTP") == 250
        assert client.say("XCLIENT ADDR=192.0.2.8 PROTO=ESMTP") == 220
        assert client.say("LHLO front.test") == 250
        assert send_mail(client) == [250, 250, 250]
        facts = world.messages[-1][0]
        assert (facts.protocol, facts.client_address, facts.origin) == ("LMTP", "192.0.2.8", "")


def test_the_errors_of_one_client_are_not_the_next_ones() -> None:
    session = SessionSettings(hard_errors=3, max_junk_commands=2, soft_error_delay_seconds=0.0)
    with SmtpWorld(xclient_networks=FRONT, session=session) as world, world.client() as client:
        for number in range(3):
            assert client.say(f"XCLIENT ADDR=192.0.2.{number}") == 220
            client.hello()
            assert [client.say("NOOP"), client.say("NOOP")] == [250, 250]
            assert [client.say("DATA"), client.say("DATA")] == [503, 503]
        assert [client.say("DATA"), client.reply(), client.reply()] == [503, 421, None]


def test_a_login_that_was_vouched_for_in_clear_is_forgotten_when_tls_begins(tmp_path: Path) -> None:
    """RFC 3207 §4.2: somebody between the front end and us may have said it."""
    with SmtpWorld(tmp_path, tls="starttls", xclient_networks=FRONT) as world, world.client() as client:
        assert client.say("XCLIENT LOGIN=ann ADDR=192.0.2.7") == 220
        client.hello()
        assert client.say("STARTTLS") == 220
        client.start_tls()
        client.hello()
        assert client.say("XCLIENT NAME=spike.example") == 220
        client.hello()
        assert send_mail(client, "x@away.test")[:2] == [250, 550]
        assert (world.facts[-1].client_address, world.facts[-1].account) == ("192.0.2.7", "")
    world.wait_until_empty()
    assert world.logins.count("ann") == world.logouts.count("ann") == 1
