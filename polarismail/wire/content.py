# SPDX-License-Identifier: MIT
"""Content on its way in, bounded: what may be stored comes out, what forbids storing it is remembered.

Guarantees: memory does not grow with the content; once a problem is known nothing more is given out, but reading goes on
to the real end of data, so that no octet of the content is ever taken for a command; and the problem that is reported
does not depend on how the octets were sliced. HOSTILE F1-F3, F5, F9.
"""

from __future__ import annotations

import re

from polarismail.values.reply import (
    BARE_LINE_END,
    HEADER_TOO_BIG,
    NUL_IN_CONTENT,
    TEXT_LINE_TOO_LONG,
    TOO_BIG,
    Reply,
)
from polarismail.wire.framing import ChunkDecoder, DotDecoder

_NO_FIELD = re.compile(rb"^(?![!-9;-~]{1,256}[ \t]*:|[ \t])", re.MULTILINE)


class ContentReader:
    """Reads one message's content; what ends it, and which dots are no content, is its decoder's matter.

    `rest` is None until the end of data, then the octets behind it. `size` counts octets as stored, `received` raw ones.
    """

    __slots__ = (
        "_decoder",
        "_header",
        "_header_lines",
        "_header_too_big",
        "_line",
        "_long",
        "_max_header",
        "_max_line",
        "_max_lines",
        "_max_octets",
        "_nul",
        "_refuse_bare",
        "received",
        "rest",
        "size",
    )

    def __init__(
        self,
        decoder: DotDecoder | ChunkDecoder,
        *,
        max_octets: int,
        max_line_octets: int,
        refuse_bare: bool,
        max_header_octets: int,
        max_header_lines: int,
    ) -> None:
        self._decoder = decoder
        self._max_octets, self._max_line, self._refuse_bare = max_octets, max_line_octets, refuse_bare
        self._max_header, self._max_lines = max_header_octets, max_header_lines
        self._header: bytearray | None = bytearray()  # the header section as far as it has come; None once judged
        self._header_lines = 0
        self._line = 0  # octets of the line that the last piece ended in
        self._nul = self._long = self._header_too_big = False
        self.size = self.received = 0
        self.rest: bytes | None = None

    @property
    def bare(self) -> int:
        """CRs and LFs met alone."""
        return self._decoder.bare

    @property
    def problem(self) -> Reply | None:
        """Why the content must not be stored: always the same one for the same octets."""
        if self.size > self._max_octets:
            return TOO_BIG
        if self._nul:
            return NUL_IN_CONTENT
        if self._refuse_bare and self._decoder.bare:
            return BARE_LINE_END
        if self._header_too_big:
            return HEADER_TOO_BIG
        if self._long:
            return TEXT_LINE_TOO_LONG
        return None

    def receive(self, octets: bytes) -> bytes:
        """The next octets of the stream in; the next piece of content out, b"" when there is none to keep."""
        self.received += len(octets)
        piece = self._decoder.receive(octets)
        rest = self._decoder.rest
        if rest is not None:
            self.rest = rest
            self.received -= len(rest)
        if piece:
            self.size += len(piece)
            if b"\0" in piece:
                self._nul = True
            self._measure_lines(piece)
            if self._header is not None:
                self._measure_header(piece, self._header)
        return piece if self.problem is None else b""

    def finish(self) -> bytes:
        """The content ends here, because its length says so: the last piece of it."""
        assert isinstance(self._decoder, ChunkDecoder)
        self._decoder.finish()
        return self.receive(b"")

    def _measure_lines(self, piece: bytes) -> None:
        """Find a line over the limit, in hops that are as long as the limit rather than line by line.

        Pieces never end between CR and LF, so that what stands behind the last LF is text of the next line.
        """
        if self._long:
            return
        limit, length, line, at = self._max_line, len(piece), self._line, 0
        while line + length - at > limit:
            at = piece.rfind(b"\n", at, at + limit + 2 - line) + 1
            if at == 0:
                self._long = True
                return
            line = 0
        last = piece.rfind(b"\n", at)
        self._line = length - last - 1 if last >= 0 else line + length - at

    def _measure_header(self, piece: bytes, header: bytearray) -> None:
        """Judge the size of the header section as soon as its end, or one line or octet too many, has come."""
        end = piece.find(b"\r\n\r\n")
        if not header and 0 <= end <= self._max_header - 2 and piece.count(b"\n", 0, end) < self._max_lines:
            self._header = None
            return
        known = len(header)
        header += piece[: self._max_header + 1 - known]
        self._header_lines += header.count(b"\n", known)
        if (
            len(header) > self._max_header
            or self._header_lines > self._max_lines
            or header[:2] == b"\r\n"
            or header.find(b"\r\n\r\n", max(0, known - 3)) >= 0
        ):
            self._header_too_big = self._judge_header(header)
            self._header = None

    def _judge_header(self, header: bytearray) -> bool:
        """True when the limits are passed by what really are fields: a first line that is none ended the section."""
        known = header[: self._max_header]
        complete = known.rfind(b"\n") + 1
        found = _NO_FIELD.search(known, 0, complete)
        end = found.start() if found is not None else complete
        return end == complete or known.count(b"\n", 0, end) > self._max_lines
