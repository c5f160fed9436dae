# SPDX-License-Identifier: MIT
"""UNIX sockets by path: bound with the right mode from the first moment, accepted from without spinning, of any length.

Twisted's own UNIX port changes the socket's mode after binding, and removes files by a name that may be another one's by
then; here neither happens.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from twisted.internet.interfaces import IReadDescriptor
from twisted.logger import Logger
from zope.interface import implementer

_BACKLOG = 64
_BACK_OFF_SECONDS = 1.0


@contextmanager
def short_name(path: str) -> Iterator[str]:
    """A name for the same file that fits into a socket address, which holds 107 octets. Raises OSError."""
    if len(os.fsencode(path)) < 100:
        yield path
        return
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{os.path.basename(path)}"
    finally:
        os.close(directory)


def listen(path: str, mode: int, backlog: int = _BACKLOG) -> socket.socket:
    """A listening, non-blocking socket whose file has this mode. Raises OSError."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # The mode must hold from the first moment, not from a chmod on; nothing else makes files while this runs.
    before = os.umask(0o777 & ~mode)
    try:
        with short_name(path) as name:
            listening.bind(name)
        listening.listen(backlog)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    finally:
        os.umask(before)
    return listening


def connect(path: str) -> socket.socket:
    """A connected, non-blocking socket. Raises OSError; BlockingIOError where too many wait in line."""
    connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connecting.setblocking(False)
        with short_name(path) as name:
            connecting.connect(name)
    except OSError:
        connecting.close()
        raise
    return connecting


def adopt(reactor: Any, connected: socket.socket, factory: Any) -> Any:
    """Give a connected socket to the reactor; returns the factory's protocol. The socket is closed here: the reactor has a
    descriptor of its own."""
    with connected:
        connected.setblocking(False)
        return reactor.adoptStreamConnection(connected.fileno(), socket.AF_UNIX, factory).protocol


@implementer(IReadDescriptor)
class UnixAcceptor:
    """A listening descriptor, which several processes may share. It belongs to this object."""

    log = Logger()

    def __init__(self, reactor: Any, listening: socket.socket, factory: Any) -> None:
        self._listening, self._factory, self._reactor = listening, factory, reactor

    def fileno(self) -> int:
        """Of the listening socket."""
        return self._listening.fileno()

    def logPrefix(self) -> str:
        """ILoggingContext."""
        return "accepting"

    def doRead(self) -> None:
        """Take one connection; the reactor calls again for the next."""
        try:
            accepted, _ = self._listening.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # the client thought better of it, or another process took it
        except OSError as problem:
            # Out of descriptors: without a pause the reactor would call us again at once, for ever.
            self.log.error("a UNIX socket cannot accept: {problem}", problem=str(problem))
            self._reactor.removeReader(self)
            self._reactor.callLater(_BACK_OFF_SECONDS, self.start)
            return
        adopt(self._reactor, accepted, self._factory)

    def connectionLost(self, reason: Any) -> None:
        """The reactor is at its end."""
        self.stop()

    def start(self) -> None:
        """Accept from now on."""
        if self._listening.fileno() >= 0:
            self._reactor.addReader(self)

    def stop(self) -> None:
        """Accept no more. Idempotent."""
        if self._listening.fileno() >= 0:
            self._reactor.removeReader(self)
            self._listening.close()
