# SPDX-License-Identifier: MIT
"""Room that is given up when the disk is full, so that outcomes can still be recorded and delivery empties the queue.

DURABILITY rule 4: a delivery that cannot be recorded is a duplicate to come.
"""

from __future__ import annotations

import contextlib
import os

RESERVE_OCTETS = 16 * 1024 * 1024


class Reserve:
    """A file of `octets` real octets, there or given up. Used by one thread at a time."""

    def __init__(self, path: str, octets: int = RESERVE_OCTETS) -> None:
        self._path, self._octets = path, octets

    def fill(self) -> bool:
        """Take the room; False where there is not enough of it."""
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, self._octets)
            finally:
                os.close(descriptor)
        except OSError:
            self.release()
            return False
        return True

    def release(self) -> None:
        """Give the room up. Idempotent; what cannot be removed stays."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)
