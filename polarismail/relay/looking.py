# SPDX-License-Identifier: MIT
"""Looks into stored content, piece by piece, where what a next hop offers makes it matter; never for the others."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from twisted.internet.defer import Deferred

from polarismail.message.fields import FieldScan
from polarismail.store.interfaces import QueuedMessage

Read = Callable[[int, int], "Deferred[bytes]"]  # (offset, octets) -> octets


async def is_ascii(message: QueuedMessage, read: Read, piece_octets: int) -> bool:
    """For a next hop without 8BITMIME. Raises EOFError, and what `read` raises."""
    async for piece in _pieces(message, read, piece_octets):
        if not piece.isascii():
            return False
    return True


async def has_utf8_fields(message: QueuedMessage, read: Read, piece_octets: int) -> bool:
    """For an SMTPUTF8 message and a next hop without it (RFC 6531 §3.6). Raises EOFError, and what `read` raises."""
    fields = FieldScan()
    async for piece in _pieces(message, read, piece_octets):
        if fields.receive(piece):
            return True
    return False


async def _pieces(message: QueuedMessage, read: Read, piece_octets: int) -> AsyncIterator[bytes]:
    if message.inline is not None:
        yield message.inline
        return
    offset = 0
    while offset < message.size:
        piece = await read(offset, piece_octets)
        if not piece:
            raise EOFError(f"content ends at {offset} of {message.size} octets")
        yield piece
        offset += len(piece)
