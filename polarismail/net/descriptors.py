# SPDX-License-Identifier: MIT
"""How many sessions the process's descriptors allow, the soft limit raised as far as that needs and the hard one allows."""

from __future__ import annotations

import contextlib
import resource

from polarismail.net.accepting import RESERVED_DESCRIPTORS

_OTHERS = 512
"""Databases, files that are being written, outgoing connections; `RESERVED_DESCRIPTORS` of them are kept from sessions."""


def make_room_for(sessions: int, waiting: int = 0) -> int:
    """Raise RLIMIT_NOFILE's soft limit where so many sessions, and clients that wait for one, need it; how many sessions there
    can be. Never raises."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return sessions
    wanted = sessions + waiting + _OTHERS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    # A tenth for what is no session, however few there are; at most half of the rest for who waits.
    usable = (soft - RESERVED_DESCRIPTORS) * 9 // 10
    return max(1, min(sessions, max(usable - waiting, usable // 2)))
