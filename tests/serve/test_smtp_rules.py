# SPDX-License-Identifier: MIT
"""Rules of SMTP that no dialogue can show, because they are about memory, about pieces, or about somebody's avatar."""

from __future__ import annotations

import time
from typing import Any

import pytest
from twisted.cred.checkers import AllowAnonymousAccess
from twisted.cred.portal import IRealm, Portal
from twisted.mail.interfaces import IMessageDelivery
from twisted.mail.smtp import SMTPServerError
from zope.interface import implementer

from polarismail.serve.smtp import ESMTPFactory
from polarismail.wire.smtp_states import ServerSettings
from tests.reactor import reactor, run
from tests.serve.smtp_world import Client, SmtpWorld


@pytest.mark.parametrize("length", [16_384, 65_536, 70_000, 1_000_000])
@pytest.mark.parametrize("pause", [0.0, 0.02])
def test_no_part_of_a_content_is_a_command(length: int, pause: float) -> None:
    """However long its lines are, and however they come."""
    with SmtpWorld() as world, world.client() as client:
        client.begin()
        client.send(b"Subject: x\r\n\r\n")
        for at in range(0, length, 100_000):
            client.send(b"x" * min(100_000, length - at))
            time.sleep(pause)
        client.send(b"\r\nMAIL FROM:<c@d.test>\r\nRCPT TO:<bob@here.test>\r\nDATA\r\n")
        time.sleep(pause)
        client.send(b"smuggled\r\n.\r\n")
        assert client.reply() == (250 if length <= 65_536 else 552)
        assert client.say("NOOP") == 250
        assert len(world.messages) == (length <= 65_536)
        assert len(world.facts) == 1


def test_an_endless_line_costs_no_memory_and_one_reply() -> None:
    settings = ServerSettings(max_discarded_line_octets=10**7)
    with SmtpWorld(engine=settings) as world, world.client() as client:
        (connection,) = world.factory.connections
        for _ in range(40):
            client.send(b"x" * 20_000)
            assert connection.engine.buffered <= 65536
        client.send(b"\r\nNOOP\r\n")
        assert [client.reply(), client.reply()] == [500, 250]


@pytest.mark.parametrize(
    "verb",
    ["__INIT__", "_PARSE_MAIL", "NEXT_EVENT", "STATE", "do_", "DO_QUIT", "\u017fTARTTLS", "QU\u0130T", "%s", "{0}"],
)
def test_verbs_are_those_of_the_table(verb: str) -> None:
    with SmtpWorld() as world, world.client() as client:
        assert client.say(verb) == 500
        assert client.say("NOOP") == 250
        assert not world.logged


def test_everything_is_answered_once_whatever_is_held_back() -> None:
    """Each stage answers late; the whole dialogue was sent as far as RFC 2920 lets it be."""
    with SmtpWorld() as world, world.client() as client:
        world.hold |= {"login", "mail", "rcpt", "commit"}
        client.send(b"MAIL FROM:<a@b.test>\r\nRCPT TO:<bob@here.test>\r\nRCPT TO:<unknown@here.test>\r\nDATA\r\n")
        for stage in ("login", "mail", "rcpt"):
            world.wait_for(stage)
            world.release(stage)
        assert [client.reply() for _ in range(4)] == [250, 250, 550, 354]
        client.send(b"Subject: x\r\n\r\n.\r\nMAIL FROM:<>\r\nRSET\r\nNOOP\r\nVRFY x\r\nQUIT\r\n")
        world.wait_for("commit")
        world.release("commit")
        world.wait_for("mail")
        world.release("mail")
        assert [client.reply() for _ in range(7)] == [250, 250, 250, 250, 252, 221, None]


@implementer(IMessageDelivery)
class Refusing:
    """Refuses everybody, in every way that an avatar can."""

    def __init__(self, refusal: Exception) -> None:
        self.refusal = refusal

    def receivedHeader(self, helo: Any, origin: Any, recipients: Any) -> bytes:
        return b""

    def validateFrom(self, helo: Any, origin: Any) -> Any:
        return origin

    def validateTo(self, user: Any) -> Any:
        raise self.refusal


@implementer(IRealm)
class Realm:
    def __init__(self, refusal: Exception) -> None:
        self.refusal = refusal

    def requestAvatar(self, avatarId: Any, mind: Any, *interfaces: Any) -> Any:
        return IMessageDelivery, Refusing(self.refusal), lambda: None


@pytest.mark.parametrize(
    ("refusal", "code", "text"),
    [
        (SMTPServerError(452, "no room"), 452, "4.0.0 no room"),
        (SMTPServerError(550, b"caf\xe9\r\n250 fine"), 550, "5.0.0 caf\ufffd?"),
        (SMTPServerError(250, b"fine"), 451, "4.3.0 *"),
        (SMTPServerError(999, b"what"), 451, "4.3.0 *"),
        (ValueError("broken"), 451, "4.3.0 *"),
    ],
)
def test_what_an_avatar_refuses_with(refusal: Exception, code: int, text: str) -> None:
    import socket

    factory = ESMTPFactory(Portal(Realm(refusal), [AllowAnonymousAccess()]), reactor=reactor)
    port = run(reactor.listenTCP, 0, factory, interface="127.0.0.1")
    try:
        with socket.create_connection(("127.0.0.1", port.getHost().port), 10) as raw:
            client = Client(raw, SmtpWorld())
            assert client.reply() == 220
            client.hello()
            assert client.say("MAIL FROM:<a@b.test>") == 250
            assert client.say("RCPT TO:<x@y.test>") == code
            assert client.lines[0] == text or (text.endswith("*") and client.lines[0].startswith(text[:-1]))
            assert client.say("NOOP") == 250
    finally:
        run(port.stopListening)
