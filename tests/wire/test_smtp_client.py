# SPDX-License-Identifier: MIT
"""The client engine: pipelining by two cursors, verdicts, and what breaks a connection."""

from __future__ import annotations

import pytest

from polarismail.values.reply import Reply
from polarismail.wire.smtp_client import (
    MAX_LINE_OCTETS,
    MAX_LINES,
    Answered,
    Broken,
    Finished,
    SendContent,
    SmtpClient,
    Step,
    Transaction,
)

PIPELINED = b"250-mx.example.org at your service\r\n250-PIPELINING\r\n250-SIZE 1000000\r\n250 8BITMIME\r\n"
LOCK_STEP = b"250-mx.example.org\r\n250 8BITMIME\r\n"


def introduced(ehlo: bytes = PIPELINED) -> SmtpClient:
    client = SmtpClient("client.example")
    client.receive(b"220 mx.example.org ESMTP\r\n")
    assert client.next_event() == Answered(Step.GREETING, Reply(220, None, "mx.example.org ESMTP"))
    client.ehlo()
    assert client.output() == b"EHLO client.example\r\n"
    client.receive(ehlo)
    assert isinstance(client.next_event(), Answered)
    assert client.is_idle
    return client


def begun(*recipients: bytes, ehlo: bytes = PIPELINED) -> tuple[SmtpClient, Transaction]:
    client = introduced(ehlo)
    transaction = Transaction(b"<a@example.org>", recipients or (b"<b@example.net>",))
    client.begin(transaction)
    return client, transaction


def codes(transaction: Transaction) -> list[int]:
    return [verdict.code if verdict else 0 for verdict in transaction.verdicts]


def test_extensions_are_read() -> None:
    client = introduced()
    assert client.extensions == {"PIPELINING": "", "SIZE": "1000000", "8BITMIME": ""}
    assert client.remote_name == "mx.example.org"


def test_one_group_where_pipelining_is_offered() -> None:
    client, transaction = begun(b"<b@example.net>", b"<c@example.net>")
    assert client.output() == (
        b"MAIL FROM:<a@example.org>\r\nRCPT TO:<b@example.net>\r\nRCPT TO:<c@example.net>\r\nDATA\r\n"
    )
    client.receive(b"250 2.1.0 ok\r\n250 2.1.5 ok\r\n550 5.1.1 who\r\n354 go\r\n")
    assert client.next_event() == SendContent()
    assert client.next_event() is None
    assert client.content(b".a\r\n") + client.end_content() == b"..a\r\n.\r\n"
    client.receive(b"250 2.0.0 queued\r\n")
    assert client.next_event() == Finished(transaction)
    assert codes(transaction) == [250, 550]
    assert client.is_idle


def test_one_by_one_without_pipelining() -> None:
    client, transaction = begun(b"<b@example.net>", b"<c@example.net>", ehlo=LOCK_STEP)
    said = []
    for answer in (b"250 ok\r\n", b"250 ok\r\n", b"451 later\r\n", b"354 go\r\n"):
        said.append(client.output())
        client.receive(answer)
        event = client.next_event()
    assert said == [
        b"MAIL FROM:<a@example.org>\r\n",
        b"RCPT TO:<b@example.net>\r\n",
        b"RCPT TO:<c@example.net>\r\n",
        b"DATA\r\n",
    ]
    assert event == SendContent()
    assert client.end_content() == b".\r\n"
    client.receive(b"554 no\r\n")
    assert client.next_event() == Finished(transaction)
    assert codes(transaction) == [554, 451]


def test_without_recipients_nothing_more_is_said_and_the_next_one_resets() -> None:
    client, transaction = begun(ehlo=LOCK_STEP)
    client.output()
    client.receive(b"250 ok\r\n")
    assert client.next_event() is None
    client.output()
    client.receive(b"550 5.1.1 no\r\n")
    assert client.next_event() == Finished(transaction)
    assert client.output() == b""
    client.begin(Transaction(b"<>", [b"<d@example.net>"]))
    assert client.output() == b"RSET\r\n"
    client.receive(b"250 ok\r\n")
    assert client.next_event() is None
    assert client.output() == b"MAIL FROM:<>\r\n"


def test_a_reset_joins_the_group_where_pipelining_is_offered() -> None:
    client, transaction = begun()
    client.output()
    client.receive(b"250 ok\r\n550 no\r\n554 no valid recipients\r\n")
    assert client.next_event() == Finished(transaction)
    assert codes(transaction) == [550]
    again = Transaction(b"<>", [b"<d@example.net>", b"<e@example.net>"])
    client.begin(again)
    assert client.output().startswith(b"RSET\r\nMAIL FROM:<>\r\nRCPT TO:<d@example.net>\r\n")
    client.receive(b"250 ok\r\n250 ok\r\n250 ok\r\n450 not now\r\n354 go\r\n")
    assert client.next_event() == SendContent()
    client.end_content()
    client.receive(b"250 ok\r\n")
    assert client.next_event() == Finished(again)
    assert codes(again) == [250, 450]
    client.begin(Transaction(b"<>", [b"<d@example.net>"]))
    assert client.output().startswith(b"MAIL"), "a finished transaction leaves nothing to reset"


def test_a_refused_sender_is_everybodys_verdict() -> None:
    client, transaction = begun(b"<b@example.net>", b"<c@example.net>")
    client.receive(b"550 5.7.1 not you\r\n503 no\r\n503 no\r\n503 no\r\n")
    assert client.next_event() == Finished(transaction)
    assert codes(transaction) == [550, 550]
    client, transaction = begun(ehlo=LOCK_STEP)
    client.output()
    client.receive(b"421 bye\r\n")
    assert isinstance(client.next_event(), Broken)
    assert codes(transaction) == [421]


def test_354_though_nobody_was_accepted_gets_an_empty_message() -> None:
    client, transaction = begun()
    client.output()
    client.receive(b"250 ok\r\n550 no\r\n354 go\r\n")
    assert client.next_event() is None
    assert client.output() == b".\r\n"
    client.receive(b"250 ok\r\n")
    assert client.next_event() == Finished(transaction)
    assert codes(transaction) == [550], "the reply to an empty message is nobody's verdict"


def test_a_recipient_without_a_sender_breaks_before_any_content() -> None:
    client, transaction = begun()
    client.receive(b"550 no\r\n250 ok\r\n354 go\r\n")
    event = client.next_event()
    assert isinstance(event, Broken) and event.transaction is transaction
    assert codes(transaction) == [550]
    assert not client.wants_content


def test_data_refused_is_the_verdict_of_the_accepted() -> None:
    client, transaction = begun(b"<b@example.net>", b"<c@example.net>")
    client.receive(b"250 ok\r\n250 ok\r\n550 no\r\n451 4.3.0 no disk\r\n")
    assert client.next_event() == Finished(transaction)
    assert codes(transaction) == [451, 550]


@pytest.mark.parametrize("at", range(4))
def test_421_anywhere_closes_for_everybody_undecided(at: int) -> None:
    client, transaction = begun(b"<b@example.net>", b"<c@example.net>")
    answers = [b"250 ok\r\n", b"550 no\r\n", b"250 ok\r\n", b"354 go\r\n"]
    client.receive(b"".join(answers[:at]) + b"421 4.3.2 closing\r\n250 ok\r\n250 ok\r\n354 go\r\n")
    event = client.next_event()
    assert isinstance(event, Broken) and event.reply.code == 421
    assert codes(transaction) == ([421, 421] if at < 2 else [550, 421])
    assert client.next_event() is None and not client.is_idle


def test_a_verdict_before_the_end_of_data_is_believed_only_when_it_is_no() -> None:
    for early, code in ((b"552 5.3.4 too big\r\n", 552), (b"250 fine\r\n", 451)):
        client, transaction = begun()
        client.receive(b"250 ok\r\n250 ok\r\n354 go\r\n")
        assert client.next_event() == SendContent()
        client.content(b"half a ")
        client.receive(early)
        assert isinstance(client.next_event(), Broken)
        assert codes(transaction) == [code]
        assert not client.wants_content


def test_a_354_with_its_verdict_behind_it_breaks() -> None:
    client, transaction = begun()
    client.receive(b"250 ok\r\n250 ok\r\n354 go\r\n250 queued already\r\n")
    assert client.next_event() == SendContent()
    assert isinstance(client.next_event(), Broken)
    assert codes(transaction) == [451]


@pytest.mark.parametrize(
    "junk",
    [
        b"250-a\r\n251 b\r\n",  # codes differ
        b"hello\r\n",
        b"25\r\n",
        b"250\n",  # no CRLF
        b"\r\n",
        b"\n",
        b"199 x\r\n",
        b"999 x\r\n",
        b"250_x\r\n",
        b"x" * (MAX_LINE_OCTETS + 1),
        b"250 " + b"x" * MAX_LINE_OCTETS + b"\r\n",
        b"250-x\r\n" * (MAX_LINES + 1),
        b"354 too early\r\n",
        b"\xff\xfe\x00\x01\r\n",
    ],
)
def test_junk_breaks_the_connection_for_now(junk: bytes) -> None:
    client, transaction = begun()
    client.receive(junk)
    event = client.next_event()
    assert isinstance(event, Broken)
    assert event.reply.is_transient and event.reply.status == (4, 5, 0)
    assert codes(transaction) == [451]
    client.receive(b"250 ok\r\n" * 1000)
    assert client.next_event() is None


def test_endless_lines_are_not_kept() -> None:
    client, _ = begun()
    for _ in range(10):
        client.receive(b"x" * 1000)
        client.next_event()
    client.receive(b"y" * 1_000_000)
    assert client.is_clean


def test_words_out_of_turn_are_no_answers() -> None:
    client = SmtpClient("client.example")
    client.receive(b"220 hi\r\n250-mx\r\n250 PIPELINING\r\n")
    assert isinstance(client.next_event(), Answered)
    client.ehlo()
    assert isinstance(client.next_event(), Broken)
    assert client.output() == b""

    client = introduced()
    client.receive(b"250 o")  # half a reply to what was not yet asked
    assert client.next_event() is None
    transaction = Transaction(b"<>", [b"<b@example.net>"])
    client.begin(transaction)
    assert isinstance(client.next_event(), Broken)
    assert codes(transaction) == [451]


def test_an_idle_connection_ends_with_any_word() -> None:
    for word, code in ((b"421 4.4.2 idle too long\r\n", 421), (b"250 hm\r\n", 451)):
        client = introduced()
        client.receive(word)
        event = client.next_event()
        assert isinstance(event, Broken) and event.reply.code == code
        assert not client.is_idle


def test_a_lost_connection_decides_the_rest_once() -> None:
    client, transaction = begun(b"<b@example.net>", b"<c@example.net>")
    client.receive(b"250 ok\r\n550 no\r\n")
    assert client.next_event() is None
    event = client.lost(Reply(451, (4, 4, 2), "gone"))
    assert event.transaction is transaction and codes(transaction) == [550, 451]
    assert client.lost(Reply(451, (4, 4, 2), "again")) is event
    assert client.next_event() is None


def test_starttls_sees_what_lies_behind_the_220() -> None:
    client = introduced(b"250-mx\r\n250 STARTTLS\r\n")
    client.starttls()
    assert client.output() == b"STARTTLS\r\n"
    client.receive(b"220 go\r\n250-evil\r\n")
    assert client.next_event() == Answered(Step.STARTTLS, Reply(220, None, "go"))
    assert not client.is_clean
    client.tls_started()
    assert client.is_clean and client.extensions == {}


def test_auth_words() -> None:
    client = introduced()
    client.auth("PLAIN", b"\0user\0secret")
    assert client.output() == b"AUTH PLAIN AHVzZXIAc2VjcmV0\r\n"
    client.receive(b"334 \r\n")
    assert client.next_event() == Answered(Step.AUTH, Reply(334, None, ""))
    client.auth_response(b"x")
    assert client.output() == b"eA==\r\n"
    client.receive(b"235 2.7.0 welcome\r\n")
    assert client.next_event() == Answered(Step.AUTH, Reply(235, (2, 7, 0), "welcome"))
    client.auth("EXTERNAL", b"")
    assert client.output() == b"AUTH EXTERNAL =\r\n"


def test_a_long_verdict_is_cut() -> None:
    client, transaction = begun()
    client.receive(b"250 ok\r\n250 ok\r\n354 go\r\n")
    client.next_event()
    client.end_content()
    client.receive(b"550-" + b"x" * 1500 + b"\r\n" + b"550 y\r\n")
    assert client.next_event() == Finished(transaction)
    verdict = transaction.verdicts[0]
    assert verdict is not None and len(verdict.text) < 1100
