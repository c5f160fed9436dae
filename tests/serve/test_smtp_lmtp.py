# SPDX-License-Identifier: MIT
"""LMTP over sockets: as many replies as accepted recipients, and what a reception says of each."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import Deferred

from polarismail.net.listeners import Listener
from polarismail.serve.smtp import ESMTPFactory
from polarismail.values import reply as replies
from tests.dialogues.runner import LivePeer, parse_dialogue, play
from tests.reactor import reactor, run
from tests.serve.smtp_world import Client, SmtpWorld
from tests.serve.test_smtp_factory import AllowAnonymousAccess, Portal, Realm

EACH = """---
S: 220 app.test LMTP *
C: LHLO front.test
S~ 250
C: MAIL FROM:<a@b.test>
C: RCPT TO:<fails@y.test>
C: RCPT TO:<nobody@y.test>
C: RCPT TO:<x@y.test>
C: BDAT 6 LAST
C: a: b
S: 250 *
S: 250 *
S: 550 *
S: 250 *
S: 451 4.3.0 *
S: 250 2.0.0 OK
"""


def begin(client: Client, *recipients: str) -> list[int | None]:
    client.send(b"MAIL FROM:<a@b.test>\r\n" + b"".join(f"RCPT TO:<{each}>\r\n".encode() for each in recipients))
    assert client.reply() == 250
    return [client.reply() for _ in recipients]


def lhlo(client: Client) -> None:
    assert client.say("LHLO front.test") == 250


def test_a_reply_for_each_recipient_in_their_order() -> None:
    with SmtpWorld(role="lmtp") as world, world.client(hello=False) as client:
        lhlo(client)
        codes = begin(client, "bob@here.test", "unknown@here.test", "all@here.test", "bob@here.test", "x@away.test")
        assert codes == [250, 550, 250, 250, 550]
        assert client.say("DATA") == 354
        client.send(b"a: b\r\n.\r\nNOOP\r\n")
        assert [client.reply() for _ in range(4)] == [250] * 4
        facts, envelope, _ = world.messages[0]
        assert facts.protocol == "LMTP" and facts.is_lmtp
        assert [str(recipient.forward_path) for recipient in envelope.recipients] == ["bob@here.test", "eve@here.test"]
        begin(client, "bob@here.test", "bob@here.test")
        client.send(b"BDAT 6 LAST\r\na: b\r\nQUIT\r\n")
        assert [client.reply() for _ in range(4)] == [250, 250, 221, None]


@pytest.mark.parametrize(
    ("outcome", "codes"),
    [
        (replies.TOO_BIG, [552, 552, 552]),
        ((replies.OK, replies.UNKNOWN_RECIPIENT), [250, 550, 550]),
        ((replies.UNKNOWN_RECIPIENT, replies.TRY_AGAIN), [550, 451, 451]),
        ((replies.OK, replies.OK), [250, 250, 250]),
    ],
)
def test_verdicts_of_a_reception(outcome: Any, codes: list[int]) -> None:
    with SmtpWorld(role="lmtp") as world, world.client(hello=False) as client:
        lhlo(client)
        world.hold.add("commit")
        begin(client, "bob@here.test", "all@here.test", "eve@here.test")
        client.send(b"BDAT 6 LAST\r\na: b\r\n")
        world.wait_for("commit")
        world.release("commit", outcome)
        assert [client.reply() for _ in range(3)] == codes
        world.hold.clear()
        assert begin(client, "bob@here.test") == [250]


def test_doubt_is_told_for_each_and_ends_the_session() -> None:
    with SmtpWorld(role="lmtp") as world, world.client(hello=False) as client:
        lhlo(client)
        world.hold.add("commit")
        begin(client, "bob@here.test", "eve@here.test")
        client.send(b"BDAT 6 LAST\r\na: b\r\n")
        world.wait_for("commit")
        world.release("commit", replies.NOT_QUEUED)
        assert [client.reply() for _ in range(3)] == [451, 451, None]


def test_content_that_is_refused_is_refused_for_each() -> None:
    with SmtpWorld(role="lmtp") as world, world.client(hello=False) as client:
        lhlo(client)
        begin(client, "bob@here.test", "eve@here.test")
        client.send(b"DATA\r\n")
        assert client.reply() == 354
        client.send(b"\0\r\n.\r\n")
        assert [client.reply(), client.reply()] == [554, 554]
        assert world.drafts[0].abandoned == 1


def test_a_login_shows_in_the_protocol() -> None:
    with SmtpWorld(role="lmtp") as world, world.client(hello=False) as client:
        lhlo(client)
        assert client.say("AUTH PLAIN AGFubgBzZWNyZXQ=") == 235
        assert begin(client, "x@away.test") == [250]
        assert world.facts[0].protocol == "LMTPA"


def test_each_message_of_twisteds_contract_has_its_own_verdict() -> None:
    store: list[Any] = []
    listener = Listener("test", 0, "lmtp")
    factory = ESMTPFactory(Portal(Realm(store), [AllowAnonymousAccess()]), listener=listener, hostname="app.test")
    port = run(reactor.listenTCP, 0, factory, interface="127.0.0.1")
    try:
        with LivePeer("127.0.0.1", port.getHost().port) as peer:
            play(parse_dialogue(EACH, "each"), peer)
        assert [user for user, _ in store] == ["x@y.test"]
    finally:
        stopped: Deferred[None] | None = run(port.stopListening)
        assert stopped is None
