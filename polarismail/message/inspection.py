# SPDX-License-Identifier: MIT
"""One look at a header section that has just arrived: how far it travelled, what is wrong with it, what it has no right to say.

Guarantees: linear in the section; a section in order, without fields of ours, costs a few scans at C speed and no parsing.
What is taken out is whole fields, and nothing else is changed.

Never: raises on octets that are no mail.

RFC 5322 §3.6 (how often a field may stand), RFC 8601 §5 (a forged Authentication-Results goes), RFC 5321 §4.4 (Return-Path);
HOSTILE sections 4 and 5.
"""

from __future__ import annotations

import re

from attrs import frozen

from polarismail.message.headers import MAX_SECTION_OCTETS, Field, field_values, iterate_fields, section_end
from polarismail.values.address import Mailbox
from polarismail.values.errors import BadAddress

MAX_FIELD_OCTETS = 65536  # HOSTILE section 0

_NAME = re.compile(rb"\n([!-9;-~]++):")
_IN_ORDER = re.compile(rb"\n(?:[!-9;-~]++:.*+\n(?:[ \t].*+\n)*+)*+")
_PLAIN_FROM = re.compile(rb"\nfrom:[^@,(\n]*+@[^@,(\n]*+\n(?![ \t])")
_SINGLE = frozenset({b"from", b"sender", b"subject", b"date", b"to", b"cc", b"reply-to", b"message-id"})
_SHOWN = {b"message-id": "Message-ID"}
_RESULTS, _RETURN_PATH, _DELIVERED_TO = b"authentication-results", b"return-path", b"delivered-to"
_OURS_TO_SAY = frozenset({_RESULTS, _RETURN_PATH, _DELIVERED_TO})
_MAX_DEFECTS = 5
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*+"')
_ANGLE = re.compile(r"<([^<>]*)>")


@frozen
class Inspection:
    """What was found. `defects` are words for the sender, the gravest first, none where all is well."""

    received: int  # Received fields, for the loop limit (RFC 5321 §6.3)
    defects: tuple[str, ...] = ()
    claims: bool = (
        False  # it has fields that only we may write, or Delivered-To: `remove_claims` and `has_been_in` look closer
    )


_IN_GOOD_ORDER = [Inspection(received) for received in range(32)]


def inspect(section: bytes) -> Inspection:
    """Look at a header section (with its last CRLF, without the empty line)."""
    text = b"\n" + section.lower()
    names: list[bytes] = _NAME.findall(text)
    different = set(names)
    received = names.count(b"received")
    repeated = len(names) - len(different)
    if (
        # Received alone stands there more than once, as a rule.
        (repeated and repeated != received - 1 and any(names.count(name) > 1 for name in _SINGLE & different))
        or len(section) > MAX_FIELD_OCTETS
        or _PLAIN_FROM.search(text) is None
        or _IN_ORDER.fullmatch(text) is None
    ):
        return _look_closer(section)
    if _OURS_TO_SAY.isdisjoint(different):
        return _IN_GOOD_ORDER[received] if received < len(_IN_GOOD_ORDER) else Inspection(received)
    return Inspection(received, (), True)


def _look_closer(section: bytes) -> Inspection:
    fields = list(iterate_fields(section))
    names = [field.name for field in fields]
    defects: list[str] = []
    if section[:1] in (b" ", b"\t"):
        defects.append("the header section begins with white space")
    for name in sorted(_SINGLE):
        if names.count(name) > 1:
            defects.append(f"more than one {_SHOWN.get(name, name.decode().title())} field")
    if b"from" not in names:
        defects.append("no From field")
    else:
        values = field_values(section, b"from")
        addresses = [address for value in values for address in addresses_in(value)]
        if not addresses:
            defects.append("From has no address")
        elif len(addresses) > len(values):
            defects.append("From has several addresses")
    if b"" in names:
        defects.append("a header line without a colon")
    if any(field.name and not _is_name(field.name) for field in fields):
        defects.append("a field name with characters that no name may have")
    if any(field.end - field.start > MAX_FIELD_OCTETS for field in fields):
        defects.append(f"a field of more than {MAX_FIELD_OCTETS} octets")
    claims = not _OURS_TO_SAY.isdisjoint(names)
    return Inspection(names.count(b"received"), tuple(defects[:_MAX_DEFECTS]), claims)


def _is_name(name: bytes) -> bool:
    return all(33 <= octet <= 126 for octet in name)


# -- addresses of a field ----------------------------------------------------------------------------------------------------


def addresses_in(value: bytes) -> list[str]:
    """What stands as an address in an address list (RFC 5322 §3.4), display names and comments left out; not judged.

    An item without an `@` is none, so that empty groups and nothing at all give the empty list.
    """
    text = value.decode("utf-8", "replace").replace("\r\n", "")
    found: list[str] = []
    for item in _split_list(_drop_comments(text)):
        angle = _ANGLE.findall(_QUOTED.sub(_keep_local_part, item))
        candidates = angle if angle else [item.rpartition(":")[2] if '"' not in item else item]
        found.extend(one for candidate in candidates if "@" in (one := candidate.replace("\0", '"').strip(" \t;")))
    return found


def author(section: bytes) -> Mailbox | None:
    """The one address of From; None where there is not just one that the grammar of RFC 5321 §4.1.2 knows."""
    found = [address for value in field_values(section, b"from") for address in addresses_in(value)]
    try:
        return Mailbox.parse(found[0]) if len(found) == 1 else None
    except BadAddress:
        return None


def _keep_local_part(found: re.Match[str]) -> str:
    """A quoted string that is a local part stays; a display name, which may hold anything, goes."""
    text = found.string
    if text[found.end() : found.end() + 1] == "@":
        return found[0].replace("<", "").replace(">", "").replace('"', "\0")
    return ""


def _drop_comments(text: str) -> str:
    """Without what stands in parentheses, nested ones too; an open end is a comment up to the end. Linear."""
    if "(" not in text:
        return text
    kept: list[str] = []
    depth, at = 0, 0
    quoted = False
    while at < len(text):
        letter = text[at]
        if letter == "\\" and (quoted or depth):
            kept.append("" if depth else text[at : at + 2])
            at += 2
            continue
        if letter == '"' and not depth:
            quoted = not quoted
        if not quoted and letter == "(":
            depth += 1
        elif not quoted and letter == ")" and depth:
            depth -= 1
        elif not depth:
            kept.append(letter)
        at += 1
    return "".join(kept)


def _split_list(text: str) -> list[str]:
    """At the commas and group ends that no quotes hold."""
    if '"' not in text:
        return re.split("[,;]", text)
    items: list[str] = []
    at = 0
    held = ""
    for found in _QUOTED.finditer(text):
        *whole, last = re.split("[,;]", text[at : found.start()])
        for piece in whole:
            items.append(held + piece)
            held = ""
        held += last + found[0]
        at = found.end()
    *whole, last = re.split("[,;]", text[at:])
    for piece in whole:
        items.append(held + piece)
        held = ""
    return [*items, held + last]


# -- fields that only we may write ------------------------------------------------------------------------------------------


def remove_claims(section: bytes, hostname: str, *, final: bool) -> tuple[bytes, int]:
    """The section without results that claim to be this host's, and how many fields went.

    `final`: nobody relays the message from here, so that a Return-Path goes as well (RFC 5321 §4.4: a relay must not look).
    """
    fields = list(iterate_fields(section))
    gone = [field for field in fields if _claims(section, field, hostname.lower(), final)]
    if not gone:
        return section, 0
    pieces, at = [], 0
    for field in gone:
        pieces.append(section[at : field.start])
        at = field.end
    pieces.append(section[at:])
    return b"".join(pieces), len(gone)


def _claims(section: bytes, field: Field, hostname: str, final: bool) -> bool:
    if field.name == _RETURN_PATH:
        return final
    return field.name == _RESULTS and _service_of(section[field.value : field.end]) in (hostname, "")


def _service_of(value: bytes) -> str:
    """The authserv-id of an Authentication-Results field (RFC 8601 §2.2); "" where none can be made out."""
    text = _drop_comments(value.decode("utf-8", "replace").replace("\r\n", "")).strip().lower()
    quoted = _QUOTED.match(text)
    if quoted is not None:
        text = re.sub(r"\\(.)", r"\1", quoted[0][1:-1])
    else:
        text = re.split(r"[\s;]", text, maxsplit=1)[0]
    return text.strip().rstrip(".")


def has_been_in(section: bytes, mailbox: Mailbox) -> bool:
    """Whether the message says that it was delivered to this mailbox before (HOSTILE section 5)."""
    ours = str(mailbox).lower().encode("utf-8", "replace")
    return any(value.lower() == ours for value in field_values(section, _DELIVERED_TO))


# -- while it arrives ---------------------------------------------------------------------------------------------------


class HeaderCollector:
    """Holds the header section back until it is complete, however it was sliced, and never more than its limit and one piece.

    `section` and `rest` (from the empty line on) are there when `receive` has said so, or after `finish`.
    """

    __slots__ = ("_held", "_looked", "rest", "section")

    def __init__(self) -> None:
        self._held: bytearray | None = None
        self._looked = 0
        self.section = self.rest = b""

    def receive(self, octets: bytes) -> bool:
        """The next octets in; True when the section is complete, or longer than any that is taken."""
        if self._held is None:
            if octets[:2] == b"\r\n" or octets.find(b"\r\n\r\n") >= 0 or len(octets) > MAX_SECTION_OCTETS:
                self._cut(octets)
                return True
            self._held = bytearray(octets)
            return False
        held = self._held
        held += octets
        at = held.find(b"\r\n\r\n", max(0, self._looked - 3))
        self._looked = len(held)
        if at < 0 and held[:2] != b"\r\n" and len(held) <= MAX_SECTION_OCTETS:
            return False
        self.finish()
        return True

    def finish(self) -> None:
        """The content has ended."""
        held, self._held = self._held, None
        if held is not None:
            self._cut(bytes(held))

    def _cut(self, octets: bytes) -> None:
        end = section_end(octets)
        if end > MAX_SECTION_OCTETS:
            end = octets.rfind(b"\n", 0, MAX_SECTION_OCTETS) + 1
        self.section, self.rest = octets[:end], octets[end:]
