# SPDX-License-Identifier: MIT
"""The memory of verified logins: keyed, bounded, short-lived."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from polarismail.auth.logins import LoginCacheSettings, VerifiedLogins
from polarismail.store.interfaces import Account
from polarismail.values.address import Mailbox

ACCOUNT = Account(1, Mailbox("joe", "ours.example"), "accounts/000/1", None, None, "hash")


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_idle_entries_end_and_used_ones_stay_until_their_life_is_over() -> None:
    time = Time()
    logins = VerifiedLogins(LoginCacheSettings(entries=10, idle_seconds=100, lifetime_seconds=1000), time)
    key = logins.key("joe@ours.example", b"x")
    logins.record(key, ACCOUNT, 1)
    for _ in range(11):
        time.now += 90
        assert logins.find(key) is not None
    time.now += 90
    assert logins.find(key) is None, "verified long ago"
    logins.record(key, ACCOUNT, 1)
    time.now += 101
    assert logins.find(key) is None, "not used"
    assert len(logins) == 0


def test_it_is_bounded() -> None:
    logins = VerifiedLogins(LoginCacheSettings(entries=5))
    for number in range(50):
        logins.record(logins.key(str(number), b""), ACCOUNT, 1)
    assert len(logins) == 5


def test_a_confirmed_login_moves_to_the_generation() -> None:
    logins = VerifiedLogins(LoginCacheSettings())
    key = logins.key("joe", b"x")
    logins.confirm(key, ACCOUNT, 2)
    assert logins.find(key) is None
    logins.record(key, ACCOUNT, 1)
    logins.confirm(key, ACCOUNT, 2)
    found = logins.find(key)
    assert found is not None and found.generation == 2


@given(st.text(), st.binary(), st.text(), st.binary())
def test_keys_tell_pairs_apart_and_differ_by_process(name: str, password: bytes, other: str, another: bytes) -> None:
    logins, elsewhere = VerifiedLogins(LoginCacheSettings()), VerifiedLogins(LoginCacheSettings())
    assert (logins.key(name, password) == logins.key(other, another)) == ((name, password) == (other, another))
    assert logins.key(name, password) != elsewhere.key(name, password)
