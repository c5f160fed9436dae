# SPDX-License-Identifier: MIT
"""Limits on content hold at the octet, and the problem that is reported does not depend on slices."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polarismail.values import reply as replies
from polarismail.wire.content import ContentReader
from polarismail.wire.framing import ChunkDecoder, DotDecoder
from tests.wire.test_framing import cuts, slices

PIECES = (
    b"A: b\r\n",
    b"no field\r\n",
    b"\r\n",
    b"\n",
    b"\r",
    b".",
    b"\0",
    b" folded\r\n",
    b"x" * 9,
    b"\r\n.\r\n",
    b"y" * 30,
)


def reader(**limits: Any) -> ContentReader:
    known: dict[str, Any] = {
        "max_octets": 1000,
        "max_line_octets": 30,
        "refuse_bare": False,
        "max_header_octets": 100,
        "max_header_lines": 5,
    }
    return ContentReader(limits.pop("decoder", None) or DotDecoder(), **{**known, **limits})


def read(content: ContentReader, parts: list[bytes]) -> bytes:
    out = b""
    for part in parts:
        out += content.receive(part)
        if content.rest is not None:
            break
    return out


@given(st.lists(st.sampled_from(PIECES), max_size=40).map(b"".join), cuts, st.booleans(), st.integers(20, 300))
@settings(deadline=None, max_examples=800)
def test_slices_do_not_matter(octets: bytes, at: list[int], refuse: bool, size: int) -> None:
    results = []
    for parts in ([octets], slices(octets, at), [octets[i : i + 1] for i in range(len(octets))]):
        content = reader(refuse_bare=refuse, max_octets=size)
        out = read(content, [*parts, b"\r\n.\r\n"])
        assert content.rest is not None
        results.append(
            (content.problem, content.size, content.bare, content.received, out if not content.problem else b"")
        )
        if content.problem is None:
            assert len(out) == content.size
    assert results[0] == results[1] == results[2]


@given(st.lists(st.sampled_from(PIECES), max_size=40).map(b"".join), cuts, st.booleans(), st.integers(20, 300))
@settings(deadline=None, max_examples=400)
def test_slices_of_chunks_do_not_matter(octets: bytes, at: list[int], refuse: bool, size: int) -> None:
    results = []
    for parts in ([octets], slices(octets, at), [octets[i : i + 1] for i in range(len(octets))]):
        content = reader(decoder=ChunkDecoder(), refuse_bare=refuse, max_octets=size)
        out = read(content, parts) + content.finish()
        results.append(
            (content.problem, content.size, content.bare, content.received, out if not content.problem else b"")
        )
        assert content.received == len(octets)
        if content.problem is None:
            assert len(out) == content.size
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(
    ("octets", "problem"),
    [
        (b"\r\n" + b"x" * 30 + b"\r\n", None),
        (b"\r\n" + b"x" * 31 + b"\r\n", replies.TEXT_LINE_TOO_LONG),
        (b"\r\n.." + b"x" * 29 + b"\r\n", None),
        (b"\r\n" + b"x" * 30 + b"\n" + b"x" * 30 + b"\r\n", None),
        (b"a: b\r\n" + (b"x" * 28 + b"\r\n") * 4, None),  # no field: the header section ended after its first line
        (b"a: b\r\n" * 5 + b"\r\n", None),
        (b"a: b\r\n" * 6 + b"\r\n", replies.HEADER_TOO_BIG),
        (b"a: b\r\n" * 5 + b"text\r\n" * 20, None),
        ((b"a: " + b"x" * 22 + b"\r\n") * 4 + b"\r\n", replies.HEADER_TOO_BIG),  # 108 octets
        ((b"a: " + b"x" * 22 + b"\r\n") * 3 + b"\r\n" + b"y\r\n" * 300, None),
        (b"\r\n" + b"a: b\r\n" * 20, None),
        (b"\r\n" + b"x\r\n" * 332 + b"\r\n", None),  # 1,000 octets
        (b"\r\n" + b"x\r\n" * 332 + b"y\r\n", replies.TOO_BIG),
        (b"\r\nx\0y\r\n", replies.NUL_IN_CONTENT),
    ],
)
def test_limits(octets: bytes, problem: replies.Reply | None) -> None:
    for step in (1, 2, 7, len(octets)):
        content = reader()
        read(content, [octets[i : i + step] for i in range(0, len(octets), step)] + [b".\r\n"])
        assert content.problem == problem
        assert content.rest == b""


def test_bare_line_ends_are_refused_or_counted() -> None:
    for refuse in (True, False):
        content = reader(refuse_bare=refuse)
        out = read(content, [b"a: b\n\rc\r\n", b".\r\nrest"])
        assert content.bare == 2
        assert content.rest == b"rest"
        assert content.problem == (replies.BARE_LINE_END if refuse else None)
        assert out == (b"" if refuse else b"a: b\r\n\r\nc\r\n")


def test_nothing_is_kept_of_what_is_refused() -> None:
    content = reader()
    assert content.receive(b"a: b\r\n\r\nx\0\r\n") == b""
    for _ in range(100):
        assert content.receive(b"x" * 1000 + b"\r\n") == b""
    assert content.receive(b".\r\n") == b""
    assert content.problem == replies.TOO_BIG
    assert content.received == 12 + 100 * 1002 + 3
