# SPDX-License-Identifier: MIT
"""XCLIENT and XFORWARD, Postfix's extensions: what a front end says about the client behind it.

Guarantees: a value is bounded, printable and of its kind, or the command is refused as a whole; what is not known is told
apart from what was not said.

Who may say so is not judged here. Values are in xtext (RFC 3461 §4).
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any

from attrs import evolve, frozen

from polarismail.values.reply import BAD_SYNTAX, Reply

XCLIENT_KEYWORD = "XCLIENT NAME ADDR PORT PROTO HELO LOGIN"
XFORWARD_KEYWORD = "XFORWARD NAME ADDR PORT PROTO HELO IDENT SOURCE"

_MAX_VALUE = 255
_XTEXT = re.compile(r"(?:[!-*,-<>-~]|\+[0-9A-Fa-f]{2})+")
_HEX = re.compile(r"\+([0-9A-Fa-f]{2})")
_UNKNOWN = frozenset({"[UNAVAILABLE]", "[TEMPUNAVAIL]"})
UNKNOWN_ADDRESS = "unknown"


@frozen
class Claims:
    """What was said: None where nothing was, "" (a port: 0) where it is not known. An unknown address is "unknown", which is
    in no network."""

    name: str | None = None
    address: str | None = None
    port: int | None = None
    protocol: str | None = None  # SMTP, ESMTP or LMTP
    helo: str | None = None
    login: str | None = None
    ident: str | None = None
    source: str | None = None  # LOCAL, REMOTE

    def updated(self, later: Claims) -> Claims:
        """With what was said later in place of what was said before."""
        said = {name: value for name in _NAMES if (value := getattr(later, name)) is not None}
        return evolve(self, **said)

    def __str__(self) -> str:
        """One line for logs: the client as Postfix writes it, then what else is known."""
        line = f"{self.name or 'unknown'}[{self.address or UNKNOWN_ADDRESS}]"
        if self.port:
            line += f":{self.port}"
        more = (("helo", self.helo), ("proto", self.protocol), ("id", self.ident), ("source", self.source))
        return line + "".join(f" {word}={value}" for word, value in more if value)


_NAMES = tuple(attribute.name for attribute in Claims.__attrs_attrs__)
NO_CLAIMS = Claims()


def parse_xclient(argument: str) -> Claims | Reply:
    """The arguments of XCLIENT. DESTADDR and DESTPORT are taken, and mean nothing here."""
    return _parse(argument, _OF_XCLIENT)


def parse_xforward(argument: str) -> Claims | Reply:
    """The arguments of XFORWARD."""
    return _parse(argument, _OF_XFORWARD)


def _parse(argument: str, known: dict[str, str]) -> Claims | Reply:
    said: dict[str, Any] = {}
    for word in argument.split(" "):
        if not word:
            continue
        name, _, value = word.partition("=")
        field = known.get(name.upper())
        text = _decode(value)
        if field is None or field in said or text is None:
            return BAD_SYNTAX
        parsed = _PARSE.get(field, _parse_text)(text)
        if parsed is None:
            return BAD_SYNTAX
        said[field] = parsed
    if not said:
        return BAD_SYNTAX
    return Claims(**{name: value for name, value in said.items() if name in _NAMES})


def _decode(value: str) -> str | None:
    """Undo xtext; "" for what is not known, None for what must not be."""
    if value.upper() in _UNKNOWN:
        return ""
    if len(value) > 3 * _MAX_VALUE or not _XTEXT.fullmatch(value):
        return None
    try:
        text = _HEX.sub(lambda found: chr(int(found[1], 16)), value).encode("latin-1").decode("utf-8")
    except UnicodeDecodeError:
        return None
    return text if len(text) <= _MAX_VALUE and text.isprintable() else None


def _parse_text(text: str) -> str | None:
    return text


def _parse_name(text: str) -> str | None:
    return text if text.isascii() and " " not in text else None


def _parse_address(text: str) -> str | None:
    if not text:
        return UNKNOWN_ADDRESS
    bare = text[5:] if text[:5].upper() == "IPV6:" else text
    try:
        parsed = ipaddress.ip_address(bare)
    except ValueError:
        return None
    # Without its prefix an IPv6 address is no value of these commands; a scope is this machine's own matter.
    if (parsed.version == 6) is (bare is text) or "%" in bare:
        return None
    mapped = parsed.ipv4_mapped if parsed.version == 6 else None
    return str(mapped or parsed)


def _parse_port(text: str) -> int | None:
    if not text:
        return 0
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 65535 else None


def _parse_protocol(text: str) -> str | None:
    return text.upper() if text.upper() in ("", "SMTP", "ESMTP", "LMTP") else None


def _parse_source(text: str) -> str | None:
    return text.upper() if text.upper() in ("", "LOCAL", "REMOTE") else None


_OF_BOTH = {"NAME": "name", "ADDR": "address", "PORT": "port", "PROTO": "protocol", "HELO": "helo"}
_OF_XCLIENT = {**_OF_BOTH, "LOGIN": "login", "DESTADDR": "our_address", "DESTPORT": "our_port"}
_OF_XFORWARD = {**_OF_BOTH, "IDENT": "ident", "SOURCE": "source"}
_PARSE: dict[str, Any] = {
    "name": _parse_name,
    "address": _parse_address,
    "our_address": _parse_address,
    "port": _parse_port,
    "our_port": _parse_port,
    "protocol": _parse_protocol,
    "source": _parse_source,
}
