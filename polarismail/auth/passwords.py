# SPDX-License-Identifier: MIT
"""Passwords are hashed and verified with argon2id, off the reactor thread, by a bounded pool with a bounded line.

Guarantees: an unknown name costs the same work as a known one with a wrong password (a real hash with the settings'
parameters is verified); when the line is full the answer is Unavailable, which is "try again" and never "wrong"; a
flood of logins occupies `threads` threads and `waiting` places, and nothing else.
Never: a password in a log, in a repr or in an exception.
RFC 9106 (argon2id); RFC 4954 §6 (454 for a temporary failure).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, VerifyMismatchError
from argon2.low_level import Type, error_to_str
from attrs import frozen
from twisted.internet.defer import Deferred, fail
from twisted.internet.threads import deferToThreadPool
from twisted.python.threadpool import ThreadPool

from polarismail.values.errors import AccountError, Unavailable

T = TypeVar("T")

_MEMORY_ALLOCATION_ERROR = -22  # argon2.h


@frozen
class PasswordSettings:
    """Cost of a login: the defaults take about 20 ms of one core and 19 MiB for each of `threads`."""

    memory_kib: int = 19 * 1024
    iterations: int = 2
    parallelism: int = 1
    threads: int = 2
    waiting: int = 100  # logins that may wait for a thread; more are told to try again


def hash_password(password: bytes | str, settings: PasswordSettings) -> str:
    """A fresh hash, in PHC form. Blocks for some 20 ms: for the command line; the server uses Passwords.hash.

    Raises AccountError for a password that no client could send: empty, or with NUL, CR or LF.
    """
    octets = password.encode("utf-8") if isinstance(password, str) else password
    if not octets:
        raise AccountError("a password may not be empty")
    if any(octet in octets for octet in (b"\0", b"\r", b"\n")):
        raise AccountError("a password may not hold NUL, CR or LF")
    return _hasher(settings).hash(octets)


class Passwords:
    """Hashing for one process. `reactor` gives threads a way back; `start` before use, `stop` at the end."""

    def __init__(self, reactor: Any, settings: PasswordSettings) -> None:
        self.settings = settings
        self.refused = 0  # logins turned away because the line was full
        self._reactor = reactor
        self._hasher = _hasher(settings)
        self._pool: ThreadPool | None = None
        self._outstanding = 0
        self._dummy = ""

    def start(self) -> None:
        """Start the pool. Hashes once, on this thread, for the names that do not exist."""
        # Random, so that nobody can log in with the password of the dummy even if a caller forgot to look at the name.
        self._dummy = self._hasher.hash(os.urandom(32))
        self._pool = ThreadPool(minthreads=0, maxthreads=self.settings.threads, name="passwords")
        self._pool.start()

    def stop(self) -> None:
        """Stop the pool; what waits in the line is answered with Unavailable, what is being hashed is waited for."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()

    def verify(self, password_hash: str | None, password: bytes) -> Deferred[bool]:
        """Is this the password behind the hash? `None` (no such account) takes as long, and is False.

        Fails with Unavailable when the line is full or the pool is stopped.
        """
        return self._in_line(lambda: self._do_verify(password_hash, password))

    def hash(self, password: bytes | str) -> Deferred[str]:
        """A fresh hash. Fails with AccountError as `hash_password` raises it, and with Unavailable."""
        return self._in_line(lambda: hash_password(password, self.settings))

    def _in_line(self, job: Callable[[], T]) -> Deferred[T]:
        pool = self._pool
        if pool is None or self._outstanding >= self.settings.threads + self.settings.waiting:
            self.refused += 1
            return fail(Unavailable("too many logins at once"))
        self._outstanding += 1

        def run() -> T:
            if self._pool is not pool:
                raise Unavailable("shutting down")
            return job()

        def leave(outcome: Any) -> Any:
            self._outstanding -= 1
            return outcome

        return deferToThreadPool(self._reactor, pool, run).addBoth(leave)

    def _do_verify(self, password_hash: str | None, password: bytes) -> bool:
        # An empty password is always wrong (HOSTILE A7), whatever hash somebody imported.
        if password_hash is not None and password:
            try:
                return self._hasher.verify(password_hash, password)
            except VerifyMismatchError:
                return False
            except (Argon2Error, ValueError) as problem:
                # No hash of ours, e.g. "!" for a locked account: nothing was computed yet, so it is the dummy's turn.
                _check_memory(problem)
        try:
            self._hasher.verify(self._dummy, password)
        except VerifyMismatchError:
            pass  # as it must be; the work is what was wanted
        except Argon2Error as problem:
            _check_memory(problem)
        return False


def _check_memory(problem: Exception) -> None:
    if str(problem) == error_to_str(_MEMORY_ALLOCATION_ERROR):
        raise Unavailable("no memory to hash a password") from problem


def _hasher(settings: PasswordSettings) -> PasswordHasher:
    return PasswordHasher(
        time_cost=settings.iterations,
        memory_cost=settings.memory_kib,
        parallelism=settings.parallelism,
        hash_len=32,
        salt_len=16,
        type=Type.ID,
    )
