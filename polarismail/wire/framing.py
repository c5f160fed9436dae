# SPDX-License-Identifier: MIT
"""Where the content of a message ends, for any slicing of the octet stream: dot-stuffing both ways.

Guarantees: only CRLF "." CRLF ends the content (RFC 5321 §4.1.1.4, §4.5.2; HOSTILE F1); no octet behind the end is
touched; the work per octet is a few scans at C speed, with no work per line.

Never: lets a bare CR or LF take part in the end of data, in either direction.
"""

from __future__ import annotations

_END = b"\r\n.\r\n"


class DotDecoder:
    """Undo dot-stuffing, and make every bare CR or LF a CRLF, counting them in `bare`.

    `rest` is None until the end of data is seen, then the octets behind it. At most four octets are held back.
    """

    __slots__ = ("_held", "_line_start", "bare", "rest")

    def __init__(self) -> None:
        self._held = b""
        self._line_start = True  # after a real CRLF only, and at the very beginning
        self.bare = 0
        self.rest: bytes | None = None

    def receive(self, octets: bytes) -> bytes:
        """The next octets of the stream in, content out. Not to be called once `rest` is set."""
        buffer = self._held + octets if self._held else octets
        start = 0
        if self._line_start and buffer[:1] == b".":
            if buffer[:3] == b".\r\n":
                self._held, self.rest = b"", buffer[3:]
                return b""
            if len(buffer) < 3 and b".\r\n".startswith(buffer):
                self._held = buffer
                return b""
            start, self._line_start = 1, False
        dot = buffer.find(b"\r\n.", start)
        end = buffer.find(_END, dot) if dot >= 0 else -1
        if end >= 0:
            body = buffer[start : end + 2]
            self._held, self.rest = b"", buffer[end + 5 :]
            stuffed = dot < end
        else:
            held = _undecided(buffer, start)
            body = buffer[start : len(buffer) - held]
            self._held = buffer[len(buffer) - held :] if held else b""
            if body:
                self._line_start = body.endswith(b"\r\n")
            stuffed = dot >= 0
        if stuffed:
            body = body.replace(b"\r\n.", b"\r\n")
        bare = body.count(b"\r") + body.count(b"\n") - 2 * body.count(b"\r\n")
        if bare:
            self.bare += bare
            body = body.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")
        return body


def _undecided(buffer: bytes, start: int) -> int:
    """How many octets at the end cannot be judged before the next ones come."""
    if buffer.endswith(b"\r", start):
        return 2 if buffer.endswith(b"\r\n.\r", start) else 1
    return 1 if buffer.endswith(b"\r\n.", start) else 0


class DotEncoder:
    """Dot-stuff content whose lines end with CRLF, for any slicing (RFC 5321 §4.5.2).

    The content must not hold a bare CR or LF: what came in through DotDecoder does not.
    """

    __slots__ = ("_tail",)

    def __init__(self) -> None:
        self._tail = b"\r\n"  # the last two octets of the content so far; a line starts at the very beginning

    def receive(self, octets: bytes) -> bytes:
        """Content in, octets for the wire out."""
        if not octets:
            return b""
        joined = self._tail + octets
        self._tail = joined[-2:]
        return joined.replace(b"\r\n.", b"\r\n..")[len(joined) - len(octets) :]

    def finish(self) -> bytes:
        """What ends the data; a CRLF is added where the content did not end with one."""
        return b".\r\n" if self._tail == b"\r\n" else _END
