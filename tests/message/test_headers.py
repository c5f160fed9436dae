# SPDX-License-Identifier: MIT
"""The header section by offsets, against Python's email package and against octets that are no mail."""

from __future__ import annotations

import email.policy
import time
from email.parser import BytesHeaderParser
from email.utils import parsedate_to_datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polarismail.message.headers import (
    MAX_FIELDS,
    MAX_SECTION_OCTETS,
    field_values,
    has_field,
    header_section,
    iterate_fields,
    render_date,
)
from polarismail.message.inspection import inspect


def received_in(octets: bytes) -> int:
    return inspect(header_section(octets)).received


MAIL = (
    b"Received: from a\r\n\tby b\r\nreceived : twice\r\nSubject: one\r\n two: three\r\nX-Empty:\r\n"
    b"Delivered-To: a@example.org\r\n"
    b"\r\nReceived: not a field\r\n"
)


def test_fields_and_their_offsets() -> None:
    fields = list(iterate_fields(MAIL))
    assert [field.name for field in fields] == [b"received", b"received", b"subject", b"x-empty", b"delivered-to"]
    assert MAIL[fields[2].start : fields[2].end] == b"Subject: one\r\n two: three\r\n"
    assert field_values(MAIL, b"SUBJECT") == [b"one two: three"]
    assert field_values(MAIL, b"X-Empty") == [b""]
    assert has_field(MAIL, b"delivered-TO") and not has_field(MAIL, b"delivered")
    assert b"".join(MAIL[field.start : field.end] for field in fields) == header_section(MAIL)


def test_received_fields_are_counted() -> None:
    assert received_in(MAIL) == 2
    assert received_in(b"RECEIVED: x\r\n" * 60 + b"\r\n") == 60
    assert received_in(b"X-Received: x\r\nSubject: y\r\n Received: z\r\n\r\n") == 0
    assert received_in(b"Received\t: x\r\n") == 1


@pytest.mark.parametrize("octets", [b"", b"\r\n", b"\r\n\r\nSubject: x\r\n", b" \r\n", b":", b"no colon", b"\r", b"\n"])
def test_no_header_section(octets: bytes) -> None:
    assert [field for field in iterate_fields(octets) if field.name] == []
    assert received_in(octets) == 0 and not has_field(octets, b"subject")


def test_a_line_without_a_colon_is_no_field_and_hides_none() -> None:
    octets = b"From joe Sat Jan\r\n : odd\r\nSubject: x\r\n\r\n"
    assert [field.name for field in iterate_fields(octets)] == [b"", b"subject"]


def test_bounds() -> None:
    many = b"A: b\r\n" * 50_000
    assert len(list(iterate_fields(many))) == MAX_FIELDS
    assert len(header_section(many)) == MAX_SECTION_OCTETS


@pytest.mark.parametrize(
    "evil",
    [
        b"\r\n " * 500_000,
        b"received " * 200_000,
        b"a" * 2_000_000,
        b"\r\n\t" * 100 + b":" * 1_000_000,
        b"x\r\n" * 500_000,
    ],
)
def test_a_megabyte_of_nonsense_costs_little(evil: bytes) -> None:
    before = time.process_time()
    received_in(evil), has_field(evil, b"received"), field_values(evil, b"x"), list(iterate_fields(evil))
    assert time.process_time() - before < 2, "an order of magnitude above what linear work takes"


names = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters=":"), min_size=1, max_size=12)
values = st.lists(
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12), min_size=1, max_size=4
)


@settings(deadline=None)
@given(st.lists(st.tuples(names, values), max_size=8))
def test_the_same_as_the_email_package(fields: list[tuple[str, list[str]]]) -> None:
    octets = "".join(f"{name}: " + "\r\n ".join(words) + "\r\n" for name, words in fields).encode()
    octets += b"\r\nbody"
    parsed = BytesHeaderParser(policy=email.policy.compat32).parsebytes(octets)
    assert [field.name.decode() for field in iterate_fields(octets)] == [name.lower() for name in parsed]
    for name in parsed:
        ours = [value.decode().replace("\t", " ").split() for value in field_values(octets, name.encode())]
        assert ours == [value.split() for value in parsed.get_all(name)]


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from([b"\r\n", b"\r", b"\n", b" ", b":", b"Received", b"received:", b"\x00", b"\xff"]), max_size=30
    )
)
def test_nothing_raises_and_fields_do_not_overlap(pieces: list[bytes]) -> None:
    octets = b"".join(pieces)
    at = 0
    for field in iterate_fields(octets):
        assert at <= field.start <= field.value <= field.end <= len(octets)
        assert field.end > field.start
        at = field.end
    assert received_in(octets) == sum(field.name == b"received" for field in iterate_fields(octets))


@given(st.integers(0, 4_000_000_000))
def test_dates_read_back(when: int) -> None:
    assert parsedate_to_datetime(render_date(when + 0.7)).timestamp() == when
