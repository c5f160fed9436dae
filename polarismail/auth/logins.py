# SPDX-License-Identifier: MIT
"""Logins that were verified lately are remembered, so that a POP3 poller costs no hashing.

Guarantees: neither names nor passwords are kept, only a keyed hash of both, whose key is random and lives as long as
the process; an entry is good only for the generation of the directory that it was verified at, and is taken over to a
later one only when the account is unchanged; the number of entries is bounded.
Only successes are kept: a wrong password costs the work each time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from hashlib import blake2b
from time import monotonic

from attrs import evolve, frozen

from polarismail.store.interfaces import Account
from polarismail.store.lru import LruCache


@frozen
class LoginCacheSettings:
    """How long a verified login is believed while nothing about the account changes."""

    entries: int = 20_000  # some 300 octets each
    idle_seconds: float = 1200.0  # since its last use; pollers come every 5 to 15 minutes
    lifetime_seconds: float = 86400.0  # since its verification


@frozen
class VerifiedLogin:
    """One success. `verified` and `used` are monotonic seconds; `generation` is the directory's."""

    account: Account
    generation: int
    verified: float
    used: float


class VerifiedLogins:
    """The memory of one process. `now` is a monotonic clock."""

    def __init__(self, settings: LoginCacheSettings, now: Callable[[], float] = monotonic) -> None:
        self.settings = settings
        self._now = now
        self._key = os.urandom(32)
        self._kept: LruCache[bytes, VerifiedLogin] = LruCache(settings.entries)

    def key(self, name: str, password: bytes) -> bytes:
        """What this pair is remembered under; tells nothing about either."""
        octets = name.encode("utf-8", "surrogatepass")
        # The length keeps ("ab", "c") and ("a", "bc") apart.
        return blake2b(len(octets).to_bytes(8, "big") + octets + password, key=self._key, digest_size=32).digest()

    def find(self, key: bytes) -> VerifiedLogin | None:
        """The login behind the key, if it is young enough; whether its generation still holds is the caller's look."""
        login = self._kept.get(key)
        if login is None:
            return None
        now = self._now()
        if now - login.used > self.settings.idle_seconds or now - login.verified > self.settings.lifetime_seconds:
            self._kept.drop(key)
            return None
        self._kept.put(key, evolve(login, used=now))
        return login

    def record(self, key: bytes, account: Account, generation: int) -> None:
        """The pair was verified against `account`, which was read at `generation` or later."""
        now = self._now()
        self._kept.put(key, VerifiedLogin(account, generation, now, now))

    def confirm(self, key: bytes, account: Account, generation: int) -> None:
        """The account was read again at `generation`, and the password is the same: believe the login from there on."""
        login = self._kept.get(key)
        if login is not None:
            self._kept.put(key, evolve(login, account=account, generation=generation))

    def drop(self, key: bytes) -> None:
        """Forget one login."""
        self._kept.drop(key)

    def clear(self) -> None:
        """Forget all: each costs a hash once more."""
        self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)
