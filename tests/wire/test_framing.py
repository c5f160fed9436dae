# SPDX-License-Identifier: MIT
"""The fast decoder does what the octet-by-octet specification says; lines come out the same however they are cut."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from polarismail.wire.framing import ChunkDecoder, DotDecoder, LineProblem, LineReader

# What ends data elsewhere, and must not here (HOSTILE F1).
VARIANTS = (
    b"\n.\n",
    b"\n.\r",
    b"\r.\n",
    b"\r.\r",
    b"\n.\r\n",
    b"\r.\r\n",
    b"\r\n.\n",
    b"\r\n.\r",
    b"\r\n\0.\r\n",
    b"\r\n.\0\r\n",
    b"\r\n.\r\r\n",
    b"\r\r\n.\r\r\n",
)
PIECES = (b"\r", b"\n", b".", b"\r\n", b"\r\n.", b"\r\n.\r\n", b"a", b"..", b"\0", b"some text\r\n", *VARIANTS)
streams = st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join) | st.binary(max_size=60)
cuts = st.lists(st.integers(0, 200), max_size=20)


class Specification:
    """Octet by octet, as CONVENTIONS has it: what the fast decoder is measured against."""

    def __init__(self) -> None:
        self._held = b""
        self._line_start = True
        self.bare = 0
        self.rest: bytes | None = None

    def receive(self, data: bytes) -> bytes:
        buf, out, i = self._held + data, bytearray(), 0
        while i < len(buf):
            here = buf[i : i + 3]
            if self._line_start and here[:1] == b".":
                if here == b".\r\n":
                    self.rest = buf[i + 3 :]
                    return bytes(out)
                if b".\r\n".startswith(here):
                    break
                i, self._line_start = i + 1, False
            elif here[:2] == b"\r\n":
                out += b"\r\n"
                i, self._line_start = i + 2, True
            elif here == b"\r":
                break
            elif here[:1] in (b"\r", b"\n"):
                out += b"\r\n"
                i, self._line_start, self.bare = i + 1, False, self.bare + 1
            else:
                out += here[:1]
                i, self._line_start = i + 1, False
        self._held = buf[i:]
        return bytes(out)


def slices(octets: bytes, at: list[int]) -> list[bytes]:
    """Cut at these places; some slices may be empty."""
    places = [0, *sorted(place for place in at if place < len(octets)), len(octets)]
    return [octets[start:end] for start, end in pairwise(places)]


def decode(decoder: DotDecoder | Specification, parts: list[bytes]) -> tuple[bytes, int, bytes | None]:
    """Content, bare line ends, and what stands behind the end (None: no end came)."""
    out = b""
    for at, part in enumerate(parts):
        out += decoder.receive(part)
        if decoder.rest is not None:
            return out, decoder.bare, decoder.rest + b"".join(parts[at + 1 :])
    return out, decoder.bare, None


@given(streams, cuts)
@example(b".\r\n", [1, 2])
@example(b".\r.\r\n", [2])
@example(b"\r\n.\r\n", [1, 2, 3, 4])
@example(b"a\r\n.\r", [])
@example(b"\r\r\n.\r\n", [])
@example(b"..\r\n.\r\n", [1])
@settings(deadline=None, max_examples=600)
def test_the_decoder_is_its_specification(octets: bytes, at: list[int]) -> None:
    wanted = decode(Specification(), [octets])
    assert decode(Specification(), slices(octets, at)) == wanted
    assert decode(DotDecoder(), [octets]) == wanted
    assert decode(DotDecoder(), slices(octets, at)) == wanted
    assert decode(DotDecoder(), [octets[i : i + 1] for i in range(len(octets))]) == wanted


@given(streams)
@settings(deadline=None)
def test_what_comes_out_has_crlf_line_ends_only(octets: bytes) -> None:
    out, _, _ = decode(DotDecoder(), [octets])
    assert out.count(b"\r") == out.count(b"\n") == out.count(b"\r\n")


@given(st.lists(st.sampled_from((b".", b"..", b"a", b"\r\n", b"\r\n.", b"\0")), max_size=40).map(b"".join), cuts)
@settings(deadline=None)
def test_stuffed_content_comes_out_as_it_was(content: bytes, at: list[int]) -> None:
    stuffed = b"".join(b"." + line if line[:1] == b"." else line for line in content.splitlines(keepends=True))
    ended = content if content.endswith(b"\r\n") or not content else content + b"\r\n"
    octets = stuffed + (b"" if ended == content else b"\r\n") + b".\r\nNOOP\r\n"
    assert decode(DotDecoder(), slices(octets, at)) == (ended, 0, b"NOOP\r\n")


@given(streams, cuts)
@example(b"a\r\nb\r", [2])
@example(b".\r\n.\r\n", [1])
@example(b"\r\r\n", [1, 2])
@settings(deadline=None, max_examples=400)
def test_chunks_are_content_as_it_is_but_for_line_ends(octets: bytes, at: list[int]) -> None:
    mended = re.sub(rb"\r\n|\r|\n", b"\r\n", octets)
    bare = len(re.findall(rb"\r(?!\n)|(?<!\r)\n", octets))
    if mended and not mended.endswith(b"\n"):
        mended += b"\r\n"
    for parts in ([octets], slices(octets, at), [octets[i : i + 1] for i in range(len(octets))]):
        decoder = ChunkDecoder()
        out = b"".join(decoder.receive(part) for part in parts)
        decoder.finish()
        assert (out + decoder.receive(b""), decoder.bare, decoder.rest) == (mended, bare, None)


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_real_end_ends(variant: bytes) -> None:
    octets = b"text" + variant + b"MAIL FROM:<smuggled@example.org>\r\n.\r\nNOOP\r\n"
    out, _, rest = decode(DotDecoder(), [octets])
    assert rest == b"NOOP\r\n"
    assert b"smuggled" in out


def reader() -> LineReader:
    return LineReader(20, long_prefix=b"AUTH ", max_long_octets=40, max_discarded_octets=100)


def read(lines: LineReader, parts: list[bytes]) -> list[bytes | LineProblem]:
    out: list[bytes | LineProblem] = []
    for part in parts:
        lines.receive(part)
        while (line := lines.next_line()) is not None:
            out.append(line)
            if isinstance(line, LineProblem) and line is not LineProblem.TOO_LONG:
                return out
    return out


line_streams = st.lists(
    st.sampled_from(
        (b"\r\n", b"\r", b"\n", b"NOOP\r\n", b"AUTH ", b"auth x", b"x" * 17, b"x" * 18, b"x" * 40, b"\x16")
    ),
    max_size=15,
).map(b"".join)


@given(line_streams, cuts)
@example(b"x" * 19 + b"AUTH x\r\n", [19])
@example(b"x" * 18 + b"\r\n", [19])
@example(b"x" * 19 + b"\r\n\x16", [20])
@settings(deadline=None, max_examples=600)
def test_lines_do_not_depend_on_slices(octets: bytes, at: list[int]) -> None:
    wanted = read(reader(), [octets])
    assert read(reader(), slices(octets, at)) == wanted
    assert read(reader(), [octets[i : i + 1] for i in range(len(octets))]) == wanted


@pytest.mark.parametrize(
    ("octets", "lines"),
    [
        (b"a\r\n\r\nb\r\nc", [b"a", b"", b"b"]),
        (b"x" * 18 + b"\r\n", [b"x" * 18]),
        (b"x" * 19 + b"\r\nb\r\n", [LineProblem.TOO_LONG, b"b"]),
        (b"x" * 101, [LineProblem.ENDLESS]),
        (b"auth " + b"x" * 33 + b"\r\n", [b"auth " + b"x" * 33]),
        (b"auth " + b"x" * 34 + b"\r\n", [LineProblem.TOO_LONG]),
        (b"a\nb\r\n", [LineProblem.BARE_LINE_FEED]),
        (b"\n", [LineProblem.BARE_LINE_FEED]),
        (b"a\r\n\n", [b"a", LineProblem.BARE_LINE_FEED]),
        (b"a\rb\r\n", [b"a\rb"]),
        (b"a\r\n\x16\x03\x01", [b"a", LineProblem.TLS]),
        (b"\x16" + b"\x03" * 5000, [LineProblem.TLS]),
    ],
)
def test_lines(octets: bytes, lines: list[bytes | LineProblem]) -> None:
    assert read(reader(), [octets]) == lines


def test_memory_for_an_over_long_line_is_bounded() -> None:
    lines = LineReader(20, long_prefix=b"AUTH ", max_long_octets=40, max_discarded_octets=10**9)
    for _ in range(1000):
        lines.receive(b"x" * 1000)
        assert lines.next_line() is None
        assert len(lines) <= 1
    lines.receive(b"\r\nNOOP\r\n")
    assert lines.next_line() is LineProblem.TOO_LONG
    assert lines.next_line() == b"NOOP"
