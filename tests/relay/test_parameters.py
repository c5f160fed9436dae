# SPDX-License-Identifier: MIT
"""What MAIL and RCPT say to a next hop, by what it offers: DSN, SMTPUTF8, MT-PRIORITY, LIMITS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from attrs import evolve
from twisted.internet.defer import succeed

from polarismail.relay.session import Session
from polarismail.store.interfaces import QueuedMessage, QueuedRecipient
from polarismail.values.address import Mailbox
from polarismail.values.envelope import NO_DSN_REQUEST, DsnRequest, MailOptions
from polarismail.values.reply import Reply
from polarismail.wire.smtp_client import read_limits
from tests.reactor import run
from tests.relay.scripted import Peer, Server
from tests.relay.test_session import message, no_read, open_to

JOERG = Mailbox("jörg", "bücher.test")
TAKEN = Reply(250, (2, 0, 0), "queued")
BASIC = (b"PIPELINING", b"8BITMIME")
UTF8_HEADER = "Subject: grün\r\n\r\nx\r\n".encode()
UTF8_BODY = "Subject: x\r\n\r\ngrün\r\n".encode()


def recipient(
    whole: QueuedMessage, path: Mailbox, at: int = 0, original: Mailbox | None = None, dsn: DsnRequest = NO_DSN_REQUEST
) -> QueuedRecipient:
    return QueuedRecipient(whole, at, path, original or path, "example.net", None, 0, 0, 0, 1, dsn)


ZOE = Mailbox("zoe", "example.net")


def said(
    extensions: Sequence[bytes], whole: QueuedMessage, to: Sequence[QueuedRecipient], read: Any = no_read
) -> tuple[list[str], list[Reply]]:
    """The MAIL and RCPT lines of one message, and the verdicts."""
    lines: list[str] = []

    def script(peer: Peer) -> None:
        peer.greet(*extensions)
        while (line := peer.line()) != b"QUIT":
            if line == b"DATA":
                peer.say(b"354 go\r\n")
                peer.until(b"\r\n.\r\n")
                peer.say(b"250 2.0.0 queued\r\n")
            else:
                if line != b"RSET":
                    lines.append(line.decode())
                peer.say(b"250 2.1.0 ok\r\n")

    async def send(server: Server) -> list[Reply]:
        session = await open_to(server)
        replies = await session.send(whole, to, read)
        await session.quit()
        return replies

    with Server(script) as server:
        replies = run(send, server)
    return lines, replies


def test_dsn_parameters_go_on_as_they_came() -> None:
    whole = message(ret="HDRS", envid="QQ+2B31")
    to = [
        recipient(whole, ZOE, 0, dsn=DsnRequest("SUCCESS,delay", "rfc822;Zoe+2Bx@Old.test")),
        recipient(whole, Mailbox("yan", "example.net"), 1),
        recipient(whole, Mailbox("xi", "example.net"), 2, Mailbox("a+b", "old.test"), DsnRequest("NEVER")),
        recipient(whole, Mailbox("wo", "example.net"), 3, JOERG),
        recipient(whole, Mailbox("vi", "example.net"), 4, dsn=DsnRequest(None, "utf-8;jörg@x.test")),
        recipient(whole, Mailbox("postmaster", "example.net"), 5, Mailbox("postmaster", "")),
    ]
    lines, replies = said((*BASIC, b"DSN"), whole, to)
    assert replies == [TAKEN] * 6
    assert lines == [
        "MAIL FROM:<a@example.org> RET=HDRS ENVID=QQ+2B31",
        "RCPT TO:<zoe@example.net> NOTIFY=SUCCESS,delay ORCPT=rfc822;Zoe+2Bx@Old.test",
        "RCPT TO:<yan@example.net>",
        # Behind an alias, what the sender had said; nothing is invented where its own word goes on.
        "RCPT TO:<xi@example.net> NOTIFY=NEVER ORCPT=rfc822;a+2Bb@old.test",
        r"RCPT TO:<wo@example.net> ORCPT=utf-8;j\x{F6}rg@b\x{FC}cher.test",
        r"RCPT TO:<vi@example.net> ORCPT=utf-8;j\x{F6}rg@x.test",
        "RCPT TO:<postmaster@example.net>",
    ]


def test_who_does_not_offer_dsn_hears_nothing_of_it() -> None:
    whole = message(ret="FULL", envid="x", options=MailOptions(priority=3))
    lines, replies = said(BASIC, whole, [recipient(whole, ZOE, dsn=DsnRequest("SUCCESS", "rfc822;a@b.test"))])
    assert lines == ["MAIL FROM:<a@example.org>", "RCPT TO:<zoe@example.net>"] and replies == [TAKEN]


@pytest.mark.parametrize(("priority", "word"), [(3, " MT-PRIORITY=3"), (-9, " MT-PRIORITY=-9"), (0, "")])
def test_a_priority_goes_on(priority: int, word: str) -> None:
    whole = message(options=MailOptions(priority=priority, hold_until=5.0))
    assert (
        said((*BASIC, b"MT-PRIORITY MIXER"), whole, [recipient(whole, ZOE)])[0][0] == f"MAIL FROM:<a@example.org>{word}"
    )


def test_smtputf8_goes_on_as_it_came() -> None:
    whole = evolve(message(UTF8_HEADER, smtputf8=True), reverse_path=JOERG)
    to = [recipient(whole, JOERG, dsn=DsnRequest(None, "utf-8;jörg@x.test"))]
    lines, replies = said((*BASIC, b"SMTPUTF8", b"DSN"), whole, to)
    assert lines == [
        "MAIL FROM:<jörg@bücher.test> BODY=8BITMIME SMTPUTF8",
        "RCPT TO:<jörg@bücher.test> ORCPT=utf-8;jörg@x.test",
    ]
    assert replies == [TAKEN]
    plain = message()
    assert said((*BASIC, b"SMTPUTF8"), plain, [recipient(plain, ZOE)])[0] == [
        "MAIL FROM:<a@example.org>",
        "RCPT TO:<zoe@example.net>",
    ]


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize(
    ("sender", "to", "content", "outcome"),
    [
        (ZOE, ZOE, b"Subject: x\r\n\r\nx\r\n", "MAIL FROM:<zoe@example.net>"),
        (ZOE, Mailbox("zoe", "bücher.test"), UTF8_BODY, "MAIL FROM:<zoe@example.net> BODY=8BITMIME"),
        (Mailbox("zoe", "bücher.test"), ZOE, b"x: x\r\n\r\n", "MAIL FROM:<zoe@xn--bcher-kva.test>"),
        (JOERG, ZOE, b"Subject: x\r\n\r\nx\r\n", (5, 6, 7)),
        (ZOE, JOERG, b"Subject: x\r\n\r\nx\r\n", (5, 6, 7)),
        (ZOE, ZOE, UTF8_HEADER, (5, 6, 9)),
        (ZOE, Mailbox("zoe", "bücher.test"), UTF8_HEADER, (5, 6, 9)),
    ],
)
def test_without_smtputf8_there_only_what_is_ascii_goes(
    sender: Mailbox, to: Mailbox, content: bytes, outcome: Any, inline: bool
) -> None:
    whole = evolve(message(content, smtputf8=True), reverse_path=sender, inline=content if inline else None)
    lines, (reply,) = said(
        BASIC, whole, [recipient(whole, to)], lambda offset, octets: succeed(content[offset : offset + octets])
    )
    if isinstance(outcome, str):
        expected = outcome if inline or "BODY" in outcome else f"{outcome} BODY=8BITMIME"
        assert reply == TAKEN and lines == [expected, f"RCPT TO:<{to.in_ascii}>"]
    else:
        assert (reply.code, reply.status, lines) == (554 if outcome == (5, 6, 9) else 553, outcome, [])


def test_an_alias_may_lead_beyond_ascii() -> None:
    whole = message()
    to = [recipient(whole, Mailbox("jörg", "example.net"), 0, ZOE), recipient(whole, ZOE, 1)]
    lines, replies = said((*BASIC, b"SMTPUTF8"), whole, to)
    assert lines[0] == "MAIL FROM:<a@example.org> SMTPUTF8" and replies == [TAKEN] * 2
    lines, replies = said(BASIC, whole, to)
    assert lines == ["MAIL FROM:<a@example.org>", "RCPT TO:<zoe@example.net>"]
    assert replies[0].status == (5, 6, 7) and replies[1] == TAKEN


def test_limits_of_the_next_hop_are_kept() -> None:
    seen: list[Session] = []

    async def look(server: Server) -> None:
        seen.append(session := await open_to(server))
        await session.quit()

    def script(peer: Peer) -> None:
        peer.greet(*BASIC, b"LIMITS RCPTMAX=2 MAILMAX=7 OTHER=x")
        peer.everything()

    with Server(script) as server:
        run(look, server)
    assert (seen[0].max_recipients, seen[0].max_transactions) == (2, 7)
    whole = message()
    lines, replies = said((*BASIC, b"LIMITS RCPTMAX=2"), whole, [recipient(whole, ZOE, at) for at in range(5)])
    assert replies == [TAKEN] * 5
    assert [line[:4] for line in lines] == ["MAIL", "RCPT", "RCPT", "MAIL", "RCPT", "RCPT", "MAIL", "RCPT"]


def test_domains_of_one_transaction_are_limited_where_the_next_hop_says_so() -> None:
    whole = message()
    to = [recipient(whole, Mailbox("zoe", f"d{at % 2}.test"), at) for at in range(5)]
    lines, replies = said((*BASIC, b"LIMITS RCPTDOMAINMAX=1 RCPTMAX=2"), whole, to)
    assert replies == [TAKEN] * 5
    assert [line.rpartition("@")[2] for line in lines] == [
        *("example.org>", "d0.test>", "d0.test>"),
        *("example.org>", "d1.test>", "d1.test>"),
        *("example.org>", "d0.test>"),
    ]


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("", {}),
        ("RCPTMAX=10 mailmax=5", {"RCPTMAX": 10, "MAILMAX": 5}),
        ("RCPTMAX=0 MAILMAX=-1 X", {}),
        ("RCPTMAX=99999999999 MAILMAX=٣", {}),
        ("A=1 " * 100_000, {"A": 1}),
    ],
)
def test_limits_that_make_no_sense_say_nothing(text: str, limits: dict[str, int]) -> None:
    assert read_limits({"LIMITS": text}) == limits
