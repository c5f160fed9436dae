# SPDX-License-Identifier: MIT
"""Addresses of the envelope: one strict parser, and a value whose parts are what is stored and judged.

RFC 5321 §4.1.2 (grammar), §4.1.3 (address literals), §4.5.3.1 (sizes); RFC 5891 (A-labels); RFC 6531 §3.3 (UTF-8). The
local part is opaque: `%`, `!` and a quoted `@` are plain characters and never route anything (HOSTILE A1). Nothing here is
lenient, because the relay decision is taken on what this parser returns.
"""

from __future__ import annotations

import ipaddress
import re

from attrs import frozen

from polarismail.values.errors import BadAddress

_ATEXT = r"A-Za-z0-9!#$%&'*+/=?^_`{|}~\-"
# RFC 6531 §3.3, without what ends a line or turns one around somewhere: C1 controls, line and paragraph separators, surrogates.
_BEYOND = r"\u00a0-\u2027\u202f-\u2065\u206a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff"
_DOT_STRING = re.compile(rf"[{_ATEXT}{_BEYOND}]+(?:\.[{_ATEXT}{_BEYOND}]+)*")
_QUOTED_STRING = re.compile(rf'"((?:[\x20\x21\x23-\x5b\x5d-\x7e{_BEYOND}]|\\[\x20-\x7e])*)"')
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_ESCAPED = re.compile(r"\\(.)")
_AT_DOMAIN = re.compile(r"@[^,:@<>\s]+(?:,@[^,:@<>\s]+)*:")

MAX_LOCAL_OCTETS = 64
MAX_DOMAIN_OCTETS = 255
MAX_PATH_OCTETS = 256


@frozen
class Mailbox:
    """`local@domain`. `local` is unquoted and opaque; `domain` is lower case, or an address literal in brackets.

    The domain may hold U-labels where SMTPUTF8 brought it; `domain_ascii` is what DNS and comparisons use.
    The only Mailbox without a domain is the bare `Postmaster` of RFC 5321 §4.1.1.3 (`domain == ""`).
    """

    local: str
    domain: str

    @classmethod
    def parse(cls, text: str) -> Mailbox:
        """Read `local@domain` or `"quoted"@domain`. Raises BadAddress; never returns an address that it changed."""
        local, rest = _parse_local(text)
        if rest[:1] != "@":
            raise BadAddress("an address is local@domain")
        return cls(local, parse_domain(rest[1:]))

    @property
    def is_ascii(self) -> bool:
        """False when only an SMTPUTF8 next hop can take it (RFC 6531)."""
        return self.local.isascii() and self.domain.isascii()

    @property
    def domain_ascii(self) -> str:
        """The domain in A-labels."""
        return self.domain if self.domain.isascii() else to_ascii(self.domain)

    @property
    def in_ascii(self) -> Mailbox:
        """The same mailbox with its domain in A-labels; what is beyond ASCII in the local part has no other form."""
        return self if self.domain.isascii() else Mailbox(self.local, to_ascii(self.domain))

    def __str__(self) -> str:
        """As it stands in a path, quoted where it must be."""
        local = self.local
        if not local.isalnum() and not _DOT_STRING.fullmatch(local):
            local = quote(local)
        return f"{local}@{self.domain}" if self.domain else local


def parse_path(text: str) -> Mailbox | None:
    """Read the inside of `<...>` of MAIL or RCPT: None for the null path; a source route is dropped (RFC 5321 §C).

    Raises BadAddress.
    """
    if not text:
        return None
    if len(text) > MAX_PATH_OCTETS * 4:
        raise BadAddress("the path is too long")
    if text[0] == "@":
        route = _AT_DOMAIN.match(text)
        if route is None:
            raise BadAddress("broken source route")
        text = text[route.end() :]
    return Mailbox.parse(text)


def parse_domain(text: str) -> str:
    """A domain name or an address literal, in lower case. Raises BadAddress (no trailing dot, no empty label)."""
    if text[:1] == "[":
        return _parse_literal(text)
    lowered = text.lower()
    if not lowered.isascii():
        to_ascii(lowered)
        return lowered
    _check_labels(lowered)
    return lowered


def to_ascii(domain: str) -> str:
    """U-labels to A-labels (UTS 46, non-transitional). Raises BadAddress."""
    if domain.isascii():
        _check_labels(domain)
        return domain
    import idna

    try:
        encoded = idna.encode(domain, uts46=True, transitional=False).decode("ascii")
    except (idna.IDNAError, UnicodeError) as problem:
        raise BadAddress("the domain is no valid internationalised name") from problem
    _check_labels(encoded)
    return encoded


def quote(local: str) -> str:
    """A quoted string (RFC 5321 §4.1.2)."""
    return '"' + local.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _parse_local(text: str) -> tuple[str, str]:
    if text[:1] == '"':
        found = _QUOTED_STRING.match(text)
        local = _ESCAPED.sub(r"\1", found[1]) if found else ""
        if not local:
            raise BadAddress("empty or broken quoted local part")
    else:
        found = _DOT_STRING.match(text)
        local = found[0] if found else ""
        if not local:
            raise BadAddress("the local part is empty or holds a character that must be quoted")
    assert found is not None
    if len(local.encode("utf-8", "replace")) > MAX_LOCAL_OCTETS:
        raise BadAddress(f"the local part is longer than {MAX_LOCAL_OCTETS} octets")
    return local, text[found.end() :]


def _check_labels(domain: str) -> None:
    if not domain or len(domain) > MAX_DOMAIN_OCTETS:
        raise BadAddress(f"a domain has 1 to {MAX_DOMAIN_OCTETS} octets")
    labels = domain.split(".")
    for label in labels:
        if not _LABEL.fullmatch(label):
            raise BadAddress("a label of the domain is empty, too long, or holds a character that it may not")
    if labels[-1].isdigit():
        # `user@127.0.0.1` without brackets is no domain (RFC 5321 §4.1.3); no top-level domain is numeric.
        raise BadAddress("an address without brackets is no domain")


def _parse_literal(text: str) -> str:
    inner = text[1:-1]
    if text[-1:] != "]" or not inner:
        raise BadAddress("broken address literal")
    try:
        if inner[:5].lower() == "ipv6:":
            return f"[IPv6:{ipaddress.IPv6Address(inner[5:])}]"
        return f"[{ipaddress.IPv4Address(inner)}]"
    except ValueError as problem:
        raise BadAddress("broken address literal") from problem


def literal_address(domain: str) -> str:
    """The address inside a literal that `parse_domain` returned: `[IPv6:::1]` gives `::1`."""
    inner = domain[1:-1]
    return inner[5:] if inner[:5] == "IPv6:" else inner
