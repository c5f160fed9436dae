# SPDX-License-Identifier: MIT
"""After the sockets are bound, nothing of root is left; this module makes sure, and makes what an ordinary user needs.

HOSTILE E10: twistd drops user, group and supplementary groups; here that is checked, not believed, and made final.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from polarismail.values.errors import ConfigError

_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38


def make_directory(path: str, uid: int | None, gid: int | None, mode: int = 0o700) -> None:
    """Create a directory of ours where it is missing, owned by the user that the service will be.

    An existing one is left alone: whose it is, is the administrator's word. Raises ConfigError.
    """
    try:
        missing = [parent for parent in (Path(path), *Path(path).parents) if not parent.exists()]
        for parent in reversed(missing):
            parent.mkdir(mode if parent == Path(path) else 0o755)
            if os.geteuid() == 0 and (uid is not None or gid is not None):
                os.chown(parent, -1 if uid is None else uid, -1 if gid is None else gid)
    except OSError as problem:
        raise ConfigError(
            f"{path}: cannot be made: {problem.strerror}; make it, owned by the service's user"
        ) from problem


def check_dropped(uid: int | None, gid: int | None) -> None:
    """Make sure that the process is `uid` and `gid` for good. Raises ConfigError; does nothing where neither was asked."""
    if uid is not None:
        if os.getresuid() != (uid, uid, uid):
            raise ConfigError(f"privileges were not dropped: the user ids are {os.getresuid()}, expected {uid}")
        if uid != 0 and _may_become_root():
            raise ConfigError("privileges were not dropped: the process can become root again")
        if uid != 0 and gid is None and 0 in (*os.getresgid(), *os.getgroups()):
            raise ConfigError("privileges were not dropped: the group is still root's; give twistd --gid as well")
    if gid is not None:
        if os.getresgid() != (gid, gid, gid):
            raise ConfigError(f"privileges were not dropped: the group ids are {os.getresgid()}, expected {gid}")
        if gid != 0 and 0 in os.getgroups():
            raise ConfigError("privileges were not dropped: root's group is still a supplementary group")


def forbid_new_privileges() -> None:
    """No set-uid program that we might run gains anything, and no other process of the user may trace this one.

    Raises OSError where the kernel refuses, which no supported kernel does.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((_PR_SET_NO_NEW_PRIVS, 1), (_PR_SET_DUMPABLE, 0)):
        if libc.prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _may_become_root() -> bool:
    try:
        os.setuid(0)
    except PermissionError:
        return False
    return True
