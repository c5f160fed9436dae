# SPDX-License-Identifier: MIT
"""The one look at a header section: every defect has its words, mail in order has none, and forged fields go, whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polarismail.message.headers import MAX_SECTION_OCTETS, field_values
from polarismail.message.inspection import (
    HeaderCollector,
    addresses_in,
    author,
    has_been_in,
    inspect,
    remove_claims,
)
from polarismail.values.address import Mailbox

GOOD = (
    b"From: Ann <ann@here.test>\r\nTo: bob@here.test\r\n"
    b"Subject: x\r\n folded\r\nDate: today\r\nMessage-ID: <1@here.test>\r\n"
)


@pytest.mark.parametrize(
    "more",
    [
        b"",
        b"DKIM-Signature: a\r\nDKIM-Signature: b\r\n",
        b"Received: a\r\n\tby b\r\nReceived: c\r\n",
        b"X-Empty:\r\n",
        b"Sender : ann@here.test\r\n",
    ],
)
def test_mail_in_order_has_no_defects(more: bytes) -> None:
    found = inspect(GOOD + more)
    assert (found.defects, found.claims, found.received) == ((), False, more.count(b"Received"))


@pytest.mark.parametrize(
    "value",
    [
        b'"Ann, of Here" <ann@here.test>',
        b'"a@b.test" <ann@here.test>',
        b"Ann (not, (really) her@other.test) <ann@here.test>",
        b"ann@here.test (Ann, herself)",
        b"\r\n ann@here.test",
        b'"ann \\"x\\" <y@z.test>" <ann@here.test>',
        b"ann@here.test,",
    ],
)
def test_one_address_however_it_is_dressed(value: bytes) -> None:
    section = b"Subject: x\r\nFrom: " + value + b"\r\n"
    assert inspect(section).defects == ()
    assert author(section) == Mailbox("ann", "here.test")


@pytest.mark.parametrize("name", ["From", "Sender", "Subject", "Date", "To", "Cc", "Reply-To", "Message-ID"])
def test_a_field_that_stands_once_stands_twice(name: str) -> None:
    twice = f"{name}: a@here.test\r\n{name.upper()}: a@here.test\r\n".encode()
    section = twice if name == "From" else b"From: a@here.test\r\n" + twice
    assert inspect(section).defects == (f"more than one {name} field",)


@pytest.mark.parametrize(
    ("section", "defect"),
    [
        (b"", "no From field"),
        (b"Subject: x\r\n", "no From field"),
        (b"From: Ann\r\n", "From has no address"),
        (b"From:\r\n", "From has no address"),
        (b"From: undisclosed:;\r\n", "From has no address"),
        (b"From: a@here.test, b@here.test\r\n", "From has several addresses"),
        (b"From: a@here.test,\r\n b@here.test\r\n", "From has several addresses"),
        (b"From: <a@here.test> <b@here.test>\r\n", "From has several addresses"),
        (b"From: group: a@here.test, b@here.test;\r\n", "From has several addresses"),
        (GOOD + b"no colon here\r\n", "a header line without a colon"),
        (b" Subject: x\r\n" + GOOD, "the header section begins with white space"),
        (GOOD + b"X\xe9: y\r\n", "a field name with characters that no name may have"),
        (GOOD + b"X Y: z\r\n", "a field name with characters that no name may have"),
        (GOOD + b"X: " + b"y\r\n " * 20000 + b"\r\n", "a field of more than 65536 octets"),
    ],
)
def test_a_defect_has_its_words(section: bytes, defect: str) -> None:
    assert inspect(section).defects == (defect,)


def test_the_words_of_many_defects_are_bounded() -> None:
    names = (b"Sender", b"Subject", b"Date", b"To", b"Cc", b"Reply-To", b"Message-ID")
    found = inspect(b" \r\n" + b"".join(b"%s: x\r\n%s: y\r\n" % (name, name) for name in names))
    assert len(found.defects) == 5 and len("; ".join(found.defects)) < 400


@given(st.binary(max_size=200))
def test_nothing_raises(octets: bytes) -> None:
    for section in (octets, b"From: " + octets + b"\r\n", b"Authentication-Results:" + octets + b"\r\n"):
        inspect(section), author(section), remove_claims(section, "here.test", final=True)
        has_been_in(section, Mailbox("a", "b"))


@pytest.mark.parametrize("evil", [b"(" * 50000, b'"' * 50001, b"<" * 50000, b"a@b," * 12000, b"\\" * 50000])
def test_what_is_evil_costs_no_more_than_its_length(evil: bytes) -> None:
    addresses_in(evil), inspect(b"From: " + evil + b"\r\n")
    remove_claims(b"Authentication-Results: " + evil + b"\r\n", "here.test", final=True)


OURS = [
    b"Authentication-Results: mail.here.test; spf=pass\r\n",
    b"authentication-results:\r\n\tMAIL.here.test 1;\r\n\tdkim=pass\r\n",
    b'Authentication-Results: "mail.here.test"; none\r\n',
    b"Authentication-Results : (a (nested) comment) mail.here.test. ; none\r\n",
    b"Authentication-Results: ; none\r\n",
    b"Authentication-Results: (never closed mail.here.test; spf=pass\r\n",
]
THEIRS = [
    b"Authentication-Results: mx.else.test; spf=pass\r\n",
    b"Authentication-Results: mail.here.test.else.test; spf=pass\r\n",
    b"X-Authentication-Results: mail.here.test; spf=pass\r\n",
    b"Subject: Authentication-Results: mail.here.test\r\n Authentication-Results: mail.here.test\r\n",
]


@pytest.mark.parametrize("field", OURS)
def test_results_that_claim_to_be_ours_go_whole(field: bytes) -> None:
    assert inspect(GOOD + field).claims
    for section in (GOOD + field, field + GOOD, field + GOOD + field):
        assert remove_claims(section, "mail.here.test", final=False) == (GOOD, section.count(field))


@pytest.mark.parametrize("field", THEIRS)
def test_results_of_others_stay(field: bytes) -> None:
    section = GOOD + field
    assert remove_claims(section, "mail.here.test", final=True) == (section, 0)


def test_a_return_path_goes_where_the_way_ends() -> None:
    section = b"Return-Path: <evil@else.test>\r\n" + GOOD
    assert inspect(section).claims
    assert remove_claims(section, "mail.here.test", final=True) == (GOOD, 1)
    assert remove_claims(section, "mail.here.test", final=False) == (section, 0)


def test_where_it_has_been() -> None:
    section = GOOD + b"Delivered-To: Bob@HERE.test\r\n"
    assert inspect(section).claims and field_values(section, b"delivered-to")
    assert has_been_in(section, Mailbox("bob", "here.test"))
    assert not has_been_in(section, Mailbox("ann", "here.test"))


@given(st.sampled_from([b"", b"\r\n", GOOD, OURS[0]]), st.binary(max_size=40), st.integers(1, 9))
def test_the_section_is_the_same_however_it_was_cut(section: bytes, body: bytes, size: int) -> None:
    content = section + b"\r\n" + body
    whole, cut = HeaderCollector(), HeaderCollector()
    whole.receive(content)
    whole.finish()
    at, done = 0, False
    while at < len(content) and not done:
        # As the engine gives them: never between CR and LF.
        end = at + size + content[at + size - 1 : at + size + 1].count(b"\r\n")
        done = cut.receive(content[at:end])
        at = end
    cut.finish()
    assert (cut.section, cut.rest + content[at:]) == (whole.section, whole.rest)
    assert whole.section + whole.rest == content


def test_no_more_than_a_section_is_held_back() -> None:
    collector = HeaderCollector()
    pieces = 0
    while not collector.receive(b"X: y\r\n"):
        pieces += 1
    assert pieces * 6 <= MAX_SECTION_OCTETS and len(collector.section) <= MAX_SECTION_OCTETS
    assert len(collector.section + collector.rest) == (pieces + 1) * 6
