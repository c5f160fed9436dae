# SPDX-License-Identifier: MIT
"""Who has logged in over SMTP, how, and what ends it: RFC 4954, RFC 3207 §4.2, RFC 3848, HOSTILE A7 and section 2."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from tests.serve.smtp_world import Client, SmtpWorld, eventually

LOGIN = "AUTH PLAIN " + base64.b64encode(b"\0ann\0secret").decode()
WRONG = "AUTH PLAIN " + base64.b64encode(b"\0ann\0wrong").decode()


def offers_auth(client: Client) -> bool:
    return any(line.startswith("AUTH ") for line in client.hello())


def may_relay(client: Client) -> bool:
    assert client.say("MAIL FROM:<a@b.test>") == 250
    relays = client.say("RCPT TO:<x@elsewhere.test>") == 250
    assert client.say("RSET") == 250
    return relays


def protocol_of(world: SmtpWorld, client: Client) -> tuple[str, str]:
    """The protocol and the TLS of a message that is sent now."""
    client.begin()
    client.send(b".\r\n")
    assert client.reply() == 250
    facts = world.messages[-1][0]
    return facts.protocol, facts.tls


@pytest.mark.parametrize(
    ("tls", "plaintext_auth", "offered"),
    [
        ("none", "never", False),
        ("none", "always", True),
        ("none", "networks", False),
        ("starttls", "never", False),
        ("starttls", "always", True),
        ("implicit", "never", True),
    ],
)
def test_auth_is_offered_and_taken_where_the_listener_says(
    tmp_path: Path, tls: str, plaintext_auth: str, offered: bool
) -> None:
    with SmtpWorld(tmp_path, tls=tls, plaintext_auth=plaintext_auth) as world, world.client() as client:
        assert offers_auth(client) is offered
        code = client.say(LOGIN)
        assert code == (235 if offered else 538 if tls == "starttls" else 502)
        assert may_relay(client) is offered


def test_networks_are_those_of_the_listener(tmp_path: Path) -> None:
    with SmtpWorld(tmp_path, plaintext_auth="networks") as world:
        import socket

        raw = socket.create_connection(("127.0.0.1", world.port), 10, ("127.0.0.2", 0))
        client = Client(raw, world)
        assert client.reply() == 220
        assert offers_auth(client)
        raw.close()


def test_protocols_are_named(tmp_path: Path) -> None:
    with SmtpWorld(tmp_path, tls="starttls") as world:
        with world.client(hello=False) as client:
            assert client.say("HELO me.test") == 250
            assert protocol_of(world, client) == ("SMTP", "")
        with world.client() as client:
            assert protocol_of(world, client) == ("ESMTP", "")
            assert client.say(LOGIN) == 235
            assert protocol_of(world, client)[0] == "ESMTPA"
        with world.client() as client:
            assert client.say("STARTTLS") == 220
            client.start_tls()
            client.hello()
            protocol, tls = protocol_of(world, client)
            assert protocol == "ESMTPS" and tls.startswith("TLSv1.")
            assert client.say(LOGIN) == 235
            assert protocol_of(world, client)[0] == "ESMTPSA"


def test_protocols_are_named_on_an_implicit_listener(tmp_path: Path) -> None:
    with SmtpWorld(tmp_path, tls="implicit") as world, world.client() as client:
        assert "STARTTLS" not in client.lines
        protocol, tls = protocol_of(world, client)
        assert protocol == "ESMTPS" and tls.startswith("TLSv1.")
        assert client.say("STARTTLS") == 503
        assert client.say(LOGIN) == 235
        assert protocol_of(world, client)[0] == "ESMTPSA"


def test_a_login_in_clear_does_not_outlive_starttls(tmp_path: Path) -> None:
    with SmtpWorld(tmp_path, tls="starttls") as world, world.client() as client:
        assert client.say(LOGIN) == 235
        assert may_relay(client)
        assert client.say("STARTTLS") == 220
        client.start_tls()
        assert client.say("MAIL FROM:<a@b.test>") == 503
        assert offers_auth(client)
        assert not may_relay(client)
        assert world.logouts[0] == "ann"
        assert protocol_of(world, client)[0] == "ESMTPS"
        assert client.say(LOGIN) == 235
        assert may_relay(client)


def test_one_login_a_session_and_none_within_a_transaction() -> None:
    with SmtpWorld() as world:
        with world.client() as client:
            assert client.say("MAIL FROM:<a@b.test>") == 250
            assert client.say(LOGIN) == 503
            assert client.say("RSET") == 250
            assert client.say(LOGIN) == 235
            assert client.say(LOGIN) == 503
            assert may_relay(client)
            client.hello()
            assert may_relay(client)
        eventually(lambda: len(world.logouts) == 2, "both avatars to go")
        assert sorted(world.logouts) == ["ann", "stranger"]


def test_the_third_wrong_password_ends_the_session() -> None:
    with SmtpWorld() as world, world.client() as client:
        assert [client.say(WRONG) for _ in range(2)] == [535, 535]
        assert client.say("AUTH LOGIN") == 334
        assert client.say("*") == 501
        client.hello()
        assert client.say(WRONG) == 535
        assert client.reply() is None
        assert [name for name, _ in world.events] == ["login-failed"] * 3


@pytest.mark.parametrize("octets", [b"AUTH PLAIN AGFubgBzZWNyZXQ=\r\nMAIL FROM:<a@b.test>\r\n"])
def test_what_is_pipelined_behind_a_login_waits_for_it(octets: bytes) -> None:
    with SmtpWorld() as world, world.client() as client:
        world.hold.add("login")
        client.send(octets)
        world.wait_for("login")
        world.hold.clear()
        world.release("login")
        assert [client.reply(), client.reply()] == [235, 250]
        assert client.say("RCPT TO:<x@elsewhere.test>") == 250


def test_a_portal_that_cannot_answer_is_a_454() -> None:
    with SmtpWorld() as world, world.client() as client:
        world.fail.add("login")
        assert client.say(LOGIN) == 454
        world.fail.clear()
        assert client.say(LOGIN) == 235


def test_passwords_are_in_no_log_and_in_no_event() -> None:
    observed: list[dict[str, Any]] = []
    from twisted.logger import formatEvent, globalLogPublisher

    globalLogPublisher.addObserver(observed.append)
    try:
        with SmtpWorld() as world, world.client() as client:
            client.say(WRONG)
            world.fail.add("login")
            client.say(LOGIN)
            world.fail.clear()
            client.say("AUTH LOGIN")
            client.say(base64.b64encode(b"ann").decode())
            client.say(base64.b64encode(b"secret").decode())
            text = repr(world.events) + repr(world.facts)
        text += "".join(f"{formatEvent(event)} {event.get('log_failure')!r}" for event in observed)
        text += "".join(event["log_failure"].getTraceback() for event in observed if event.get("log_failure"))
    finally:
        globalLogPublisher.removeObserver(observed.append)
    for secret in ("secret", "wrong", "AGFubgB", base64.b64encode(b"secret").decode()):
        assert secret not in text
