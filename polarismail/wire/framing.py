# SPDX-License-Identifier: MIT
"""Where a line ends and where the content ends, for any slicing of the octet stream.

Guarantees: only CRLF ends a command line, only CRLF "." CRLF ends the content after DATA (RFC 5321 §2.3.8, §4.1.1.4,
§4.5.2; HOSTILE F1), and nothing but its length ends a chunk (RFC 3030 §2); no octet behind an end is touched; content costs
a few scans at C speed, and no work per line.

Never: lets a bare CR or LF take part in the end of data; undoes dot-stuffing in a chunk (HOSTILE F5).
"""

from __future__ import annotations

import enum

_CR = 0x0D
_TLS_HANDSHAKE = 0x16
_END = b"\r\n.\r\n"


class LineProblem(enum.Enum):
    """Why no line can be had. All but TOO_LONG leave a stream that nobody can read on from."""

    TOO_LONG = "a line over the limit; it is gone, the next one may be read"
    ENDLESS = "a line over every limit"
    BARE_LINE_FEED = "LF without CR"
    TLS = "a TLS handshake where a line should begin"


class LineReader:
    """CRLF-strict lines out of a stream, in bounded memory: an over-long line is dropped as it comes.

    `buffer` is empty when nothing waits; `len()` says how much does. `max_octets` counts the CRLF; a line that begins with
    `long_prefix` (upper case) may have `max_long_octets`.
    """

    __slots__ = ("_max", "_max_discarded", "_max_long", "_offset", "_prefix", "_skipped", "buffer")

    def __init__(self, max_octets: int, *, long_prefix: bytes, max_long_octets: int, max_discarded_octets: int) -> None:
        self._max, self._prefix, self._max_long = max_octets, long_prefix, max_long_octets
        self._max_discarded = max_discarded_octets
        self.buffer = b""
        self._offset = 0
        self._skipped = 0  # octets of an over-long line that are gone already

    def __len__(self) -> int:
        return len(self.buffer) - self._offset

    def receive(self, octets: bytes) -> None:
        """Append to what waits."""
        self.buffer = self.buffer[self._offset :] + octets if self.buffer else octets
        self._offset = 0

    def take(self) -> bytes:
        """Everything that waits, at once."""
        octets = self.buffer[self._offset :] if self._offset else self.buffer
        self.buffer, self._offset = b"", 0
        return octets

    def take_at_most(self, octets: int) -> bytes:
        """What waits, but not more than so much."""
        end = self._offset + octets
        if end >= len(self.buffer):
            return self.take()
        taken = self.buffer[self._offset : end]
        self._offset = end
        return taken

    def drop(self) -> None:
        """Forget everything that waits."""
        self.buffer, self._offset, self._skipped = b"", 0, 0

    def next_line(self, long: bool = False) -> bytes | LineProblem | None:
        """The next line without its CRLF; None when it has not come yet.

        `long`: this line may have `max_long_octets`, and may begin as it likes.
        """
        buffer, start = self.buffer, self._offset
        end = buffer.find(b"\n", start)
        if end < 0:
            return self._wait(long)
        if buffer[start] == _TLS_HANDSHAKE and not long and not self._skipped:
            return LineProblem.TLS
        if end == start or buffer[end - 1] != _CR:
            endless = self._skipped + end - start > self._max_discarded
            return LineProblem.ENDLESS if endless else LineProblem.BARE_LINE_FEED
        if self._skipped or end + 1 - start > self._max:
            problem = self._judge_length(self._skipped + end - 1 - start, start, long)
            if problem is not None:
                self._offset, self._skipped = end + 1, 0
                return problem
        if end + 1 == len(buffer):
            self.buffer, self._offset = b"", 0
        else:
            self._offset = end + 1
        return buffer[start : end - 1]

    def _wait(self, long: bool) -> LineProblem | None:
        buffer, start = self.buffer, self._offset
        if start == len(buffer):
            self.buffer, self._offset = b"", 0
            return None
        if buffer[start] == _TLS_HANDSHAKE and not long and not self._skipped:
            return LineProblem.TLS
        held = buffer[-1:] if buffer[-1] == _CR else b""
        length = self._skipped + len(buffer) - start - len(held)
        problem = self._judge_length(length, start, long)
        if problem is LineProblem.TOO_LONG:
            self._skipped = length
            self.buffer, self._offset = held, 0
            return None
        return problem

    def _judge_length(self, length: int, start: int, long: bool) -> LineProblem | None:
        if length > self._max_discarded:
            return LineProblem.ENDLESS
        if not self._skipped:
            prefix = self._prefix
            if long or self.buffer[start : start + len(prefix)].upper() == prefix:
                return LineProblem.TOO_LONG if length > self._max_long - 2 else None
            return LineProblem.TOO_LONG if length > self._max - 2 else None
        return LineProblem.TOO_LONG


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
        # A single octet is looked for at the speed of memory, three are not: attachments have no dots at all.
        dot = buffer.find(b".", start)
        if dot >= 0:
            dot = buffer.find(b"\r\n.", max(start, dot - 2))
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
        # Making every line end anew and comparing takes a quarter of the time that counting three times takes.
        if body.replace(b"\r", b"").replace(b"\n", b"\r\n") != body:
            self.bare += _count_bare(body)
            body = _normalise(body)
        return body


class ChunkDecoder:
    """Content in chunks: dots are content like any other octet; bare CRs and LFs are made CRLFs and counted in `bare`.

    A CRLF may be cut by the end of a chunk, so that one octet may be held back until `finish`.
    """

    __slots__ = ("_finished", "_held", "_line_start", "bare")
    rest: bytes | None = None  # the length says where chunks end: nothing in them does

    def __init__(self) -> None:
        self._held = b""
        self._line_start, self._finished = True, False
        self.bare = 0

    def finish(self) -> None:
        """No octet follows: the next `receive`, of none, gives out what is left.

        A last line without its CRLF gets one, uncounted, as a client that uses DATA must do itself (RFC 5321 §4.1.1.4):
        maildrops and next hops that are sent DATA need it, and DKIM signs as if it were there (RFC 6376 §3.4.3, §3.4.4).
        """
        self._finished = True

    def receive(self, octets: bytes) -> bytes:
        """The next octets of the chunks in, content out."""
        body = self._held + octets if self._held else octets
        if self._finished:
            self.bare += len(body)  # at most the one CR that was held
            return b"\r\n" if body or not self._line_start else b""
        if body.endswith(b"\r"):
            self._held, body = b"\r", body[:-1]
        else:
            self._held = b""
        if body:
            if body.replace(b"\r", b"").replace(b"\n", b"\r\n") != body:
                self.bare += _count_bare(body)
                body = _normalise(body)
            self._line_start = body.endswith(b"\n")
        return body


def _count_bare(text: bytes) -> int:
    """CRs and LFs that stand alone."""
    return text.count(b"\r") + text.count(b"\n") - 2 * text.count(b"\r\n")


def _normalise(text: bytes) -> bytes:
    """Every line end, whatever it was, is a CRLF."""
    return text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")


def _undecided(buffer: bytes, start: int) -> int:
    """How many octets at the end cannot be judged before the next ones come."""
    if buffer.endswith(b"\r", start):
        return 2 if buffer.endswith(b"\r\n.\r", start) else 1
    return 1 if buffer.endswith(b"\r\n.", start) else 0
