# SPDX-License-Identifier: MIT
"""BDAT: content whose length is said before it comes, in one chunk or many (RFC 3030 §2).

Guarantees: exactly the octets that a BDAT announced are its chunk, kept or not, so that what stands behind it is the next
command whatever became of the chunk (HOSTILE F11); limits are those of DATA and hold over all chunks of a message; a chunk
that cannot be kept spoils the message, and is answered once it has come.

Never: undoes dot-stuffing, or looks for an end in a chunk.
"""

from __future__ import annotations

import re

from polarismail.values.reply import Reply
from polarismail.wire.content import ContentReader
from polarismail.wire.smtp_events import EndOfChunk, EndOfData, Refused

_BDAT = re.compile(r"([0-9]{1,20})(?: +(.*))?", re.DOTALL)


def parse_bdat(argument: str) -> tuple[int, bool | None] | None:
    """`chunk-size [LAST]`: how many octets, and whether they are the last ones; None for the latter where something else
    stands there, and for all where there is no size: nobody knows then where the next command begins."""
    found = _BDAT.fullmatch(argument)
    if found is None:
        return None
    word = found[2] or ""
    return int(found[1]), True if word.upper() == "LAST" else None if word else False


class Chunks:
    """The chunks of one message; `begin` each, `receive` until nothing is `left`, then `end`.

    `refusal`: nothing is kept, and this is the answer. `outside`: there is no transaction that the chunk could belong to.
    """

    __slots__ = ("_begun", "_last", "_reader", "_refusal", "left", "outside", "received")

    def __init__(self, reader: ContentReader | None, refusal: Reply | None = None, *, outside: bool = False) -> None:
        self._reader, self._refusal, self.outside = reader, refusal, outside
        self._begun = self.left = self.received = 0
        self._last = False

    def begin(self, octets: int, last: bool) -> None:
        """The next chunk."""
        self._begun = self.left = octets
        self._last = last

    def spoil(self, refusal: Reply) -> None:
        """Something is missing from now on: the message must not be stored."""
        self._reader, self._refusal = None, refusal

    def receive(self, octets: bytes) -> bytes:
        """Octets of the chunk in, content out."""
        self.left -= len(octets)
        self.received += len(octets)
        return self._reader.receive(octets) if self._reader is not None else b""

    def end(self) -> tuple[bytes, EndOfChunk | EndOfData | Refused]:
        """The chunk is complete: what is left of the content, and what happened."""
        reader, refusal = self._reader, self._refusal
        if self.outside:
            assert refusal is not None
            return b"", Refused(refusal)
        if not self._last:
            return b"", EndOfChunk(self._begun, refusal if reader is None else reader.problem)
        if reader is None:
            return b"", EndOfData(0, 0, refusal)
        piece = reader.finish()
        return piece, EndOfData(reader.size, reader.bare, reader.problem)

    @property
    def is_last(self) -> bool:
        """The present chunk ends the message."""
        return self._last
