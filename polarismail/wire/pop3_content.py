# SPDX-License-Identifier: MIT
"""A stored message as POP3 sends it: CRLF line ends, dot-stuffed, for any slicing of what is read from disk.

RFC 1939 §3 (multi-line replies), §7 (TOP). A bare LF gets its CR; a CRLF that is stored as such stays one; every other octet
is sent as it is. Work per octet is a few scans at C speed; only TOP looks at single lines, and only in the piece where it ends.
"""

from __future__ import annotations


class MessageEncoder:
    """Stored octets in, wire octets out. `top_lines`: the header section and so many lines of the body; None: everything.

    `done` is set when no more octets are needed; `finish` must be called all the same.
    """

    __slots__ = ("_held", "_in_header", "_line_start", "_lines", "done")

    def __init__(self, top_lines: int | None = None) -> None:
        self._held = b""  # a CR that may be half of a CRLF
        self._lines = top_lines
        self._in_header = top_lines is not None
        self._line_start = True
        self.done = False

    def receive(self, octets: bytes) -> bytes:
        """The next octets of the file in, octets for the wire out."""
        if self.done:
            return b""
        octets = self._held + octets
        self._held = b"\r" if octets[-1:] == b"\r" else b""
        if self._held:
            octets = octets[:-1]
        return self._send(octets)

    def finish(self) -> bytes:
        """What ends the reply, with the last line's CRLF where it has none."""
        held, self._held = self._held, b""
        last = self._send(held) if held and not self.done else b""
        return last + (b".\r\n" if self._line_start else b"\r\n.\r\n")

    def _send(self, octets: bytes) -> bytes:
        if b"\r\n" in octets:
            octets = octets.replace(b"\r\n", b"\n")
        if self._lines is not None:
            octets = self._cut(octets)
        if not octets:
            return b""
        stuffed = b"." + octets if self._line_start and octets[:1] == b"." else octets
        self._line_start = octets[-1:] == b"\n"
        return stuffed.replace(b"\n.", b"\n..").replace(b"\n", b"\r\n")

    def _cut(self, octets: bytes) -> bytes:
        """As much as TOP wants; LF line ends."""
        start = 0
        if self._in_header:
            start = self._header_end(octets)
            if start < 0:
                return octets
            self._in_header = False
        assert self._lines is not None
        there = octets.count(b"\n", start)
        if there < self._lines:
            self._lines -= there
            return octets
        for _ in range(self._lines):
            start = octets.index(b"\n", start) + 1
        self.done = True
        return octets[:start]

    def _header_end(self, octets: bytes) -> int:
        """Where the body begins, -1 while the header section goes on."""
        if self._line_start and octets[:1] == b"\n":
            return 1
        at = octets.find(b"\n\n")
        return at + 2 if at >= 0 else -1
