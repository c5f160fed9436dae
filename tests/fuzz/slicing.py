# SPDX-License-Identifier: MIT
"""Octets of an input as decisions: numbers, choices, and where a stream is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """Takes decisions off the front of an input; an input that is too short decides for the first of everything."""

    def __init__(self, octets: bytes) -> None:
        self._octets, self._at = octets, 0

    def octet(self) -> int:
        """The next one, or 0."""
        self._at += 1
        return self._octets[self._at - 1] if self._at <= len(self._octets) else 0

    def one_of(self, values: Sequence[T]) -> T:
        """One of these."""
        return values[self.octet() % len(values)]

    def rest(self) -> bytes:
        """What no decision has taken."""
        return self._octets[self._at :]


def cut(octets: bytes, pattern: int) -> list[bytes]:
    """In pieces: octet by octet for pattern 0 (and 16, 32...), else of lengths up to 16 that `pattern` leads to."""
    if pattern == 0:
        return [octets[at : at + 1] for at in range(len(octets))]
    pieces, at, state = [], 0, pattern
    while at < len(octets):
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF
        length = (state >> 16) % (pattern % 16 + 1) + 1
        pieces.append(octets[at : at + length])
        at += length
    return pieces
