# SPDX-License-Identifier: MIT
"""Addresses and identifiers as DSN parameters and reports write them: xtext, and the three forms of a UTF-8 address.

RFC 3461 §4 (xtext), §4.2 (ORCPT); RFC 6533 §3 (the address type utf-8: `\\x{HEX}` for what may not stand as itself).

Guarantees: what is encoded here is printable ASCII without SP, and decodes to what it was.
"""

from __future__ import annotations

import re

from polarismail.values.address import Mailbox

XTEXT = re.compile(r"(?:[!-*,-<>-~]|\+[0-9A-F]{2})*")
_UTF8_ADDRESS = re.compile(r"(?:[!-*,-<>-\[\]-~\u00a0-\ud7ff\ue000-\U0010ffff]|\\x\{[0-9A-Fa-f]{2,6}\})+")
_ADDRESS_TYPE = re.compile(r"[A-Za-z0-9-]+")
_HEX = re.compile(r"\+([0-9A-F]{2})")
_POINT = re.compile(r"\\x\{([0-9A-Fa-f]{2,6})\}")
_NOT_XTEXT = re.compile(r"[^!-*,-<>-~]")
_NOT_QCHAR = re.compile(r"[^!-*,-<>-\[\]-~]")
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]")
_LAST_POINT = 0x10FFFF


def encode_xtext(text: str) -> str:
    """xtext of ASCII text (of anything else, its UTF-8 octets)."""
    return _NOT_XTEXT.sub(lambda found: "".join(f"+{octet:02X}" for octet in found[0].encode("utf-8", "replace")), text)


def decode_xtext(text: str) -> str:
    """Undo the xtext of RFC 3461 §4."""
    return _HEX.sub(lambda found: chr(int(found[1], 16)), text)


def encode_unitext(address: str) -> str:
    """The 7-bit form of a UTF-8 address (RFC 6533 §3, utf-8-addr-xtext)."""
    return _NOT_QCHAR.sub(_embed, address)


def decode_unitext(address: str) -> str:
    """The UTF-8 address behind any of its forms."""
    return _POINT.sub(_unembed, address)


def is_orcpt(value: str, *, smtputf8: bool = False) -> bool:
    """RFC 3461 §4.2: an address type, `;`, and xtext. With the type utf-8, RFC 6533 §3: octets beyond ASCII only where the
    transaction has SMTPUTF8."""
    kind, semicolon, address = value.partition(";")
    if not (semicolon and address and _ADDRESS_TYPE.fullmatch(kind)):
        return False
    if kind.lower() != "utf-8":
        return XTEXT.fullmatch(address) is not None
    if not _UTF8_ADDRESS.fullmatch(address) or not (smtputf8 or address.isascii()):
        return False
    return all(_is_scalar(int(point, 16)) for point in _POINT.findall(address))


def orcpt_in_ascii(orcpt: str) -> str:
    """The same original recipient for a next hop that takes no octets beyond ASCII (RFC 6533 §3)."""
    return orcpt if orcpt.isascii() else embed_beyond_ascii(orcpt)


def embed_beyond_ascii(text: str) -> str:
    """The text with `\\x{HEX}` in the place of what is not ASCII."""
    return _BEYOND_ASCII.sub(_embed, text)


def orcpt_of(mailbox: Mailbox) -> str:
    """The ORCPT that a recipient would have had, had its sender given one (RFC 3461 §5.2.1), in ASCII."""
    text = str(mailbox)
    return f"rfc822;{encode_xtext(text)}" if text.isascii() else f"utf-8;{encode_unitext(text)}"


def _embed(found: re.Match[str]) -> str:
    return f"\\x{{{ord(found[0]):02X}}}"


def _unembed(found: re.Match[str]) -> str:
    point = int(found[1], 16)
    return chr(point) if _is_scalar(point) else found[0]


def _is_scalar(point: int) -> bool:
    return point <= _LAST_POINT and not 0xD800 <= point <= 0xDFFF
