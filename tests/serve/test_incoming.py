# SPDX-License-Identifier: MIT
"""What is written to the spool's draft of a message from outside: everything but what only we may say, in any slicing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.defer import Deferred, fail

from polarismail.serve.incoming import IncomingDraft

KEPT = b"From: a@else.test\r\nSubject: x\r\n"
FORGED = b"Authentication-Results: mail.here.test;\r\n dkim=pass\r\n"
BODY = b"\r\nAuthentication-Results: mail.here.test; in the body\r\n\r\nReturn-Path: <x>\r\n"


class Draft:
    queue_id, trace = "1", b"trace"

    def __init__(self) -> None:
        self.octets, self.abandoned = b"", False

    @property
    def size(self) -> int:
        return len(self.octets)

    def write(self, octets: bytes) -> Deferred[None] | None:
        assert octets
        self.octets += octets
        return None

    def head(self, octets: int) -> bytes:
        return self.octets[:octets]

    def abandon(self) -> None:
        self.abandoned = True


def written(content: bytes, cut: Callable[[bytes], list[bytes]], *, final: bool = True) -> tuple[IncomingDraft, bytes]:
    draft: Any = Draft()
    incoming = IncomingDraft(draft, "mail.here.test", final)
    for piece in cut(content):
        incoming.write(piece)
    incoming.inspection()
    assert (incoming.size, incoming.trace, incoming.head(4)) == (draft.size, b"trace", draft.octets[:4])
    return incoming, draft.octets


def whole(content: bytes) -> list[bytes]:
    return [content] if content else []


def line_by_line(content: bytes) -> list[bytes]:
    return content.splitlines(keepends=True)


def octet_by_octet(content: bytes) -> list[bytes]:
    """As the engine gives them: a CR stays with its LF."""
    return re.findall(rb"\r\n|.", content, re.DOTALL)


@pytest.mark.parametrize("cut", [whole, line_by_line, octet_by_octet])
@pytest.mark.parametrize(
    ("content", "kept", "removed"),
    [
        (KEPT + BODY, KEPT + BODY, 0),
        (FORGED + KEPT + BODY, KEPT + BODY, 1),
        (KEPT + FORGED + BODY, KEPT + BODY, 1),
        (FORGED + BODY, BODY, 1),
        (FORGED, b"", 1),
        (KEPT + FORGED, KEPT, 1),
        (BODY, BODY, 0),
        (b"\r\n" + FORGED + b"\r\n", b"\r\n" + FORGED + b"\r\n", 0),
        (b"", b"", 0),
        (b"Return-Path: <x@y.test>\r\n" + KEPT + BODY, KEPT + BODY, 1),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, bytes) else None,
)
def test_what_is_kept(cut: Any, content: bytes, kept: bytes, removed: int) -> None:
    incoming, octets = written(content, cut)
    assert (octets, incoming.removed) == (kept, removed)


def test_a_section_longer_than_any_that_is_taken_is_not_held_back() -> None:
    content = KEPT + b"X: y\r\n" * 20000
    incoming, octets = written(content, line_by_line)
    assert octets == content and len(incoming.section) <= 102400


def test_a_return_path_of_a_message_that_goes_on_stays() -> None:
    content = b"Return-Path: <x@y.test>\r\n" + KEPT + BODY
    assert written(content, whole, final=False)[1] == content


def test_what_is_held_back_goes_with_the_draft() -> None:
    draft: Any = Draft()
    incoming = IncomingDraft(draft, "mail.here.test", True)
    incoming.write(b"Subject: x\r\n")
    incoming.abandon()
    assert draft.abandoned and not draft.octets


def test_a_draft_that_cannot_be_written_at_the_end_says_so_by_its_commit_alone() -> None:
    draft: Any = Draft()
    draft.write = lambda octets: fail(RuntimeError("the disk"))
    incoming = IncomingDraft(draft, "mail.here.test", True)
    incoming.write(b"Subject: x\r\n")
    assert incoming.inspection().defects == ("no From field",)


@pytest.mark.parametrize("filler", [b"X: y\r\n" * 1500, b"junk\r\n" * 1500, FORGED * 1100])
@pytest.mark.parametrize("cut", [whole, line_by_line])
def test_many_lines_behind_one_that_is_no_field_hide_nothing(
    filler: bytes, cut: Callable[[bytes], list[bytes]]
) -> None:
    """The engine takes that line for the end of the header section, and counts no further; not all readers do."""
    start, end = KEPT + b"no field\r\n" + filler, b"Return-Path : <x@else.test>\r\n" + FORGED.upper() + BODY
    incoming, octets = written(start + end, cut)
    assert octets == start.replace(FORGED, b"") + BODY
    assert incoming.removed == start.count(FORGED) + 2
    assert not incoming.hides_claims


@pytest.mark.parametrize("cut", [whole, line_by_line, lambda content: octets_of(content, 9)])
def test_fields_of_ours_behind_all_that_is_looked_at_are_told(cut: Callable[[bytes], list[bytes]]) -> None:
    long = KEPT + b"no field\r\n" + (b"X: " + b"y" * 900 + b"\r\n") * 130
    for hidden in (FORGED, b"return-path \t : <x>\r\n"):
        incoming, octets = written(long + hidden + BODY, cut)
        assert octets == long + hidden + BODY
        assert incoming.hides_claims
    assert not written(long + b"X-" + FORGED + BODY, cut)[0].hides_claims
    assert not written(long + BODY, cut)[0].hides_claims


def octets_of(content: bytes, size: int) -> list[bytes]:
    return [content[at : at + size] for at in range(0, len(content), size)]
