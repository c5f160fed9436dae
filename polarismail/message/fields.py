# SPDX-License-Identifier: MIT
"""Whether a content has header fields beyond ASCII, its own or those of its parts, found piece by piece.

RFC 6531 §3.6: only who looks knows whether a message that came with SMTPUTF8 needs it. RFC 2046 §5.1 (a part begins behind a
line of its boundary), RFC 6532 §3.

Guarantees: linear; no memory beyond the beginning of one line and `_MOST_BOUNDARIES` boundaries; never raises.
"""

from __future__ import annotations

import re

_KEPT_OCTETS = 1000  # of a line
_MOST_BOUNDARIES = 50
_BOUNDARY = re.compile(rb"boundary\s*=\s*(?:\"([^\"]{1,70})\"|([^\s;\"]{1,70}))", re.IGNORECASE)
_MESSAGE = re.compile(rb"message/(?:rfc822|global)", re.IGNORECASE)


class FieldScan:
    """Feed it the content from its first octet, in pieces of any size."""

    def __init__(self) -> None:
        self._in_fields = True
        self._holds_message = False  # the part whose fields these are begins with fields of its own
        self._boundaries: set[bytes] = set()
        self._line = b""  # the first octets of the line that is under way

    def receive(self, octets: bytes) -> bool:
        """Whether a field beyond ASCII has come; then nothing more need be given."""
        if not self._in_fields and not self._boundaries:
            return False
        lines = octets.split(b"\n")
        for at, line in enumerate(lines):
            if self._in_fields and not line.isascii():
                return True
            if len(self._line) < _KEPT_OCTETS:
                self._line += line[:_KEPT_OCTETS]
            if at < len(lines) - 1:
                self._end_line()
        return False

    def _end_line(self) -> None:
        line, self._line = self._line.rstrip(), b""
        if not self._in_fields:
            self._in_fields = line[:2] == b"--" and line[2:] in self._boundaries
        elif line:
            found = _BOUNDARY.search(line)
            if found and len(self._boundaries) < _MOST_BOUNDARIES:
                self._boundaries.add((found[1] or found[2]).rstrip())
            self._holds_message = self._holds_message or _MESSAGE.search(line) is not None
        else:
            self._in_fields, self._holds_message = self._holds_message, False
