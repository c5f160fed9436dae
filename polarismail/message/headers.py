# SPDX-License-Identifier: MIT
"""The header section by offsets: what was received is looked at, never re-serialised.

RFC 5322 §2.2 and §4.5.8 (white space before the colon is read, as old senders wrote it). Lines end with CRLF, as the spool
keeps them.

Guarantees: every function is linear in the octets that it is given and looks at `MAX_SECTION_OCTETS` and `MAX_FIELDS` at
most, whatever they hold; none raises on octets that are no mail.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import lru_cache

from attrs import frozen

MAX_SECTION_OCTETS = 102400
MAX_FIELDS = 1000

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


@frozen
class Field:
    """Where one field stands: `octets[start:end]` is all of it with its CRLF, `octets[value:end]` is what follows the colon.

    `name` is in lower case. A line without a colon (and without white space in front) has the name `b""`.
    """

    name: bytes
    start: int
    value: int
    end: int


def section_end(octets: bytes) -> int:
    """Length of the header section with its last CRLF, without the empty line; all octets where no empty line is in sight."""
    if octets[:2] == b"\r\n":
        return 0
    at = octets.find(b"\r\n\r\n")
    return len(octets) if at < 0 else at + 2


def header_section(octets: bytes) -> bytes:
    """The header section, without the empty line that ends it, and never more than `MAX_SECTION_OCTETS` of it."""
    return octets[: min(section_end(octets), MAX_SECTION_OCTETS)]


def iterate_fields(octets: bytes) -> Iterator[Field]:
    """The fields of the header section in their order, at most `MAX_FIELDS`. White-space lines before the first field are
    skipped."""
    end = min(section_end(octets), MAX_SECTION_OCTETS)
    start, seen = 0, 0
    while start < end and seen < MAX_FIELDS:
        stop = _field_end(octets, start, end)
        if octets[start : start + 1] not in (b" ", b"\t"):
            colon = octets.find(b":", start, stop)
            first_line = octets.find(b"\r\n", start, stop)
            if colon < 0 or 0 <= first_line < colon:
                yield Field(b"", start, start, stop)
            else:
                yield Field(octets[start:colon].rstrip(b" \t").lower(), start, colon + 1, stop)
            seen += 1
        start = stop


def field_values(octets: bytes, name: bytes) -> list[bytes]:
    """What follows the colon of each field of that name, unfolded (RFC 5322 §2.2.3) and stripped. `name` in any case."""
    wanted = name.lower()
    return [
        octets[field.value : field.end].replace(b"\r\n", b"").strip()
        for field in iterate_fields(octets)
        if field.name == wanted
    ]


def has_field(octets: bytes, name: bytes) -> bool:
    """Whether the header section holds a field of that name. `name` in any case."""
    wanted = name.lower()
    section = header_section(octets).lower()
    if not section.startswith(wanted) and b"\r\n" + wanted not in section:
        return False
    return any(field.name == wanted for field in iterate_fields(section))


def render_date(when: float) -> str:
    """`Sun, 22 Nov 2026 02:53:50 +0000` (RFC 5322 §3.3), always in UTC; `when` is seconds since 1970."""
    return _render_date(int(when))


@lru_cache(maxsize=8)
def _render_date(when: int) -> str:
    # strftime would speak the language of the process's locale.
    at = time.gmtime(when)
    return "%s, %02d %s %04d %02d:%02d:%02d +0000" % (
        _DAYS[at.tm_wday],
        at.tm_mday,
        _MONTHS[at.tm_mon - 1],
        at.tm_year,
        at.tm_hour,
        at.tm_min,
        at.tm_sec,
    )


def _field_end(octets: bytes, start: int, end: int) -> int:
    """Where the field that begins at `start` ends: the first CRLF that no white space follows."""
    at = start
    while True:
        at = octets.find(b"\r\n", at, end)
        if at < 0:
            return end
        at += 2
        if octets[at : at + 1] not in (b" ", b"\t") or at >= end:
            return at
