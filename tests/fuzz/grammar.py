# SPDX-License-Identifier: MIT
"""The grammar: commands' arguments, addresses, replies, base64. The first octet chooses, the rest is text.

What must hold: a parser returns its event, or a reply that refuses, or raises the one exception that it names; and what it
made of the text, written down again, is read as the same value (the relay decision is taken on the value, and the next hop
gets the text).
"""

from __future__ import annotations

from polarismail.values import address
from polarismail.values.address import Mailbox
from polarismail.values.errors import BadAddress, BadReply
from polarismail.values.reply import Reply
from polarismail.wire import smtp_grammar
from polarismail.wire.smtp_events import Auth, Hello, Mail, Rcpt
from tests.fuzz.session import KEYWORDS

_EXTENSIONS = (frozenset[str](), frozenset({"DSN"}), frozenset({"SMTPUTF8"}), frozenset(KEYWORDS))


def check(octets: bytes) -> None:
    """Raises where a promise is broken."""
    if not octets:
        return
    text = octets[1:].decode("utf-8", "replace")
    chosen = _CHECKS[octets[0] % len(_CHECKS)]
    chosen(text, octets[0] // len(_CHECKS))


def _check_mail(text: str, flags: int) -> None:
    found = smtp_grammar.parse_mail(text, _EXTENSIONS[flags % 4], 1000 if flags & 4 else 0)
    assert isinstance(found, Mail | Reply), found
    if isinstance(found, Mail):
        if found.reverse_path is not None:
            _goes_round(found.reverse_path)
        assert found.smtputf8 or found.reverse_path is None or found.reverse_path.is_ascii
        assert found.size is None or not flags & 4 or found.size <= 1000


def _check_rcpt(text: str, flags: int) -> None:
    extensions = _EXTENSIONS[flags % 4]
    smtputf8 = bool(flags & 4) and "SMTPUTF8" in extensions
    found = smtp_grammar.parse_rcpt(text, extensions, smtputf8)
    assert isinstance(found, Rcpt | Reply), found
    if isinstance(found, Rcpt) and found.forward_path.domain:
        _goes_round(found.forward_path)
        assert smtputf8 or found.forward_path.is_ascii


def _check_hello(text: str, flags: int) -> None:
    found = smtp_grammar.parse_hello("EHLO", text)
    assert isinstance(found, Reply) or (
        isinstance(found, Hello) and found.domain.isascii() and found.domain.isprintable()
    )


def _check_auth(text: str, flags: int) -> None:
    found = smtp_grammar.parse_auth(text)
    assert isinstance(found, Auth | Reply), found


def _check_path(text: str, flags: int) -> None:
    try:
        found = address.parse_path(text)
    except BadAddress:
        return
    if found is not None:
        _goes_round(found)


def _check_domain(text: str, flags: int) -> None:
    try:
        found = address.parse_domain(text)
    except BadAddress:
        return
    assert address.parse_domain(found) == found
    if found[:1] != "[":
        plain = address.to_ascii(found)
        assert plain.isascii() and address.parse_domain(plain) == plain


def _check_reply(text: str, flags: int) -> None:
    lines = [line.encode("utf-8", "replace") for line in text.split("\n")]
    try:
        found = Reply.parse(lines)
    except BadReply:
        return
    assert found.octets.endswith(b"\r\n")
    again = Reply.parse(found.octets[:-2].split(b"\r\n"))
    assert (again.code, again.status) == (found.code, found.status)


def _check_said(text: str, flags: int) -> None:
    """Whatever a text of ours quotes: no line of the reply but those that we meant."""
    reply = Reply(550, (5, 1, 1), text)
    assert reply.octets.count(b"\r") == reply.octets.count(b"\n") == reply.octets.count(b"\r\n")
    for line in reply.octets.split(b"\r\n")[:-1]:
        assert line[:3] == b"550" and len(line) <= 2000


def _goes_round(mailbox: Mailbox) -> None:
    text = str(mailbox)
    assert Mailbox.parse(text) == mailbox, text
    assert not any(character in text for character in "\r\n\0"), text


_CHECKS = (
    _check_mail, _check_rcpt, _check_hello, _check_auth, _check_path, _check_domain, _check_reply, _check_said,
)  # fmt: skip
