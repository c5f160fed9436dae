# SPDX-License-Identifier: MIT
"""The arguments of SMTP commands, rule by rule: each parser returns the event, or the reply that refuses it.

Strict on what decisions are taken on: a path stands in angle brackets, obeys the grammar of RFC 5321 §4.1.2, and nothing
but parameters follows it. Lenient on what is common and harmless: spaces behind the colon of MAIL FROM: and RCPT TO:.

RFC 5321 §4.1.1, §4.1.2; RFC 1870 (SIZE), RFC 6152 (BODY), RFC 4954 §4 and §5 (AUTH), RFC 3461 §4 (RET, ENVID, NOTIFY,
ORCPT), RFC 6531 §3.4 (SMTPUTF8); the rest is in smtp_parameters.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Container
from functools import lru_cache
from typing import Any

from polarismail.values.address import Mailbox, parse_path
from polarismail.values.envelope import NO_DSN_REQUEST, DsnRequest
from polarismail.values.errors import BadAddress
from polarismail.values.reply import (
    BAD_BASE64,
    BAD_FORWARD_PATH,
    BAD_REVERSE_PATH,
    BAD_SYNTAX,
    NEED_SMTPUTF8,
    TOO_BIG,
    UNKNOWN_PARAMETER,
    Reply,
)
from polarismail.values.xtext import XTEXT, decode_xtext, is_orcpt
from polarismail.wire.smtp_events import Auth, Hello, Mail, Rcpt, Vrfy, Wishes
from polarismail.wire.smtp_parameters import make_wishes, read_wish

# A quoted string may hold ">": it is skipped as a whole. Possessive, so that nothing is ever tried twice.
_PATH = r'[ ]*+<((?:[^<>"]++|"(?:[^"\\]++|\\.)*+")*+)>(?: ++(.*+))?+'
_MAIL = re.compile(r"FROM:" + _PATH, re.IGNORECASE | re.DOTALL)
_RCPT = re.compile(r"TO:" + _PATH, re.IGNORECASE | re.DOTALL)
_PARAMETER = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*)(?:=([^\x00-\x20=\x7f]+))?")
_AUTH_PARAMETER = re.compile(r"AUTH=([^\x00-\x20\x7f]+)", re.IGNORECASE)
_DIGITS = re.compile(r"[0-9]{1,20}")
_MECHANISM = re.compile(r"[A-Za-z0-9_-]{1,20}")
_NOTIFY = re.compile(r"NEVER|(?:SUCCESS|FAILURE|DELAY)(?:,(?:SUCCESS|FAILURE|DELAY)){0,2}", re.IGNORECASE)
_UNPRINTABLE = re.compile(r"[^\x20-\x7e]")
_MAX_NAME = 255

NO_EXTENSIONS: frozenset[str] = frozenset()


def parse_hello(verb: str, argument: str) -> Hello | Reply:
    """The name is kept for logs and trace fields and judged by nobody (RFC 5321 §4.1.4)."""
    if not argument:
        return BAD_SYNTAX
    return Hello(verb, printable(argument))


def parse_mail(argument: str, extensions: Container[str] = NO_EXTENSIONS, max_octets: int = 0) -> Mail | Reply:
    """`FROM:<reverse-path> [parameters]`. `extensions`: keywords of what is offered; `max_octets` 0: no limit."""
    found = _MAIL.fullmatch(argument)
    if found is None:
        return BAD_REVERSE_PATH if argument[:5].upper() == "FROM:" else BAD_SYNTAX
    path, parameters = found.groups()
    size = body = ret = envid = auth = None
    wishes: Wishes | None = None
    smtputf8 = False
    if parameters:
        given = _parse_parameters(parameters)
        if isinstance(given, Reply):
            return given
        others: dict[str, Any] = {}
        for name, value in given.items():
            if name == "SIZE":
                if value is None or not _DIGITS.fullmatch(value):
                    return BAD_SYNTAX
                size = int(value)
                if max_octets and size > max_octets:
                    return TOO_BIG
            elif name == "BODY":
                body = (value or "").upper()
                if body == "BINARYMIME":
                    return UNKNOWN_PARAMETER
                if body not in ("7BIT", "8BITMIME"):
                    return BAD_SYNTAX
            elif name == "AUTH":
                auth = _parse_auth_parameter(value)
                if auth is None:
                    return BAD_SYNTAX
            elif name == "SMTPUTF8" and "SMTPUTF8" in extensions:
                if value is not None:
                    return BAD_SYNTAX
                smtputf8 = True
            elif name == "RET" and "DSN" in extensions:
                ret = (value or "").upper()
                if ret not in ("FULL", "HDRS"):
                    return BAD_SYNTAX
            elif name == "ENVID" and "DSN" in extensions:
                envid = value
                if value is None or len(value) > 100 or not XTEXT.fullmatch(value):
                    return BAD_SYNTAX
            else:
                refusal = read_wish(name, value, extensions, others)
                if refusal is not None:
                    return refusal
        if others:
            made = make_wishes(others)
            if isinstance(made, Reply):
                return made
            wishes = made
    if not smtputf8 and not path.isascii():
        return NEED_SMTPUTF8
    try:
        return Mail(_path(path), size, body, smtputf8, ret, envid, auth, wishes)
    except BadAddress:
        return BAD_REVERSE_PATH


def parse_rcpt(argument: str, extensions: Container[str] = NO_EXTENSIONS, smtputf8: bool = False) -> Rcpt | Reply:
    """`TO:<forward-path> [parameters]`; `smtputf8`: the transaction began with that parameter."""
    found = _RCPT.fullmatch(argument)
    if found is None:
        return BAD_FORWARD_PATH if argument[:3].upper() == "TO:" else BAD_SYNTAX
    path, parameters = found.groups()
    dsn = NO_DSN_REQUEST
    if parameters:
        given = _parse_parameters(parameters)
        if isinstance(given, Reply):
            return given
        for name, value in given.items():
            if "DSN" not in extensions or name not in ("NOTIFY", "ORCPT"):
                return UNKNOWN_PARAMETER
            if value is None:
                return BAD_SYNTAX
            if name == "NOTIFY":
                if not _NOTIFY.fullmatch(value):
                    return BAD_SYNTAX
            elif (
                len(value.encode("utf-8", "replace")) > 500
                or "\ufffd" in value
                or not is_orcpt(value, smtputf8=smtputf8)
            ):
                return BAD_SYNTAX
        dsn = DsnRequest(given.get("NOTIFY"), given.get("ORCPT"))
    if not smtputf8 and not path.isascii():
        return NEED_SMTPUTF8
    if path.lower() == "postmaster":
        return Rcpt(Mailbox(path, ""), dsn)
    try:
        mailbox = _path(path)
    except BadAddress:
        return BAD_FORWARD_PATH
    return Rcpt(mailbox, dsn) if mailbox is not None else BAD_FORWARD_PATH


def parse_auth(argument: str) -> Auth | Reply:
    """`mechanism [initial-response]`: `=` is an empty one (RFC 4954 §4). Whether the mechanism exists is not judged."""
    mechanism, _, initial = argument.partition(" ")
    if not _MECHANISM.fullmatch(mechanism):
        return BAD_SYNTAX
    initial = initial.strip(" ")
    if not initial:
        return Auth(mechanism.upper(), None)
    if " " in initial:
        return BAD_SYNTAX
    octets = b"" if initial == "=" else decode_base64(initial.encode("utf-8", "replace"))
    return Auth(mechanism.upper(), octets) if octets is not None else BAD_BASE64


def parse_vrfy(argument: str, extensions: Container[str] = NO_EXTENSIONS) -> Vrfy | Reply:
    """`string [SMTPUTF8]`: with it UTF-8 may stand in the reply (RFC 6531 §3.7.4.2); ours have none."""
    if "SMTPUTF8" in extensions and argument[-9:].upper() == " SMTPUTF8":
        argument = argument[:-9].rstrip(" ")
    return Vrfy(printable(argument)) if argument else BAD_SYNTAX


def decode_base64(text: bytes) -> bytes | None:
    """The octets, or None: padding is required, and nothing but the alphabet of RFC 4648 §4 is allowed."""
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error:
        return None


def printable(text: str) -> str:
    """What a client said, fit for logs, replies and trace fields: printable ASCII, at most 255 characters."""
    return _UNPRINTABLE.sub("?", text[:_MAX_NAME])


@lru_cache(maxsize=2048)  # The same few paths come again and again, and values are frozen. Failures are not kept.
def _path(text: str) -> Mailbox | None:
    if "\ufffd" in text:
        raise BadAddress("no UTF-8")  # it stands for octets that were none
    return parse_path(text)


def _parse_parameters(text: str) -> dict[str, str | None] | Reply:
    """Parameters by upper-case name; each at most once. AUTH=<> is the one value that may hold `=` or be in brackets."""
    given: dict[str, str | None] = {}
    for word in text.split():
        found = _PARAMETER.fullmatch(word) or _AUTH_PARAMETER.fullmatch(word)
        if found is None:
            return BAD_SYNTAX
        name, value = found.groups() if found.re is _PARAMETER else ("AUTH", found[1])
        if name.upper() in given:
            return BAD_SYNTAX
        given[name.upper()] = value
    return given


def _parse_auth_parameter(value: str | None) -> str | None:
    """RFC 4954 §5: `<>`, or a mailbox in xtext; "" for the former, None for neither."""
    if value == "<>":
        return ""
    if not value or not XTEXT.fullmatch(value):
        return None
    try:
        return str(Mailbox.parse(decode_xtext(value)))
    except BadAddress:
        return None
