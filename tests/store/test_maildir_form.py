# SPDX-License-Identifier: MIT
"""Large contents in the form that a Maildir keeps: what is read is what was written, and a crash leaves nothing astray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polarismail.store.content import CHUNKS, INLINE, INLINE_OCTETS, LINK_OCTETS, MAILDIR
from polarismail.store.interfaces import Committed, Submission
from polarismail.store.spool import SpoolSettings
from tests.databases import KINDS
from tests.store.spools import FACTS, TRACE, Place, Process, done, envelope, open_place

OWN = b"Return-Path: <sender@example.org>\r\nDelivered-To: user@example.com\r\n"
LARGE = b"Subject: large\r\n\r\n" + b"".join(b"line %d of many\r\n" % at for at in range(9000)) + b"\r\n\r\n.\r\n"


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with open_place(request.param, tmp_path) as opened:
        yield opened


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Place]:
    with open_place("sqlite", tmp_path) as opened:
        yield opened


def front(queue_id: str) -> tuple[bytes, bytes]:
    return OWN, TRACE


def accept(process: Process, content: bytes = LARGE, trace: bytes | None = None) -> Committed:
    draft = process.write(*[content[at : at + 40_001] for at in range(0, len(content), 40_001)], front=front)
    committed = process.commit(Submission(draft, envelope(), FACTS, draft.trace or TRACE if trace is None else trace))
    assert isinstance(committed, Committed)
    return committed


def test_it_is_read_as_it_was_written(place: Place) -> None:
    process = place.open()
    message = accept(process).message
    assert message.storage == (MAILDIR if place.kind == "sqlite" else CHUNKS)
    assert message.size == len(TRACE + LARGE)
    assert process.read_all(message) == TRACE + LARGE


def test_on_disk_it_is_what_a_maildir_holds(here: Place) -> None:
    process = here.open()
    message = accept(process).message
    form = process.maildir_form(message)
    on_disk = Path(form.path).read_bytes()
    assert on_disk == (OWN + TRACE + LARGE).replace(b"\r\n", b"\n")
    assert form.octets == len(on_disk)
    assert form.front_octets == len((OWN + TRACE).replace(b"\r\n", b"\n"))
    assert form.trace == TRACE


def test_another_trace_than_the_file_has_is_the_one_that_counts(here: Place) -> None:
    process = here.open()
    other = b"Authentication-Results: x; none\r\n" + TRACE
    message = accept(process, trace=other).message
    assert process.maildir_form(message).trace == other
    assert process.read_all(message) == other + LARGE


def test_what_is_small_or_has_no_front_is_kept_as_ever(here: Place) -> None:
    process = here.open()
    small = accept(process, b"Subject: small\r\n\r\n").message
    assert small.storage == INLINE
    assert process.maildir_form(small) is None
    plain = process.accept(LARGE).message
    assert process.maildir_form(plain) is None
    assert process.read_all(plain) == TRACE + LARGE


def test_the_next_process_finds_it(here: Place) -> None:
    process = here.open()
    first = process.maildir_form(accept(process).message)
    process.crash()
    process = here.open()
    (recipient,) = process.claim(2e9, 10)
    assert recipient.message.inline is None
    assert process.maildir_form(recipient.message) == first
    assert process.read_all(recipient.message) == TRACE + LARGE
    process.record([done(recipient)])
    process.stop()
    here._open.remove(process)
    assert not process.files()


def test_a_crash_before_the_row_leaves_a_file_that_is_swept(here: Place) -> None:
    process = here.open()
    process.write(LARGE[:80_000], LARGE[80_000:], front=front)
    process.crash()
    assert process.files()
    process = here.open()
    process.stop()
    here._open.remove(process)
    assert not process.files()


@pytest.fixture(scope="module")
def accepted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, Any]]:
    with open_place("sqlite", tmp_path_factory.mktemp("form")) as opened:
        process = opened.open()
        yield process, accept(process).message


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(TRACE + LARGE) + 10), st.integers(0, 140_000)), max_size=6))
def test_any_part_may_be_read_at_any_time(accepted: tuple[Process, Any], parts: list[tuple[int, int]]) -> None:
    process, message = accepted
    for offset, octets in parts:
        assert process.read(message, offset, octets) == (TRACE + LARGE)[offset : offset + octets]


@pytest.mark.parametrize(("octets", "several", "expected"), [
    (LINK_OCTETS, False, INLINE), (LINK_OCTETS + 1, False, MAILDIR), (LINK_OCTETS + 1, True, INLINE),
    (INLINE_OCTETS, True, INLINE), (INLINE_OCTETS + 1, True, MAILDIR),
])  # fmt: skip
def test_from_where_on_it_is_a_file(here: Place, octets: int, several: bool, expected: int) -> None:
    process = here.open()
    draft = process.write(b"x" * (octets - 2), b"\r\n", front=(lambda queue_id: (b"", b"")) if several else front)
    assert len(draft.head(10**9)) == min(octets, 65_536)
    committed = process.commit(Submission(draft, envelope(), FACTS, draft.trace or TRACE))
    assert committed.message.storage == expected
    assert process.read_all(committed.message) == TRACE + b"x" * (octets - 2) + b"\r\n"


def test_rows_are_not_begun_sooner_for_a_front(place: Place) -> None:
    process = place.open(SpoolSettings(content="rows"))
    content = b"x" * 50_000 + b"\r\n"
    message = accept(process, content).message
    assert message.storage == INLINE
    assert process.read_all(message) == TRACE + content
