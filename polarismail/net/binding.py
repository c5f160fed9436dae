# SPDX-License-Identifier: MIT
"""The sockets of listeners: bound while the process may still be root, or taken from who started it.

Guarantees: what `bind` returns listens and does not block; what it refuses is a ConfigError that names the listener and says
what to do, and leaves nothing bound. The file of a UNIX socket has its mode from the first moment, and is the later user's.
"""

from __future__ import annotations

import errno
import grp
import os
import socket
import stat

from polarismail.net import unix_sockets
from polarismail.net.activation import InheritedSockets
from polarismail.net.listeners import Listener
from polarismail.values.errors import ConfigError

_BACKLOG = 1024


def bind(
    listener: Listener, inherited: InheritedSockets | None = None, uid: int | None = None, gid: int | None = None
) -> list[socket.socket]:
    """Its listening sockets. `uid` and `gid`: whom the service becomes. Raises ConfigError; one about an address in use has the
    OSError as its cause."""
    if listener.kind == "unix":
        return [_bind_unix(listener, uid, gid)]
    if listener.kind != "tcp":
        inherited = inherited or InheritedSockets.from_environment()
        return (
            inherited.named(listener.name, listener.within)
            if listener.kind == "systemd"
            else ([inherited.numbered(listener.name, int(listener.within))])
        )
    if listener.address:
        return [_bind_one(listener, listener.address)]
    bound = [_bind_one(listener, "0.0.0.0")]
    try:
        bound.append(_bind_one(listener, "::"))
    except ConfigError as problem:
        cause = problem.__cause__
        if not isinstance(cause, OSError) or cause.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            bound[0].close()
            raise  # a machine without IPv6 is served on IPv4 alone; anything else is a fault
    return bound


def endpoints(bound: list[socket.socket]) -> frozenset[tuple[str, int]]:
    """(address, port) of those that speak TCP, wherever they came from."""
    return frozenset(
        (each.getsockname()[0], each.getsockname()[1])
        for each in bound
        if each.family in (socket.AF_INET, socket.AF_INET6)
    )


def _bind_one(listener: Listener, address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    bound = None
    try:
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((address, listener.port))
        bound.listen(_BACKLOG)
        bound.setblocking(False)
    except OSError as problem:
        if bound is not None:
            bound.close()
        raise ConfigError(
            f'listener "{listener.name}" cannot listen on {address} port {listener.port}: {problem.strerror}; '
            "is another server running there, is the address this machine's, and does a port below 1024 have root?"
        ) from problem
    return bound


# -- UNIX sockets ----------------------------------------------------------------------------------------------------------


def _bind_unix(listener: Listener, uid: int | None, gid: int | None) -> socket.socket:
    path = listener.within
    if listener.socket_group:
        try:
            gid = grp.getgrnam(listener.socket_group).gr_gid
        except KeyError as problem:
            raise ConfigError(
                f'listener "{listener.name}": there is no group "{listener.socket_group}" on this machine (socket_group)'
            ) from problem
    bound = None
    try:
        _remove_stale(path)
        bound = unix_sockets.listen(path, listener.socket_mode, _BACKLOG)
        if os.geteuid() == 0 or listener.socket_group:
            _give(path, uid if os.geteuid() == 0 else None, gid)
    except OSError as problem:
        if bound is not None:
            bound.close()
            os.unlink(path)
        raise ConfigError(
            f'listener "{listener.name}" cannot listen on {path}: {problem.strerror}; is another server running there, and may '
            "the service make files in that directory, and give them to that group?"
        ) from problem
    return bound


def _give(path: str, uid: int | None, gid: int | None) -> None:
    """Change whose socket this is, and of nothing else: whoever the directory belongs to may put another file there, which root
    must not give away."""
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            raise FileNotFoundError(errno.ENOENT, "the socket has gone", path)
        os.chown(f"/proc/self/fd/{descriptor}", -1 if uid is None else uid, -1 if gid is None else gid)
    finally:
        os.close(descriptor)


def _remove_stale(path: str) -> None:
    """A socket that a killed server left behind goes; a live server's is EADDRINUSE, and so is what is no socket."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "something that is no socket is there", path)
        unix_sockets.connect(path).close()
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        os.unlink(path)
        return
    except BlockingIOError:
        pass  # somebody lives there who has many clients
    raise OSError(errno.EADDRINUSE, "another server answers there", path)


class SocketFiles:
    """The files of UNIX sockets that this process has made, each remembered by what it is, not by its name alone."""

    def __init__(self) -> None:
        self._made: list[tuple[str, tuple[int, int]]] = []

    def note(self, path: str) -> None:
        """It was made just now."""
        self._made.append((path, _identity(path)))

    def remove(self) -> None:
        """Remove those that are still ours. Idempotent. Where the later user may not, the next start does."""
        while self._made:
            path, identity = self._made.pop()
            try:
                if _identity(path) == identity:
                    os.unlink(path)
            except OSError:
                continue


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino
