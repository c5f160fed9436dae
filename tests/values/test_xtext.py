# SPDX-License-Identifier: MIT
"""xtext and the forms of a UTF-8 address."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polarismail.values.address import Mailbox
from polarismail.values.xtext import (
    XTEXT,
    decode_unitext,
    decode_xtext,
    encode_unitext,
    encode_xtext,
    is_orcpt,
    orcpt_in_ascii,
    orcpt_of,
)

ascii_text = st.text(st.characters(max_codepoint=127), max_size=60)
letters = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40)


@given(ascii_text)
def test_xtext_goes_round(text: str) -> None:
    encoded = encode_xtext(text)
    assert XTEXT.fullmatch(encoded) and decode_xtext(encoded) == text


@given(letters)
def test_unitext_goes_round(text: str) -> None:
    encoded = encode_unitext(text)
    assert encoded.isascii() and decode_unitext(encoded) == text
    assert is_orcpt(f"utf-8;{encoded}") and is_orcpt(f"UTF-8;{encoded}", smtputf8=True)


@given(st.text(max_size=60))
def test_nothing_raises(text: str) -> None:
    assert is_orcpt(text) in (True, False)
    decode_unitext(text), decode_xtext(text)
    assert orcpt_in_ascii(text).isascii()


@pytest.mark.parametrize(
    ("orcpt", "plain", "smtputf8"),
    [
        ("rfc822;a+2Bb@x.test", True, True),
        ("rfc822;a=b@x.test", False, False),
        ("rfc822;jö@x.test", False, False),
        ("x-local;any+3Dthing", True, True),
        ("utf-8;jö@x.test", False, True),
        (r"utf-8;j\x{F6}@x.test", True, True),
        (r"utf-8;j\x{D800}@x.test", False, False),
        (r"utf-8;j\x{110000}@x.test", False, False),
        ("utf-8;a+2Bb@x.test", False, False),  # no xtext here
        ("utf-8;", False, False),
        ("rfc 822;a", False, False),
    ],
)
def test_original_recipients(orcpt: str, plain: bool, smtputf8: bool) -> None:
    assert (is_orcpt(orcpt), is_orcpt(orcpt, smtputf8=True)) == (plain, smtputf8)


def test_forms_of_one_address() -> None:
    assert orcpt_in_ascii("utf-8;jö+x@b.test") == r"utf-8;j\x{F6}+x@b.test"
    assert orcpt_of(Mailbox("a+b", "x.test")) == "rfc822;a+2Bb@x.test"
    assert orcpt_of(Mailbox("jö=", "bücher.test")) == r"utf-8;j\x{F6}\x{3D}@b\x{FC}cher.test"
