# SPDX-License-Identifier: MIT
"""Arguments of MAIL, RCPT and AUTH: what is accepted, what is refused, and with which reply."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polarismail.values import reply as replies
from polarismail.values.address import Mailbox
from polarismail.values.envelope import DsnRequest
from polarismail.values.reply import Reply
from polarismail.wire.smtp_events import Auth, Hello, Mail, Rcpt
from polarismail.wire.smtp_grammar import parse_auth, parse_hello, parse_mail, parse_rcpt

ALL = frozenset({"DSN", "SMTPUTF8"})


@pytest.mark.parametrize(
    ("argument", "mail"),
    [
        ("FROM:<>", Mail(None)),
        ("from:<a@B.Example>", Mail(Mailbox("a", "b.example"))),
        ("FROM:  <a@b.example>  SIZE=5", Mail(Mailbox("a", "b.example"), 5)),
        ("FROM:<@x,@y:a@b.example>", Mail(Mailbox("a", "b.example"))),
        ('FROM:<"a>b"@b.example> BODY=7bit', Mail(Mailbox("a>b", "b.example"), body="7BIT")),
        ("FROM:<a@b.example> AUTH=<>", Mail(Mailbox("a", "b.example"), auth="")),
        ("FROM:<a@b.example> AUTH=e+3Dmc2@example.com", Mail(Mailbox("a", "b.example"), auth="e=mc2@example.com")),
        (
            "FROM:<a@b.example> RET=hdrs ENVID=x+2By",
            Mail(Mailbox("a", "b.example"), ret="HDRS", envid="x+2By"),
        ),
        ("FROM:<ä@b.example> SMTPUTF8", Mail(Mailbox("ä", "b.example"), smtputf8=True)),
    ],
)
def test_mail(argument: str, mail: Mail) -> None:
    assert parse_mail(argument, ALL) == mail


@pytest.mark.parametrize(
    ("argument", "reply"),
    [
        ("", replies.BAD_SYNTAX),
        ("FROM", replies.BAD_SYNTAX),
        ("FROM <a@b.example>", replies.BAD_SYNTAX),
        ("FROM:", replies.BAD_REVERSE_PATH),
        ("FROM:a@b.example", replies.BAD_REVERSE_PATH),
        ("FROM:<a@b.example", replies.BAD_REVERSE_PATH),
        ("FROM:<a@b.example>x", replies.BAD_REVERSE_PATH),
        ('FROM:<"a@b.example>', replies.BAD_REVERSE_PATH),
        ("FROM:< >", replies.BAD_REVERSE_PATH),
        ("FROM:<Postmaster>", replies.BAD_REVERSE_PATH),
        ("FROM:<@x:>", replies.BAD_REVERSE_PATH),
        ("FROM:<ä@b.example>", replies.NEED_SMTPUTF8),
        ("FROM:<\ufffd@b.example> SMTPUTF8", replies.BAD_REVERSE_PATH),
        ("FROM:<a@b.example> SIZE=101", replies.TOO_BIG),
        ("FROM:<a@b.example> SIZE=-1", replies.BAD_SYNTAX),
        ("FROM:<a@b.example> SIZE=٣", replies.BAD_SYNTAX),
        ("FROM:<a@b.example> SIZE=" + "9" * 21, replies.BAD_SYNTAX),
        ("FROM:<a@b.example> SIZE=1 size=1", replies.BAD_SYNTAX),
        ("FROM:<a@b.example> BODY", replies.BAD_SYNTAX),
        ("FROM:<a@b.example> RET=ALL", replies.BAD_SYNTAX),
        ("FROM:<a@b.example> RET", replies.BAD_SYNTAX),
        ("FROM:<a@b.example> ENVID=" + "x" * 101, replies.BAD_SYNTAX),
        ("FROM:<a@b.example> ENVID=x+2", replies.BAD_SYNTAX),
        ("FROM:<a@b.example> SMTPUTF8=yes", replies.BAD_SYNTAX),
        ("FROM:<a@b.example> AUTH=", replies.BAD_SYNTAX),
        ("FROM:<a@b.example> AUTH=nobody", replies.BAD_SYNTAX),
        ("FROM:<a@b.example> NOTIFY=NEVER", replies.UNKNOWN_PARAMETER),
    ],
)
def test_mail_refused(argument: str, reply: Reply) -> None:
    assert parse_mail(argument, ALL, 100) == reply


@pytest.mark.parametrize(
    ("argument", "rcpt"),
    [
        ("TO:<a@b.example>", Rcpt(Mailbox("a", "b.example"))),
        ("to: <PostMaster>", Rcpt(Mailbox("PostMaster", ""))),
        ("TO:<a%b@c.example>", Rcpt(Mailbox("a%b", "c.example"))),
        ('TO:<"a@b"@c.example>', Rcpt(Mailbox("a@b", "c.example"))),
        ("TO:<@a.example:b@c.example>", Rcpt(Mailbox("b", "c.example"))),
        ("TO:<a@[127.0.0.1]>", Rcpt(Mailbox("a", "[127.0.0.1]"))),
        (
            "TO:<a@b.example> NOTIFY=SUCCESS,DELAY ORCPT=rfc822;x+2By@z",
            Rcpt(Mailbox("a", "b.example"), DsnRequest("SUCCESS,DELAY", "rfc822;x+2By@z")),
        ),
    ],
)
def test_rcpt(argument: str, rcpt: Rcpt) -> None:
    assert parse_rcpt(argument, ALL) == rcpt


@pytest.mark.parametrize(
    ("argument", "reply"),
    [
        ("", replies.BAD_SYNTAX),
        ("FROM:<a@b.example>", replies.BAD_SYNTAX),
        ("TO:<>", replies.BAD_FORWARD_PATH),
        ("TO:<a@b@c.example>", replies.BAD_FORWARD_PATH),
        ("TO:<a@b.example>;", replies.BAD_FORWARD_PATH),
        ("TO:<a@b.example.>", replies.BAD_FORWARD_PATH),
        ("TO:<a@b..example>", replies.BAD_FORWARD_PATH),
        ("TO:<a@>", replies.BAD_FORWARD_PATH),
        ("TO:<@b.example>", replies.BAD_FORWARD_PATH),
        ("TO:<a@[127.0.0.1>", replies.BAD_FORWARD_PATH),
        ("TO:<a@[300.0.0.1]>", replies.BAD_FORWARD_PATH),
        ("TO:<a@1.2.3.4>", replies.BAD_FORWARD_PATH),
        ("TO:<ü@b.example>", replies.NEED_SMTPUTF8),
        ("TO:<a@b.example> NOTIFY=NEVER,SUCCESS", replies.BAD_SYNTAX),
        ("TO:<a@b.example> NOTIFY", replies.BAD_SYNTAX),
        ("TO:<a@b.example> ORCPT=rfc822", replies.BAD_SYNTAX),
        ("TO:<a@b.example> ORCPT=rfc822;" + "x" * 500, replies.BAD_SYNTAX),
        ("TO:<a@b.example> RET=FULL", replies.UNKNOWN_PARAMETER),
    ],
)
def test_rcpt_refused(argument: str, reply: Reply) -> None:
    assert parse_rcpt(argument, ALL) == reply


def test_an_original_recipient_has_500_octets_at_most_whatever_they_stand_for() -> None:
    for number, kind in ((240, Rcpt), (250, Reply)):
        argument = "TO:<a@b.example> ORCPT=utf-8;" + "\u00fc" * number
        assert isinstance(parse_rcpt(argument, ALL, smtputf8=True), kind)


def test_extensions_that_are_not_offered_are_unknown() -> None:
    for parameter in ("RET=FULL", "ENVID=x", "SMTPUTF8"):
        assert parse_mail(f"FROM:<a@b.example> {parameter}") == replies.UNKNOWN_PARAMETER
    for parameter in ("NOTIFY=NEVER", "ORCPT=rfc822;a"):
        assert parse_rcpt(f"TO:<a@b.example> {parameter}") == replies.UNKNOWN_PARAMETER


@given(st.text(max_size=300), st.booleans())
@settings(deadline=None)
def test_nothing_raises(text: str, offered: bool) -> None:
    extensions = ALL if offered else frozenset[str]()
    for argument in (text, f"FROM:<{text}>", f"FROM:<a@b.example> {text}"):
        assert isinstance(parse_mail(argument, extensions), Mail | Reply)
    for argument in (text, f"TO:<{text}>", f"TO:<a@b.example> {text}"):
        assert isinstance(parse_rcpt(argument, extensions, smtputf8=offered), Rcpt | Reply)
    assert isinstance(parse_auth(text), Auth | Reply)
    assert isinstance(parse_hello("EHLO", text), Hello | Reply)


local_parts = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=64)


@given(local_parts)
@settings(deadline=None)
def test_any_local_part_goes_round(local: str) -> None:
    mailbox = Mailbox(local, "b.example")
    assert parse_rcpt(f"TO:<{mailbox}>") == Rcpt(mailbox)
    assert parse_mail(f"FROM:<{mailbox}> SIZE=1") == Mail(mailbox, 1)


@given(st.binary(max_size=100))
@settings(deadline=None)
def test_initial_responses_go_round(octets: bytes) -> None:
    text = base64.b64encode(octets).decode() or "="
    assert parse_auth(f"plain {text}") == Auth("PLAIN", octets)


def test_names_are_made_printable() -> None:
    assert parse_hello("HELO", "a\u202eb\xffc") == Hello("HELO", "a?b?c")
    assert parse_hello("EHLO", "x" * 1000) == Hello("EHLO", "x" * 255)
    assert parse_hello("EHLO", "") == replies.BAD_SYNTAX
