# SPDX-License-Identifier: MIT
"""PLAIN and LOGIN, step by step; whatever a client sends ends in an outcome."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polarismail.wire.sasl import MECHANISMS, Challenge, Credentials, Login, Malformed, Plain


def test_plain() -> None:
    assert Plain().step(b"\0joe\0secret") == Credentials("joe", "", "secret")
    assert Plain().step(b"other\0joe\0s\xc3\xa4") == Credentials("joe", "other", "sä")
    exchange = Plain()
    assert exchange.step(None) == Challenge(b"")
    assert exchange.step(b"\0joe\0secret") == Credentials("joe", "", "secret")


@pytest.mark.parametrize(
    "response",
    [
        b"",
        b"joe",
        b"\0joe",
        b"\0joe\0",
        b"\0\0secret",
        b"\0joe\0secret\0",
        b"\0\xff\0x",
        b"\0j\0\xff",
        b"\0" + b"j" * 256 + b"\0x",
        b"\0j\0" + b"x" * 1025,
        b"a" * 256 + b"\0j\0x",
    ],
)
def test_plain_malformed(response: bytes) -> None:
    assert isinstance(Plain().step(response), Malformed)


@pytest.mark.parametrize("first", [None, b""])
def test_login_asks_for_both(first: bytes | None) -> None:
    exchange = Login()
    assert exchange.step(first) == Challenge(b"Username:")
    assert exchange.step(b"joe") == Challenge(b"Password:")
    assert exchange.step(b"secret") == Credentials("joe", "", "secret")


def test_login_with_the_name_at_once() -> None:
    exchange = Login()
    assert exchange.step(b"joe") == Challenge(b"Password:")
    assert exchange.step(b"secret") == Credentials("joe", "", "secret")


@pytest.mark.parametrize(("name", "password"), [(b"joe", b""), (b"j\0", b"x"), (b"j", b"x\0"), (b"\xff", b"x")])
def test_login_malformed(name: bytes, password: bytes) -> None:
    exchange = Login()
    exchange.step(name)
    assert isinstance(exchange.step(password), Malformed)


def test_login_with_an_empty_name() -> None:
    exchange = Login()
    assert exchange.step(None) == Challenge(b"Username:")
    assert exchange.step(b"") == Challenge(b"Password:")
    assert isinstance(exchange.step(b"x"), Malformed)


def test_secrets_are_not_shown() -> None:
    assert "secret" not in repr(Plain().step(b"\0joe\0secret"))


@given(st.sampled_from(sorted(MECHANISMS)), st.lists(st.binary(max_size=40), min_size=3, max_size=3))
@settings(deadline=None)
def test_every_exchange_ends(mechanism: str, responses: list[bytes]) -> None:
    exchange = MECHANISMS[mechanism]()
    outcomes = []
    for response in responses:
        outcomes.append(exchange.step(response))
        if not isinstance(outcomes[-1], Challenge):
            break
    assert isinstance(outcomes[-1], Credentials | Malformed)
    for outcome in outcomes:
        if isinstance(outcome, Credentials):
            assert outcome.authcid and outcome.password
            assert "\0" not in outcome.authcid + outcome.authzid + outcome.password
