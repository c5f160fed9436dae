# SPDX-License-Identifier: MIT
"""ESMTPFactory on anybody's portal: an avatar that provides twisted.mail's IMessageDelivery receives mail through it."""

from __future__ import annotations

import smtplib
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from twisted.cred.checkers import AllowAnonymousAccess, InMemoryUsernamePasswordDatabaseDontUse
from twisted.cred.portal import IRealm, Portal
from twisted.internet.defer import Deferred, fail, succeed
from twisted.mail.interfaces import IMessageDelivery, IMessageSMTP
from twisted.mail.smtp import SMTPBadRcpt, SMTPServerError
from zope.interface import implementer

from polarismail.net.listeners import Listener
from polarismail.serve.smtp import ESMTPFactory
from tests.reactor import reactor, run


@implementer(IMessageSMTP)
class Lines:
    """One message as its lines."""

    def __init__(self, store: list[Any], user: Any, fails: bool) -> None:
        self.lines: list[bytes] = []
        self.store, self.user, self.fails = store, user, fails

    def lineReceived(self, line: bytes) -> None:
        self.lines.append(line)

    def eomReceived(self) -> Deferred[None]:
        if self.fails:
            return fail(RuntimeError("the disk is full"))
        self.store.append((str(self.user), self.lines))
        return succeed(None)

    def connectionLost(self) -> None:
        self.store.append("lost")


@implementer(IMessageDelivery)
class Delivery:
    """Takes mail for everybody but nobody@."""

    def __init__(self, store: list[Any], name: str) -> None:
        self.store, self.name = store, name

    def receivedHeader(self, helo: Any, origin: Any, recipients: Any) -> bytes:
        return b"Received: by " + self.name.encode()

    def validateFrom(self, helo: Any, origin: Any) -> Any:
        if b"bad" in str(origin).encode():
            raise SMTPServerError(550, b"not you")
        return origin

    def validateTo(self, user: Any) -> Any:
        if "nobody" in str(user):
            raise SMTPBadRcpt(user)
        return lambda: Lines(self.store, user, "fails" in str(user))


@implementer(IRealm)
class Realm:
    def __init__(self, store: list[Any]) -> None:
        self.store = store

    def requestAvatar(self, avatar_id: Any, mind: Any, *interfaces: Any) -> Any:
        assert IMessageDelivery in interfaces
        name = "anonymous" if avatar_id == () else avatar_id.decode()
        return IMessageDelivery, Delivery(self.store, name), lambda: None


@pytest.fixture
def served() -> Iterator[tuple[int, list[Any]]]:
    """A listening port, and what its avatars have taken."""
    store: list[Any] = []
    passwords = InMemoryUsernamePasswordDatabaseDontUse(ann=b"secret")
    portal = Portal(Realm(store), [passwords, AllowAnonymousAccess()])
    listener = Listener("test", 0, "mx", plaintext_auth="always")
    factory = ESMTPFactory(portal, listener=listener, hostname="app.test")
    port = run(reactor.listenTCP, 0, factory, interface="127.0.0.1")
    yield port.getHost().port, store
    run(port.stopListening)


def test_message_reaches_the_avatar(served: tuple[int, list[Any]]) -> None:
    port, store = served
    with smtplib.SMTP("127.0.0.1", port, timeout=10) as client:
        client.sendmail("a@b.test", ["x@y.test", "z@y.test"], "Subject: hi\r\n\r\n.dot\r\nend\r\n")
    assert store == [
        (user, [b"Received: by anonymous", b"Subject: hi", b"", b".dot", b"end"]) for user in ("x@y.test", "z@y.test")
    ]


def test_a_long_message_is_fed_whole_and_others_have_their_turn(served: tuple[int, list[Any]]) -> None:
    port, store = served
    lines = [f"line {number}" for number in range(5000)]
    with smtplib.SMTP("127.0.0.1", port, timeout=30) as client, smtplib.SMTP("127.0.0.1", port, timeout=30) as other:
        client.sendmail("a@b.test", ["x@y.test"], "\r\n".join(lines) + "\r\n")
        assert other.noop()[0] == 250
    assert [line.decode() for line in store[0][1][1:]] == lines


def test_login_goes_through_a_checker_that_knows_only_names_and_passwords(served: tuple[int, list[Any]]) -> None:
    port, store = served
    with smtplib.SMTP("127.0.0.1", port, timeout=10) as client:
        with pytest.raises(smtplib.SMTPAuthenticationError):
            client.login("ann", "wrong")
        client.login("ann", "secret")
        client.sendmail("a@b.test", ["x@y.test"], "Subject: hi\r\n\r\n")
    assert store[0][1][0] == b"Received: by ann"


def test_refusals_of_the_contract_become_replies(served: tuple[int, list[Any]]) -> None:
    port, store = served
    with smtplib.SMTP("127.0.0.1", port, timeout=10) as client:
        client.ehlo("x")
        assert client.mail("bad@b.test") == (550, b"5.0.0 not you")
        assert client.mail("a@b.test")[0] == 250
        assert client.rcpt("nobody@y.test")[0] == 550
        assert client.rcpt("fails@y.test")[0] == 250
        assert client.data("Subject: hi\r\n\r\nx\r\n")[0] == 451
    assert store == []


def test_everything_at_once_is_answered_in_order(served: tuple[int, list[Any]]) -> None:
    """Pipelined to the last octet, with commands that are performed asynchronously: one reply for each, in order."""
    port, store = served
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        file = client.makefile("rb")
        assert file.readline().startswith(b"220 app.test")
        client.sendall(b"EHLO me.test\r\n")
        while file.readline()[3:4] == b"-":
            pass
        client.sendall(b"MAIL FROM:<a@b.test>\r\nRCPT TO:<nobody@y.test>\r\nRCPT TO:<x@y.test>\r\nDATA\r\n")
        assert [file.readline()[:3] for _ in range(4)] == [b"250", b"550", b"250", b"354"]
        client.sendall(b"Subject: 1\r\n\r\n1\r\n.\r\nMAIL FROM:<a@b.test>\r\nRCPT TO:<x@y.test>\r\nBOGUS\r\nQUIT\r\n")
        assert [file.readline()[:3] for _ in range(5)] == [b"250", b"250", b"250", b"500", b"221"]
        assert file.readline() == b""
    assert len(store) == 1


def test_ten_thousand_pipelined_commands_are_not_ten_thousand_frames(served: tuple[int, list[Any]]) -> None:
    port, _ = served
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        file = client.makefile("rb")
        file.readline()
        client.sendall(b"EHLO me.test\r\n")
        while file.readline()[3:4] == b"-":
            pass
        for _ in range(90):
            client.sendall(b"NOOP\r\n")
            assert file.readline()[:3] == b"250"
        client.sendall(b"NOOP\r\n" * 10000)
        codes = [line[:3] for line in file]
        assert codes[-1] == b"421"
        assert len(codes) < 30
