# SPDX-License-Identifier: MIT
"""Hashing: the parameters, the bounded pool and line, and the same work whoever is asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from argon2 import extract_parameters
from argon2.low_level import Type
from twisted.internet.defer import DeferredList

from polarismail.auth.passwords import Passwords, PasswordSettings, hash_password
from polarismail.values.errors import AccountError, Unavailable
from tests.reactor import reactor, run

CHEAP = PasswordSettings(memory_kib=64, iterations=1, threads=2, waiting=3)


class CountingHasher:
    """The real hasher, which notes what it verified and can be made to wait."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.verified: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def verify(self, password_hash: str, password: bytes) -> bool:
        self.verified.append(password_hash)
        self.gate.wait(20)
        return bool(self._real.verify(password_hash, password))

    def hash(self, password: bytes) -> str:
        return str(self._real.hash(password))


@pytest.fixture
def passwords() -> Iterator[Passwords]:
    built = Passwords(reactor, CHEAP)
    built._hasher = CountingHasher(built._hasher)  # type: ignore[assignment]
    built.start()
    yield built
    built._hasher.gate.set()  # type: ignore[attr-defined]
    built.stop()


def test_the_defaults_are_those_of_the_design() -> None:
    parameters = extract_parameters(hash_password("x", PasswordSettings()))
    assert parameters.type is Type.ID
    assert (parameters.memory_cost, parameters.time_cost, parameters.parallelism) == (19 * 1024, 2, 1)


def test_right_and_wrong(passwords: Passwords) -> None:
    made = run(passwords.hash, "s\u00e9same")
    assert run(passwords.verify, made, "s\u00e9same".encode()) is True
    assert run(passwords.verify, made, b"sesame") is False
    assert run(passwords.verify, None, b"sesame") is False


@pytest.mark.parametrize(
    "stored", [None, "", "!", "x", "$argon2id$v=19$m=64,t=1,p=1$x$y", "$argon2id$\u00e9", "{SSHA}abc"]
)
def test_what_has_no_hash_costs_one_real_dummy(passwords: Passwords, stored: str | None) -> None:
    assert run(passwords.verify, stored, b"x") is False
    dummy = passwords._hasher.verified[-1]  # type: ignore[attr-defined]
    parameters = extract_parameters(dummy)
    assert (parameters.memory_cost, parameters.time_cost, parameters.parallelism) == (64, 1, 1)
    assert parameters.type is Type.ID


def test_an_empty_password_is_always_wrong_and_costs_the_same(passwords: Passwords) -> None:
    empty = passwords._hasher.hash(b"")
    assert run(passwords.verify, empty, b"") is False
    assert passwords._hasher.verified != [empty]  # type: ignore[attr-defined]
    assert len(passwords._hasher.verified) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("password", ["", "a\0b", "a\nb", b"a\rb"])
def test_passwords_that_cannot_be_sent_are_refused(passwords: Passwords, password: str | bytes) -> None:
    with pytest.raises(AccountError):
        run(passwords.hash, password)


def test_the_line_is_bounded_and_a_full_one_is_try_again(passwords: Passwords) -> None:
    hasher: Any = passwords._hasher
    hasher.gate.clear()
    made = hasher.hash(b"x")

    def flood() -> Any:
        asked = [passwords.verify(made, b"x") for _ in range(20)]
        reactor.callLater(0.05, hasher.gate.set)
        return DeferredList(asked, consumeErrors=True)

    outcomes = run(flood)
    assert [good for good, _ in outcomes].count(True) == 5, "two threads and three places"
    assert all(failure.check(Unavailable) for good, failure in outcomes if not good)
    assert passwords.refused == 15
    assert run(passwords.verify, made, b"x") is True, "and the line is free again"


def test_stopping_answers_the_line() -> None:
    passwords = Passwords(reactor, PasswordSettings(memory_kib=64, iterations=1, threads=1, waiting=10))
    passwords._hasher = CountingHasher(passwords._hasher)  # type: ignore[assignment]
    hasher: Any = passwords._hasher
    passwords.start()
    hasher.gate.clear()
    made = hasher.hash(b"x")

    def ask_and_stop() -> Any:
        asked = [passwords.verify(made, b"x") for _ in range(5)]
        reactor.callInThread(passwords.stop)
        reactor.callLater(0.1, hasher.gate.set)
        return DeferredList(asked, consumeErrors=True)

    outcomes = run(ask_and_stop)
    assert all(good or result.check(Unavailable) for good, result in outcomes)
    with pytest.raises(Unavailable):
        run(passwords.verify, made, b"x")


def test_nothing_before_start() -> None:
    with pytest.raises(Unavailable):
        run(Passwords(reactor, CHEAP).verify, None, b"x")
