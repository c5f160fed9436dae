# SPDX-License-Identifier: MIT
"""Messages as POP3 sends them: against a line-by-line specification, for any slicing."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from polarismail.wire.pop3_content import MessageEncoder


def specified(stored: bytes, top: int | None) -> bytes:
    """RFC 1939 §3 and §7, one line after the other."""
    lines = stored.replace(b"\r\n", b"\n").split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    if top is not None and b"" in lines:
        lines = lines[: lines.index(b"") + 1 + top]
    return b"".join((b"." + line if line[:1] == b"." else line) + b"\r\n" for line in lines) + b".\r\n"


def encoded(stored: bytes, top: int | None, cuts: list[int]) -> bytes:
    encoder = MessageEncoder(top)
    out = [encoder.receive(stored[start:end]) for start, end in zip([0, *cuts], [*cuts, len(stored)], strict=True)]
    return b"".join(out) + encoder.finish()


OCTETS = st.lists(st.sampled_from([b"\n", b"\r\n", b".", b"..", b"a", b"\n\n", b"\n.", b"\r", b"\0"]), max_size=24).map(
    b"".join
)


@given(OCTETS, st.none() | st.integers(0, 5), st.data())
@example(b"a\n\n.\nb", 1, None)
@example(b"a\r", None, None)
@settings(deadline=None, max_examples=500)
def test_any_slicing_gives_what_is_specified(stored: bytes, top: int | None, data) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stored)), max_size=6))) if data else []
    assert encoded(stored, top, cuts) == specified(stored, top)


@pytest.mark.parametrize("size", [16383, 16384, 16385, 65535, 65536])
def test_a_line_with_a_dot_behind_a_piece_is_stuffed(size: int) -> None:
    stored = b"x" * (size - 1) + b"\n" + b".\n+OK forged\n"
    assert encoded(stored, None, [size]) == b"x" * (size - 1) + b"\r\n..\r\n+OK forged\r\n.\r\n"
    assert encoded(b".\n", None, []) == b"..\r\n.\r\n"


def test_an_empty_message_is_sent_as_one() -> None:
    assert encoded(b"", None, []) == b".\r\n"
    assert encoded(b"", 5, []) == b".\r\n"


def test_top_of_a_huge_number_of_lines_is_everything() -> None:
    stored = b"A: b\n\n" + b"line\n" * 100_000
    assert encoded(stored, 2**31 - 1, [65536, 131072]) == specified(stored, None)


def test_top_stops_asking_for_octets() -> None:
    encoder = MessageEncoder(1)
    assert encoder.receive(b"A: b\n\none\ntwo\n") == b"A: b\r\n\r\none\r\n"
    assert encoder.done
    assert encoder.receive(b"three\n") == b""
    assert encoder.finish() == b".\r\n"
