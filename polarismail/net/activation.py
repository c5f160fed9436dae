# SPDX-License-Identifier: MIT
"""Listening sockets that whoever started this process hands over: systemd by name (sd_listen_fds(3)), anybody by number.

Guarantees: a descriptor is looked at before it is believed to be a listening stream socket; it is not passed on to programs
that we start, and the variables that name it are taken out of the environment.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from attrs import define

from polarismail.values.errors import ConfigError

_FIRST = 3  # SD_LISTEN_FDS_START
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


@define
class InheritedSockets:
    """What was handed over. `names`: systemd's name of each descriptor; `problem`: why there is none, for people."""

    names: dict[int, str]
    problem: str = ""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> InheritedSockets:
        """Read what systemd says, and take it out. Never raises."""
        if environment is None:
            environment = _initial_environment()
            for name in _VARIABLES:
                os.environ.pop(name, None)
        pid, count, names = (environment.get(name, "") for name in _VARIABLES)
        if not count:
            return cls({}, "systemd has handed over no sockets; is the service started by its .socket unit?")
        if pid != str(os.getpid()):
            return cls({}, f"systemd's sockets are for process {pid[:20]}, not for this one; does twistd run with -n?")
        if not count.isdecimal() or not 1 <= int(count) <= 1000:
            return cls({}, "LISTEN_FDS is no number of descriptors")
        words = names.split(":") if names else []
        numbers = range(_FIRST, _FIRST + int(count))
        return cls({number: words[at] if at < len(words) else "unknown" for at, number in enumerate(numbers)})

    def named(self, listener: str, name: str) -> list[socket.socket]:
        """All sockets of systemd's that have this name. Raises ConfigError."""
        numbers = [number for number, each in self.names.items() if each == name]
        if not numbers:
            others = ", ".join(sorted(set(self.names.values())))
            raise ConfigError(
                f'listener "{listener}": no socket of systemd\'s is named "{name}" (FileDescriptorName=): '
                + (f"there are {others}" if others else self.problem)
            )
        return [self.numbered(listener, number) for number in numbers]

    def numbered(self, listener: str, number: int) -> socket.socket:
        """The socket with this number, which is taken. Raises ConfigError."""
        try:
            found = socket.socket(fileno=number)
        except OSError as problem:
            raise ConfigError(
                f'listener "{listener}": descriptor {number} is no socket: {problem.strerror}; '
                "hand over a listening one, which must be open when the process starts"
            ) from problem
        if (
            found.type != socket.SOCK_STREAM
            or found.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
            or not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        ):
            found.detach()  # it stays whose it is
            raise ConfigError(
                f'listener "{listener}": descriptor {number} is no listening stream socket of IPv4, IPv6 or UNIX '
                "(systemd: ListenStream= and Accept=no)"
            )
        self.names.pop(number, None)
        found.set_inheritable(False)
        found.setblocking(False)
        return found

    def check_all_taken(self) -> None:
        """Raises ConfigError where systemd listens for us on what no listener serves: its clients would wait for ever."""
        if self.names:
            raise ConfigError(
                f'systemd hands over a socket named "{next(iter(self.names.values()))}" (FileDescriptorName=), '
                "which is the address of no listener"
            )


def _initial_environment() -> dict[str, str]:
    """What the process was started with. Twisted takes the variables out of `os.environ` when its endpoints are imported."""
    try:
        with open("/proc/self/environ", "rb") as file:
            words = [os.fsdecode(each).partition("=") for each in file.read().split(b"\0")]
    except OSError:
        return dict(os.environ)
    return {name: value for name, _, value in words}
