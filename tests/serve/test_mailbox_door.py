# SPDX-License-Identifier: MIT
"""A portal whose avatars are plain Twisted mailboxes works behind the POP3 server."""

from __future__ import annotations

import io
import poplib
from typing import Any

import pytest
from twisted.cred.checkers import InMemoryUsernamePasswordDatabaseDontUse
from twisted.cred.portal import IRealm, Portal
from twisted.internet.defer import Deferred, succeed
from twisted.mail.interfaces import IMailboxPOP3
from zope.interface import implementer

from polarismail.net.listeners import Listener
from polarismail.serve.pop3 import Pop3Factory
from tests.reactor import reactor, run


@implementer(IMailboxPOP3)
class Mailbox:
    """Three messages in memory. `calls` is what was asked that changes anything."""

    def __init__(self) -> None:
        self.messages = [b"Subject: %d\r\n\r\n.body\r\n" % at for at in range(3)]
        self.calls: list[Any] = []

    def listMessages(self, index: int | None = None) -> Deferred[list[int]]:
        assert index is None
        return succeed([len(message) for message in self.messages])

    def getMessage(self, index: int) -> io.BytesIO:
        return io.BytesIO(self.messages[index])

    def getUidl(self, index: int) -> bytes:
        return b"unique %d" % index if index == 2 else b"unique-%d" % index

    def deleteMessage(self, index: int) -> None:
        self.calls.append(index)
        if index == 1:
            raise OSError("it stays")

    def undeleteMessages(self) -> None:
        raise AssertionError("nothing is deleted before QUIT")

    def sync(self) -> None:
        self.calls.append("sync")


@implementer(IRealm)
class Realm:
    """Everybody has the same mailbox."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.mailbox = mailbox
        self.logouts = 0

    def requestAvatar(self, avatarId: Any, mind: Any, *interfaces: Any) -> Any:
        assert IMailboxPOP3 in interfaces
        return IMailboxPOP3, self.mailbox, self.logout

    def logout(self) -> None:
        self.logouts += 1


@pytest.fixture
def served() -> Any:
    realm = Realm(Mailbox())
    portal = Portal(realm, [InMemoryUsernamePasswordDatabaseDontUse(anna=b"secret")])
    listener = Listener("pop3", 0, "pop3", "none", "127.0.0.1", "always")
    factory = Pop3Factory(portal, listener=listener, hostname="localhost", reactor=reactor)
    port = run(lambda: reactor.listenTCP(0, factory, interface="127.0.0.1"))
    client = poplib.POP3("127.0.0.1", port.getHost().port, timeout=20)
    client.user("anna")
    client.pass_("secret")
    yield client, realm
    client.close()
    run(port.stopListening)


def test_messages_are_read_and_deleted_at_quit(served: Any) -> None:
    client, realm = served
    assert client.stat() == (3, 63)
    assert client.retr(1)[1] == [b"Subject: 0", b"", b".body"]
    assert client.top(2, 0)[1] == [b"Subject: 1", b""]
    first, second, third = (line.split()[1] for line in client.uidl()[1])
    assert (first, second) == (b"unique-0", b"unique-1") and len(third) == 40
    client.dele(1)
    client.rset()
    client.dele(3)
    assert realm.mailbox.calls == []
    client.quit()
    assert realm.mailbox.calls == [2, "sync"]
    assert realm.logouts == 1


def test_what_stays_is_said(served: Any) -> None:
    client, realm = served
    client.dele(1)
    client.dele(2)
    with pytest.raises(poplib.error_proto, match="not removed"):
        client.quit()
    assert realm.mailbox.calls == [0, 1, "sync"]
