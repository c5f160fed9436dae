# SPDX-License-Identifier: MIT
"""However octets are sliced, the client engine reads and writes the same."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from polarismail.values.errors import BadReply
from polarismail.values.reply import Reply
from polarismail.wire.smtp_client import Broken, DotEncoder, Event, ReplyReader, SendContent, SmtpClient, Transaction


def stuffed(content: bytes) -> bytes:
    """The specification, line by line: RFC 5321 §4.5.2."""
    lines = content.split(b"\r\n")
    if lines[-1] == b"":
        lines.pop()
    return b"".join((b"." if line[:1] == b"." else b"") + line + b"\r\n" for line in lines) + b".\r\n"


def unstuffed(octets: bytes) -> bytes:
    """What a strict receiver keeps. Fails when the end of data is anywhere but at the end."""
    lines = octets.split(b"\r\n")
    assert lines.index(b".") == len(lines) - 2 and lines[-1] == b""
    return b"".join((line[1:] if line[:1] == b"." else line) + b"\r\n" for line in lines[:-2])


def slices(octets: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(octets), *(cut % (len(octets) + 1) for cut in cuts)})
    return [octets[a:b] for a, b in itertools.pairwise(places)]


# Lines made of what matters: dots, ends, ordinary octets; the store keeps CRLF line ends only.
lines = st.lists(st.sampled_from([b".", b"..", b"a", b"\x00", b"\xff"]), max_size=4).map(b"".join)
contents = st.lists(lines, max_size=8).map(b"\r\n".join)


@settings(deadline=None)
@given(contents, st.lists(st.integers(0, 100), max_size=12))
def test_dot_stuffing_of_any_slicing(content: bytes, cuts: list[int]) -> None:
    encoder = DotEncoder()
    out = b"".join(encoder.encode(piece) for piece in slices(content, cuts)) + encoder.end()
    assert out == stuffed(content)
    kept = unstuffed(out)
    assert kept == content or kept == content + b"\r\n"


def test_the_dot_that_begins_a_piece() -> None:
    encoder = DotEncoder()
    pieces = [b"x" * 16382 + b"\r\n", b".\r\nMAIL FROM:<evil@example>\r\n", b".", b"", b".\r", b"\n"]
    out = b"".join(encoder.encode(piece) for piece in pieces) + encoder.end()
    assert out == b"x" * 16382 + b"\r\n..\r\nMAIL FROM:<evil@example>\r\n...\r\n.\r\n"


def test_no_lenient_receiver_sees_an_early_end() -> None:
    encoder = DotEncoder()
    assert b"\n.\r" not in encoder.encode(b"a\n.\r\nb\r\n")


def test_content_without_a_last_line_end_gets_one() -> None:
    for content, end in ((b"", b".\r\n"), (b"a", b"\r\n.\r\n"), (b"a\r", b"\r\n.\r\n"), (b"a\r\n", b".\r\n")):
        encoder = DotEncoder()
        encoder.encode(content)
        assert encoder.end() == end


def replies(octets_in_slices: list[bytes]) -> list[object]:
    reader, out = ReplyReader(), []
    try:
        for piece in octets_in_slices:
            reader.receive(piece)
            while (reply := reader.next_reply()) is not None:
                out.append(reply)
    except BadReply:
        out.append("bad")
    return out


reply_pieces = st.sampled_from(
    [b"250", b"354", b" ", b"-", b"2.1.0 ok", b"\r\n", b"\r\n", b"\n", b"\r", b"421 x\r\n", b"\xe9"]
)


@settings(deadline=None)
@given(st.lists(reply_pieces, max_size=25).map(b"".join), st.lists(st.integers(0, 200), max_size=12))
def test_replies_of_any_slicing(octets: bytes, cuts: list[int]) -> None:
    whole = replies([octets])
    assert replies(slices(octets, cuts)) == whole
    assert replies([octets[at : at + 1] for at in range(len(octets))]) == whole


answers = st.sampled_from(
    [
        b"250 ok\r\n",
        b"250-a\r\n250 b\r\n",
        b"550 5.1.1 no\r\n",
        b"451 later\r\n",
        b"354 go\r\n",
        b"421 bye\r\n",
        b"junk\r\n",
    ]
)


@settings(deadline=None)
@given(st.booleans(), st.integers(1, 4), st.lists(answers, max_size=10), st.booleans())
def test_every_recipient_gets_one_verdict_and_a_yes_needs_the_dot(
    pipelining: bool, recipients: int, said: list[bytes], octet_by_octet: bool
) -> None:
    client = SmtpClient("client.example")
    client.receive(b"220 hi\r\n")
    client.next_event()
    client.ehlo()
    client.output()
    client.receive(b"250-mx\r\n250 " + (b"PIPELINING" if pipelining else b"SIZE") + b"\r\n")
    client.next_event()
    transaction = Transaction(b"<>", [b"<%d@example.org>" % number for number in range(recipients)])
    client.begin(transaction)
    dotted, sent, events = False, client.output(), list[Event]()
    for answer in said:
        if not sent and client.expects is None:
            break
        for piece in [answer[at : at + 1] for at in range(len(answer))] if octet_by_octet else [answer]:
            client.receive(piece)
            while (event := client.next_event()) is not None:
                events.append(event)
                if isinstance(event, SendContent):
                    assert transaction.accepted
                    client.content(b"hello\r\n")
                    client.end_content()
                    dotted = True
        sent = client.output()
        if client.is_idle or (events and isinstance(events[-1], Broken)):
            break
    else:
        client.lost(Reply(451, (4, 4, 2), "gone"))
    assert None not in transaction.verdicts
    for number, verdict in enumerate(transaction.verdicts):
        assert verdict is not None
        if verdict.is_positive:
            assert dotted and number in transaction.accepted
