# SPDX-License-Identifier: MIT
"""Framing: lines, dots, contents and replies, in every slicing, against the octet-by-octet specification.

The first octets choose what is tried, its limits, and the cuts; the rest is the stream.
"""

from __future__ import annotations

from typing import Any

from polarismail.values.errors import BadReply
from polarismail.wire.content import ContentReader
from polarismail.wire.framing import DotDecoder, LineProblem, LineReader
from polarismail.wire.smtp_client import DotEncoder, ReplyReader
from tests.fuzz.slicing import Choices, cut
from tests.wire.test_framing import Specification, decode

_LIMITS = (8, 30, 100, 100000)


def check(octets: bytes) -> None:
    """Raises where a promise is broken."""
    choices = Choices(octets)
    chosen, cuts = choices.one_of(_CHECKS), choices.octet()
    chosen(choices, cuts)


def _check_dots(choices: Choices, cuts: int) -> None:
    stream = choices.rest()
    wanted = decode(Specification(), [stream])
    assert decode(DotDecoder(), [stream]) == wanted
    assert decode(DotDecoder(), cut(stream, cuts)) == wanted


def _check_lines(choices: Choices, cuts: int) -> None:
    limits = [choices.one_of(_LIMITS) for _ in range(3)]
    long = choices.octet()
    stream = choices.rest()
    whole = _lines([stream], limits, long)
    assert _lines(cut(stream, cuts), limits, long) == whole
    assert _lines([stream[at : at + 1] for at in range(len(stream))], limits, long) == whole
    lines, waits = whole
    for line in lines:
        if isinstance(line, bytes):
            assert b"\n" not in line and len(line) + 2 <= max(limits[0], limits[1])
    assert waits <= max(limits) + 1


def _lines(pieces: list[bytes], limits: list[int], long: int) -> tuple[list[bytes | LineProblem], int]:
    """What a reader gives until it cannot read on, and how much waits then."""
    reader = LineReader(limits[0], long_prefix=b"AUTH ", max_long_octets=limits[1], max_discarded_octets=limits[2])
    found: list[bytes | LineProblem] = []
    for piece in pieces:
        reader.receive(piece)
        while (line := reader.next_line(bool(long >> len(found) % 8 & 1))) is not None:
            found.append(line)
            if isinstance(line, LineProblem) and line is not LineProblem.TOO_LONG:
                return found, 0
    return found, len(reader)


def _check_content(choices: Choices, cuts: int) -> None:
    limits: dict[str, Any] = {
        "max_octets": choices.one_of(_LIMITS),
        "max_line_octets": choices.one_of(_LIMITS),
        "refuse_bare": bool(choices.octet() & 1),
        "max_header_octets": choices.one_of(_LIMITS),
        "max_header_lines": choices.one_of((1, 3, 10, 1000)),
    }
    stream = choices.rest()
    content, bare, rest = decode(Specification(), [stream])
    whole = _content([stream], limits)
    sliced = _content(cut(stream, cuts), limits)
    for piece, problem, size, counted, after, received in (whole, sliced):
        assert (size, counted, after) == (len(content), bare, rest)
        assert received == len(stream) - len(after or b"")
        assert content.startswith(piece) and (problem is not None or piece == content)
        assert (problem is not None) >= (size > limits["max_octets"] or b"\0" in content)
    if rest is not None:
        assert whole[1] == sliced[1], "the problem depends on the slices"


def _content(pieces: list[bytes], limits: dict[str, Any]) -> tuple[bytes, Any, int, int, bytes | None, int]:
    reader = ContentReader(DotDecoder(), **limits)
    out = b""
    for at, piece in enumerate(pieces):
        out += reader.receive(piece)
        if reader.rest is not None:
            rest = reader.rest + b"".join(pieces[at + 1 :])
            return out, reader.problem, reader.size, reader.bare, rest, reader.received
    # What the decoder holds back is in neither count yet; the specification holds back the same.
    return out, reader.problem, reader.size, reader.bare, None, reader.received


def _check_stuffing(choices: Choices, cuts: int) -> None:
    """What our client sends, a strict server takes as it was; a lenient one sees no earlier end."""
    content = choices.rest().replace(b"\r", b"").replace(b"\n", b"\r\n")  # as it is stored
    encoder = DotEncoder()
    sent = b"".join([encoder.encode(piece) for piece in cut(content, cuts)]) + encoder.end()
    got, bare, rest = decode(DotDecoder(), [sent + b"NOOP\r\n"])
    assert got in (content, content + b"\r\n") and bare == 0 and rest == b"NOOP\r\n"
    assert b"\n.\n" not in sent and b"\r.\r" not in sent


def _check_replies(choices: Choices, cuts: int) -> None:
    stream = choices.rest()
    whole = _replies([stream])
    assert _replies(cut(stream, cuts)) == whole


def _replies(pieces: list[bytes]) -> list[object]:
    reader, found = ReplyReader(), list[object]()
    for piece in pieces:
        reader.receive(piece)
        try:
            while (reply := reader.next_reply()) is not None:
                found.append(reply)
        except BadReply:
            return [*found, "bad"]
    return found


_CHECKS = (_check_dots, _check_lines, _check_content, _check_stuffing, _check_replies)
