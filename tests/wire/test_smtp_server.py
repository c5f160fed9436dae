# SPDX-License-Identifier: MIT
"""The SMTP server's engine: one reply for each event, slices do not matter, TLS begins with nothing from before."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from polarismail.values import reply as replies
from polarismail.values.reply import Reply
from polarismail.wire.smtp_events import (
    Auth,
    AuthResponse,
    Bdat,
    Content,
    Data,
    EndOfData,
    Hello,
    Mail,
    Rcpt,
    Refused,
    StartTls,
)
from polarismail.wire.smtp_server import SmtpServer
from polarismail.wire.smtp_states import LEGAL, ServerSettings, State
from tests.dialogues.smtp_peer import EnginePeer
from tests.wire.test_framing import cuts, slices

MX = ServerSettings()
BANNER = Reply(220, None, "test")
LOGIN = base64.b64encode(b"\0joe\0secret")


def engine(config: ServerSettings = MX, **options: Any) -> SmtpServer:
    known: dict[str, Any] = {"tls_available": True, "auth_mechanisms": lambda tls: ("PLAIN", "LOGIN")}
    return SmtpServer(config, **{**known, **options})


def ready(config: ServerSettings = MX, **options: Any) -> SmtpServer:
    server = engine(config, **options)
    server.answer(BANNER)
    server.receive(b"EHLO client.example\r\n")
    assert isinstance(server.next_event(), Hello)
    server.answer(server.ehlo_reply("test"))
    return server


def one(server: SmtpServer, octets: bytes) -> Any:
    server.receive(octets)
    return server.next_event()


def in_data() -> SmtpServer:
    server = ready()
    for line, reply in (
        (b"MAIL FROM:<a@b.example>\r\n", replies.SENDER_OK),
        (b"RCPT TO:<c@d.example>\r\n", replies.RECIPIENT_OK),
        (b"DATA\r\n", replies.GO_AHEAD),
    ):
        one(server, line)
        server.answer(reply)
    return server


# -- properties ------------------------------------------------------------------------------------------------------

COMMANDS = (
    b"EHLO x",
    b"HELO x",
    b"MAIL FROM:<a@b.example>",
    b"MAIL FROM:<> SIZE=5",
    b"RCPT TO:<c@d.example>",
    b"RCPT TO:<refused@d.example>",
    b"DATA",
    b"DATA x",
    b"BDAT 0",
    b"BDAT 0 LAST",
    b"BDAT 0 FIRST",
    b"LHLO x",
    b"XCLIENT ADDR=192.0.2.1",
    b"XFORWARD NAME=x",
    b"RSET",
    b"NOOP",
    b"VRFY x",
    b"HELP",
    b"EXPN x",
    b"STARTTLS",
    b"AUTH PLAIN",
    b"AUTH PLAIN " + LOGIN,
    b"AUTH LOGIN",
    b"AUTH FOO",
    b"*",
    LOGIN,
    b"junk\0",
    b"",
    b"x" * 3000,
    b"QUIT",
    b"Subject: x",
    b"\xff\xfe",
)
OPTIONS = {"refuse": "refused@* 550 5.1.1 No such mailbox", "login": "joe secret", "auth": "always"}


def replies_in(octets: bytes) -> int:
    return sum(1 for line in octets.split(b"\r\n") if line and line[3:4] != b"-")


@given(st.lists(st.sampled_from(COMMANDS), max_size=25))
@settings(deadline=None, max_examples=400)
def test_any_command_in_any_state_has_exactly_one_reply(commands: list[bytes]) -> None:
    peer = EnginePeer(OPTIONS)
    assert replies_in(peer._out) == 1
    for command in commands:
        state = peer.engine.state
        peer._out = b""
        peer.send(command + b"\r\n")
        if state is State.CLOSED:
            assert peer._out == b""
        else:
            assert replies_in(peer._out) == 1, command
            verb = command.split(b" ")[0].decode("latin-1").upper()
            if verb in LEGAL and state not in (State.AUTH, State.TLS) and state not in LEGAL[verb]:
                assert peer._out[:1] == b"5"
                # The last chunk ends a transaction without recipients, too: what is pipelined behind it is the next one.
                ended = state is State.MAIL and command == b"BDAT 0 LAST"
                assert peer.engine.state is (State.READY if ended else state)
        if peer.engine.state is State.CONTENT:
            peer._out = b""
            peer.send(b"text\r\n.\r\n")
            assert replies_in(peer._out) == 1
        assert peer.engine.buffered == 0


# Streams that keep to RFC 2920: what must be waited for is, between the strings.
BLOCKS = (
    (b"EHLO x\r\n",),
    (b"HELO x\r\n",),
    (
        b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n",
        b"S: x\r\n\r\n..y\n.\nz\r\n.\r\nNOOP\r\nRSET\r\n",
    ),
    (b"MAIL FROM:<a@b.example>\r\nRCPT TO:<refused@d.example>\r\nRSET\r\n",),
    (b"RCPT TO:<c@d.example>\r\nNOOP\r\nVRFY x\r\n",),
    (b"AUTH PLAIN\r\n", LOGIN + b"\r\nNOOP\r\n"),
    (b"AUTH LOGIN\r\n", b"!\r\nNOOP\r\n"),
    (b"BDAT 9\r\na: b\r\n\r\n\rBDAT 5 LAST\r\n\n..x\r",),
    (b"BDAT 7 LAST\r\nRSET\r\n\0BDAT 3 X\r\nabcNOOP\r\n",),
    (b"BDAT 6\r\nQUIT\r\nRSET\r\n",),
    (b"BDAT 0\r\nBDAT 99999999999 LAST\r\n",),
    (b"x" * 3000 + b"\r\nNOOP\r\n",),
    (b"y" * 70000 + b"\r\nNOOP\r\n",),
    (b"a\0b\r\nMAIL\r\n\r\nNOOP\r\n",),
    (b"MAIL FROM:<a@b.example>\nRSET\r\n",),
    (b"\x16\x03\x01\r\n\r\n",),
    (b"Subject: x\r\nNOOP\r\n",),
)


@given(st.lists(st.sampled_from(BLOCKS), max_size=10), cuts)
@settings(deadline=None, max_examples=300)
def test_slices_do_not_matter(blocks: list[tuple[bytes, ...]], at: list[int]) -> None:
    seen = []
    for cut in (False, True):
        peer = EnginePeer(OPTIONS)
        for block in blocks:
            for part in block:
                for piece in slices(part, at) if cut else [part]:
                    peer.send(piece)
        events = [event for event in peer.events if not isinstance(event, Content)]
        seen.append((events, peer._out, peer.messages, peer.engine.state))
    assert seen[0] == seen[1]


@given(st.lists(st.binary(max_size=80) | st.sampled_from(COMMANDS), max_size=20))
@example([b"EHLO x\r\n", b"AUTH PLAIN \xff\r\n"])
@settings(deadline=None, max_examples=300)
def test_nothing_that_a_client_sends_raises(pieces: list[bytes]) -> None:
    peer = EnginePeer(OPTIONS)
    for piece in pieces:
        peer.send(piece)
        peer.send(b"\r\n")
    assert peer.engine.buffered <= 160


# -- the order of things ---------------------------------------------------------------------------------------------


def test_an_event_must_be_answered_before_the_next() -> None:
    server = ready()
    one(server, b"NOOP\r\nNOOP\r\n")
    with pytest.raises(RuntimeError):
        server.next_event()
    server.answer(replies.OK)
    assert server.next_event() is not None


def test_octets_before_the_banner() -> None:
    server = engine()
    server.receive(b"EHLO x\r\n")
    assert server.answer(BANNER) == b""
    event = server.next_event()
    assert event == Refused(replies.OUT_OF_STEP, closes=True)
    assert server.out_of_step
    assert server.answer(event.reply) == replies.OUT_OF_STEP.octets
    assert server.state is State.CLOSED
    server.receive(b"NOOP\r\n")
    assert server.next_event() is None


@pytest.mark.parametrize(
    ("line", "reply"),
    [(b"EHLO x\r\n", replies.OK), (b"DATA\r\n", replies.GO_AHEAD), (b"STARTTLS\r\n", replies.READY_FOR_TLS)],
)
def test_octets_that_come_while_the_answer_is_decided(line: bytes, reply: Reply) -> None:
    server = ready()
    if line == b"DATA\r\n":
        one(server, b"MAIL FROM:<a@b.example>\r\n")
        server.answer(replies.SENDER_OK)
        one(server, b"RCPT TO:<c@d.example>\r\n")
        server.answer(replies.RECIPIENT_OK)
    assert isinstance(one(server, line), Hello | Data | StartTls)
    server.receive(b"MAIL FROM:<smuggled@b.example>\r\n")
    assert server.answer(reply) == b""
    event = server.next_event()
    assert isinstance(event, Refused) and event.closes
    assert server.answer(event.reply) == replies.OUT_OF_STEP.octets
    assert server.next_event() is None


def test_what_was_said_in_clear_is_forgotten() -> None:
    server = ready(auth_mechanisms=lambda tls: ("PLAIN",))
    one(server, b"AUTH PLAIN " + LOGIN + b"\r\n")
    server.answer(replies.AUTHENTICATED)
    assert server.authenticated
    assert isinstance(one(server, b"STARTTLS\r\n"), StartTls)
    assert server.answer(replies.READY_FOR_TLS) == replies.READY_FOR_TLS.octets
    server.tls_started()
    assert (server.state, server.authenticated, server.tls_active) == (State.GREETED, False, True)
    assert one(server, b"MAIL FROM:<a@b.example>\r\n") == Refused(replies.BAD_SEQUENCE)


def test_octets_in_clear_behind_starttls_end_the_session() -> None:
    server = ready()
    one(server, b"STARTTLS\r\n")
    server.answer(replies.READY_FOR_TLS)
    server.receive(b"MAIL FROM:<smuggled@b.example>\r\n")
    assert server.buffered == 0
    server.tls_started()
    assert server.next_event() == Refused(replies.OUT_OF_STEP, closes=True)


def test_tls_that_is_not_to_be_had_now_changes_nothing() -> None:
    server = ready()
    one(server, b"STARTTLS\r\n")
    server.answer(replies.TLS_UNAVAILABLE)
    assert server.state is State.READY
    assert isinstance(one(server, b"MAIL FROM:<a@b.example>\r\n"), Mail)


@pytest.mark.parametrize("refusal", [replies.TRY_AGAIN, replies.RELAY_DENIED])
def test_a_refusal_does_not_move_the_state(refusal: Reply) -> None:
    server = ready()
    assert isinstance(one(server, b"MAIL FROM:<a@b.example>\r\n"), Mail)
    server.answer(refusal)
    assert server.state is State.READY
    one(server, b"MAIL FROM:<a@b.example>\r\n")
    server.answer(replies.SENDER_OK)
    assert isinstance(one(server, b"RCPT TO:<c@d.example>\r\n"), Rcpt)
    server.answer(refusal)
    assert (server.state, server.recipients) == (State.MAIL, 0)
    assert one(server, b"DATA\r\n") == Refused(replies.NO_VALID_RECIPIENTS)
    server.answer(replies.NO_VALID_RECIPIENTS)
    one(server, b"RCPT TO:<c@d.example>\r\n")
    server.answer(replies.RECIPIENT_OK)
    assert (server.state, server.recipients) == (State.RCPT, 1)


def test_refused_data_ends_the_transaction() -> None:
    server = ready()
    one(server, b"MAIL FROM:<a@b.example>\r\n")
    server.answer(replies.SENDER_OK)
    one(server, b"RCPT TO:<c@d.example>\r\n")
    server.answer(replies.RECIPIENT_OK)
    assert isinstance(one(server, b"DATA\r\n"), Data)
    server.answer(replies.TRY_AGAIN)
    assert (server.state, server.recipients) == (State.READY, 0)


def test_whatever_the_end_of_data_is_answered_the_next_transaction_may_begin() -> None:
    for reply in (replies.OK, replies.NOT_QUEUED, replies.TOO_BIG):
        server = in_data()
        assert server.content_octets == 0
        assert one(server, b"x") == Content(b"x")
        assert server.content_octets == 1
        assert one(server, b"\r\n.\r\n") == Content(b"\r\n")
        assert server.next_event() == EndOfData(3)
        server.answer(reply)
        assert server.content_octets == 0
        assert isinstance(one(server, b"MAIL FROM:<a@b.example>\r\n"), Mail)


def test_a_421_is_the_last_word() -> None:
    server = ready()
    one(server, b"NOOP\r\nNOOP\r\n")
    assert server.answer(replies.SHUTTING_DOWN) == replies.SHUTTING_DOWN.octets
    assert server.next_event() is None
    server.receive(b"x" * 1000)
    assert server.buffered == 0


def test_an_answer_to_nothing_is_only_rendered() -> None:
    server = in_data()
    one(server, b"text\r\n")
    assert server.answer(replies.TRY_AGAIN) == replies.TRY_AGAIN.octets
    assert server.state is State.CONTENT


# -- login -----------------------------------------------------------------------------------------------------------


def test_an_exchange() -> None:
    server = ready()
    assert one(server, b"AUTH plain\r\n") == Auth("PLAIN", None)
    assert server.challenge(b"") == b"334 \r\n"
    assert one(server, LOGIN + b"\r\n") == AuthResponse(b"\0joe\0secret")
    server.answer(replies.BAD_CREDENTIALS)
    assert not server.authenticated
    assert one(server, b"AUTH LOGIN " + base64.b64encode(b"joe") + b"\r\n") == Auth("LOGIN", b"joe")
    assert server.challenge(b"Password:") == b"334 UGFzc3dvcmQ6\r\n"
    assert one(server, b"\r\n") == AuthResponse(b"")
    server.answer(replies.AUTHENTICATED)
    assert (server.authenticated, server.state) == (True, State.READY)


def test_a_response_that_is_no_base64_ends_the_exchange() -> None:
    server = ready()
    one(server, b"AUTH PLAIN\r\n")
    server.challenge(b"")
    assert one(server, b"\x16\xff!\r\n") == Refused(replies.BAD_BASE64)
    server.answer(replies.BAD_BASE64)
    assert one(server, b"NOOP\r\n") is not None


def test_mechanisms_are_asked_for_each_time() -> None:
    offered: list[str] = []
    server = ready(auth_mechanisms=lambda tls: tuple(offered))
    assert "AUTH" not in server.ehlo_reply("test").text
    assert one(server, b"AUTH PLAIN\r\n") == Refused(replies.NOT_IMPLEMENTED)
    server.answer(replies.NOT_IMPLEMENTED)
    offered.append("LOGIN")
    assert "AUTH LOGIN" in server.ehlo_reply("test").text
    assert one(server, b"AUTH PLAIN\r\n") == Refused(replies.UNKNOWN_MECHANISM)


def test_secrets_are_not_shown() -> None:
    server = ready()
    assert "joe" not in repr(one(server, b"AUTH PLAIN " + LOGIN + b"\r\n"))


# -- bounds ----------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_content() -> None:
    server = in_data()
    for _ in range(200):
        event = one(server, b"x" * 65535 + b"\r")
        assert isinstance(event, Content) and len(event.octets) <= 65540
        assert server.next_event() is None
        assert server.buffered == 0


def test_memory_does_not_grow_with_chunks() -> None:
    server = ready()
    for line, reply in (
        (b"MAIL FROM:<a@b.example>\r\n", replies.SENDER_OK),
        (b"RCPT TO:<c@d.example>\r\n", replies.OK),
    ):
        one(server, line)
        server.answer(reply)
    assert one(server, b"BDAT 13107000 LAST\r\n") == Bdat(13107000, True)
    server.read_chunks()
    for at in range(200):
        event = one(server, b"x" * 65533 + b"\r\n")
        assert isinstance(event, Content) and len(event.octets) <= 65536
        if at < 199:
            assert server.content_octets == (at + 1) * 65535
            assert server.next_event() is None
        assert server.buffered == 0
    assert isinstance(server.next_event(), EndOfData)


@given(st.lists(st.binary(max_size=30), max_size=8), st.booleans(), cuts)
@settings(deadline=None, max_examples=200)
def test_chunks_are_counted_as_they_were_sent(chunks: list[bytes], refused: bool, at: list[int]) -> None:
    """Whatever is in them, and whatever becomes of them, the commands between them are found."""
    octets = b"EHLO x\r\n"
    head = b"MAIL FROM:<a@b.example>\r\nRCPT TO:<%s@d.example>\r\n" % (b"refused" if refused else b"c")
    body = b"".join(b"BDAT %d\r\n%s" % (len(chunk), chunk) for chunk in chunks)
    peer = EnginePeer(OPTIONS)
    peer.send(octets)
    peer._out = b""
    for piece in slices(head + body + b"BDAT 0 LAST\r\nVRFY x\r\n", at):
        peer.send(piece)
    lines = peer._out.split(b"\r\n")
    assert len(lines) == 2 + len(chunks) + 2 + 1
    assert lines[-2][:3] == b"252"
    if refused:
        assert {line[:3] for line in lines[2:-2]} == {b"554"} and not peer.messages
    elif b"\0" not in b"".join(chunks):
        assert len(peer.messages) == 1


def test_what_ehlo_offers() -> None:
    text = (
        ready(ServerSettings(max_message_octets=99, offers=frozenset({"PIPELINING", "DSN", "SMTPUTF8"})))
        .ehlo_reply("hi")
        .text
    )
    assert text.split("\n") == [
        "hi",
        "PIPELINING",
        "SIZE 99",
        "STARTTLS",
        "AUTH PLAIN LOGIN",
        "8BITMIME",
        "ENHANCEDSTATUSCODES",
        "HELP",
        "DSN",
        "SMTPUTF8",
    ]
    server = ready()
    server.is_front_end = True
    assert server.ehlo_reply("hi").text.split("\n")[-3:] == [
        "CHUNKING",
        "XCLIENT NAME ADDR PORT PROTO HELO LOGIN",
        "XFORWARD NAME ADDR PORT PROTO HELO IDENT SOURCE",
    ]


def test_smtputf8_only_in_a_transaction_that_asked_for_it() -> None:
    for parameter, kind in ((b"", Refused), (b" SMTPUTF8", Rcpt)):
        server = ready(ServerSettings(offers=frozenset({"SMTPUTF8"})))
        assert isinstance(one(server, b"MAIL FROM:<a@b.example>" + parameter + b"\r\n"), Mail)
        server.answer(replies.SENDER_OK)
        assert isinstance(one(server, "RCPT TO:<ü@b.example>\r\n".encode()), kind)


@pytest.mark.parametrize("number", [0, 50001])
def test_no_setting_allows_recipients_without_bound(number: int) -> None:
    with pytest.raises(ValueError, match="max_recipients"):
        ServerSettings(max_recipients=number)


def test_the_ehlo_reply_says_the_listeners_own_limits() -> None:
    server = ready(
        ServerSettings(
            max_recipients=7, max_hold_seconds=3600, offers=frozenset({"LIMITS", "FUTURERELEASE", "MT-PRIORITY"})
        )
    )
    lines = server.ehlo_reply("test", 1_800_000_000.0).text.split("\n")
    # 2027-01-15T08:00:00Z and an hour, to the hour.
    assert {"LIMITS RCPTMAX=7", "FUTURERELEASE 3600 2027-01-15T09:00:00Z", "MT-PRIORITY"} <= set(lines)
    assert "PIPELINING" not in lines and "DSN" not in lines
