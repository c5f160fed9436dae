# SPDX-License-Identifier: MIT
"""A disk that fails when a test says so: every write-like system call of a process tree stops here before it happens.

The kernel itself does the stopping (seccomp's user notification), so that it is the real interpreter and the real SQLite
that are stopped, in whichever thread or child process, in one order for all of them. Nothing is slowed down but what is
watched. Linux on x86-64 and aarch64; needs root, or PR_SET_NO_NEW_PRIVS.

    descriptor = watch_this_process()          in the child, before it does anything else; every child of it is watched, too
    FaultyDisk(descriptor, root, decide)       in the test: `decide(operation)` is asked about each operation below `root`,
                                               which waits until it has answered: None lets it happen, an errno fails it
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import platform
import select
import struct
import threading
from collections.abc import Callable

from attrs import frozen

# name: (number on x86-64, number on aarch64, arguments: F descriptor, D directory descriptor and path, P path)
_CALLS: dict[str, tuple[int | None, int | None, str]] = {
    "write": (1, 64, "F"),
    "pwrite64": (18, 68, "F"),
    "writev": (20, 66, "F"),
    "pwritev": (296, 70, "F"),
    "fsync": (74, 82, "F"),
    "fdatasync": (75, 83, "F"),
    "syncfs": (306, 267, "F"),
    "sync_file_range": (277, 84, "F"),
    "ftruncate": (77, 46, "F"),
    "fallocate": (285, 47, "F"),
    "sendfile": (40, 71, "F"),
    "copy_file_range": (326, 285, " F"),
    "rename": (82, None, "P"),
    "renameat": (264, 38, "D"),
    "renameat2": (316, 276, "D"),
    "link": (86, None, "P"),
    "linkat": (265, 37, "D"),
    "unlink": (87, None, "P"),
    "unlinkat": (263, 35, "D"),
    "mkdir": (83, None, "P"),
    "mkdirat": (258, 34, "D"),
    "openat": (257, 56, "D"),  # with O_CREAT or O_TRUNC
}
_MACHINES = {"x86_64": (0, 317, 0xC000003E), "aarch64": (1, 277, 0xC00000B7)}
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, _SEND
_NOTIFICATION, _ANSWER = struct.Struct("=QIIiIQ6Q"), struct.Struct("=QqiI")
_CONTINUE = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE
_NEW_LISTENER, _WAIT_KILLABLE = 1 << 3, 1 << 5


@frozen
class Operation:
    """One system call that is about to happen. `number` counts from 1 over all threads and processes."""

    number: int
    call: str
    path: str


def watch_this_process() -> int:
    """Install the filter; returns the descriptor on which calls are announced, to be handed to a FaultyDisk.

    From now on each call waits until somebody answers it, and fails with ENOSYS once nobody has the descriptor any more.
    Raises OSError where the kernel or the machine cannot do this.
    """
    if platform.machine() not in _MACHINES:
        raise OSError(f"not known how to watch system calls of {platform.machine()}")
    column, seccomp, architecture = _MACHINES[platform.machine()]
    numbers = {name: row[column] for name, row in _CALLS.items()}
    opens = numbers.pop("openat")
    assert isinstance(opens, int)
    wanted = [number for number in numbers.values() if isinstance(number, int)]
    load, equal, some_bit, answer = 0x20, 0x15, 0x45, 0x06
    allow, notify = 0x7FFF0000, 0x7FC00000
    last = len(wanted) + 6  # index of "allow"
    program = [(load, 0, 0, 4), (equal, 0, last - 2, architecture), (load, 0, 0, 0)]
    for at, number in enumerate(wanted, 3):
        program.append((equal, last + 1 - at - 1, 0, number))
    # openat: the flags are the low half of the third argument.
    program.append((equal, 0, last - len(program) - 1, opens))
    program.append((load, 0, 0, 16 + 2 * 8))
    program.append((some_bit, last + 1 - len(program) - 1, 0, os.O_CREAT | os.O_TRUNC))
    program += [(answer, 0, 0, allow), (answer, 0, 0, notify)]
    assert len(program) == last + 2
    code = b"".join(struct.pack("=HBBI", *line) for line in program)
    octets = ctypes.create_string_buffer(code, len(code))
    descriptor_of_program = struct.pack("@HP", len(program), ctypes.addressof(octets))
    library = ctypes.CDLL(None, use_errno=True)
    if os.geteuid():
        library.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    listener = library.syscall(
        ctypes.c_long(seccomp), ctypes.c_uint(1), ctypes.c_uint(_NEW_LISTENER | _WAIT_KILLABLE), descriptor_of_program
    )
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp: " + os.strerror(ctypes.get_errno()))
    return int(listener)


class FaultyDisk:
    """Asks `decide` about each write-like call on a file below `root`, in a thread of its own, until nobody is watched.

    `decide` may kill the process: the call then never happens. What it raises is kept in `problem`, and ends all faults.
    """

    def __init__(self, listener: int, root: str, decide: Callable[[Operation], int | None]) -> None:
        self._listener, self._root, self._decide = listener, os.path.realpath(root), decide
        column = _MACHINES[platform.machine()][0]
        self._names = {row[column]: (name, row[2]) for name, row in _CALLS.items() if row[column] is not None}
        self.operations = 0
        self.problem: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="faulty-disk", daemon=True)
        self._thread.start()

    def join(self, seconds: float = 10.0) -> None:
        """Wait until every watched process is gone. Raises what `decide` had raised."""
        self._thread.join(seconds)
        if self.problem is not None:
            raise self.problem

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        with contextlib.closing(_Closing(self._listener)):
            while True:
                for _, events in poll.poll():
                    if not events & select.POLLIN:
                        return
                    self._answer_one()

    def _answer_one(self) -> None:
        buffer = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(self._listener, _RECEIVE, buffer)
        except OSError:  # ENOENT: it died while it waited
            return
        identity, pid, _, call, _, _, *arguments = _NOTIFICATION.unpack(buffer)
        fault = self._judge(pid, call, arguments)
        answer = _ANSWER.pack(identity, 0, -fault if fault else 0, 0 if fault else _CONTINUE)
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._listener, _SEND, bytearray(answer))

    def _judge(self, pid: int, call: int, arguments: list[int]) -> int | None:
        name, kind = self._names[call]
        path = _path_of(pid, kind, arguments)
        if self.problem is not None or not (path == self._root or path.startswith(self._root + "/")):
            return None
        self.operations += 1
        try:
            return self._decide(Operation(self.operations, name, path))
        except Exception as problem:
            self.problem = problem
            return None


class _Closing:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def close(self) -> None:
        os.close(self._descriptor)


def _path_of(pid: int, kind: str, arguments: list[int]) -> str:
    """The (first) path that a call is about; "" where that cannot be told, because the process is gone."""
    try:
        if kind.endswith("F"):
            return os.readlink(f"/proc/{pid}/fd/{_signed(arguments[2 if kind == ' F' else 0])}")
        base = "cwd" if kind == "P" or _signed(arguments[0]) == -100 else f"fd/{_signed(arguments[0])}"  # AT_FDCWD
        path = _read_string(pid, arguments[0 if kind == "P" else 1])
        return os.path.normpath(os.path.join(os.readlink(f"/proc/{pid}/{base}"), path))
    except OSError:
        return ""


def _signed(number: int) -> int:
    return (number & 0xFFFFFFFF) - (1 << 32 if number & 0x80000000 else 0)


def _read_string(pid: int, address: int) -> str:
    found = b""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        while b"\0" not in found:
            # To the end of the page at most: the next one may not be there.
            piece = memory.read(4096 - (address + len(found)) % 4096)
            if not piece:
                break
            found += piece
    return os.fsdecode(found.partition(b"\0")[0])
