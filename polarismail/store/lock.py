# SPDX-License-Identifier: MIT
"""Who may write now, and who is alive: file locks that the kernel releases when their process dies.

Writers queue on `WritersLock` instead of on SQLite's busy handler, which polls and starves (HOUSE, "The spool, decided").
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from types import TracebackType

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class WritersLock:
    """A context manager: one writer at a time over all processes that opened the same path; the others wait in line.

    Never held by two threads of one process through the same object: each committer has its own.
    """

    def __init__(self, path: str) -> None:
        """Open or create `path`. Raises OSError."""
        self._descriptor = os.open(path, _FLAGS, 0o600)

    def __enter__(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Release and close. Idempotent."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class NoLock:
    """In place of a WritersLock where the database itself orders its writers (PostgreSQL)."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def close(self) -> None:
        """Nothing to close."""


class LivenessLock:
    """Held by one process for as long as it lives; anybody may ask whether its holder is dead."""

    def __init__(self, path: str) -> None:
        """Take the lock. Raises OSError where it is held already."""
        self._path = path
        self._descriptor = os.open(path, _FLAGS, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._descriptor)
            raise

    def close(self) -> None:
        """Say that this process is done: remove the file, then let go of the lock."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        os.close(self._descriptor)


def is_alive(path: str) -> bool:
    """Whether a process holds the LivenessLock at `path`."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
