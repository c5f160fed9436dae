# SPDX-License-Identifier: MIT
"""Sockets to other hosts at their price: what `twisted.internet.tcp.Client` does for everybody else costs more than the mail.

- recv and send are called without letting go of the interpreter. The socket never blocks, so nothing is gained by letting
  go; but each time a thread that waits for the interpreter is woken, only to be put to sleep again.
- `write_now` hands octets to the kernel at once where nothing waits before them. Twisted's way, to wait until epoll says that
  the socket is writable, costs two epoll_ctl calls and a turn of the reactor for each write.

What the kernel does not take, and what is large, goes Twisted's way. What TLS makes of our words is written at once, too.
Guarantees: the contract of Twisted's transports; octets in order, each once.
"""

from __future__ import annotations

import ctypes
import socket
from errno import EAGAIN, EINTR, ENOBUFS, EWOULDBLOCK
from typing import Any

from twisted.internet import main
from twisted.internet._newtls import startTLS as start_tls
from twisted.internet.abstract import FileDescriptor
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP6ClientEndpoint
from twisted.internet.posixbase import PosixReactorBase
from twisted.internet.tcp import Client, Connector

_OCTETS = FileDescriptor.bufferSize
_SMALL_OCTETS = 16384  # what is larger is copied while others may run
_AGAIN = frozenset({EAGAIN, EWOULDBLOCK, EINTR, ENOBUFS})

# PyDLL, unlike CDLL, keeps the interpreter during the call.
_libc = ctypes.PyDLL(None, use_errno=True)
_recv, _send = _libc.recv, _libc.send
_recv.argtypes, _recv.restype = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_ssize_t
_send.argtypes, _send.restype = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_ssize_t
# One buffer for all: what was read is copied out before anything else happens.
_buffer = ctypes.create_string_buffer(_OCTETS)
_address = ctypes.addressof(_buffer)
_take = ctypes.string_at
_errno = ctypes.get_errno


def _write_below(transport: Any, octets: bytes) -> None:
    """Below any TLS: to the kernel where nothing waits, and what it does not take to the buffer."""
    if not (transport.dataBuffer or transport._tempDataBuffer or transport.disconnecting or not transport.connected):
        taken = transport.writeSomeData(octets)
        if taken == len(octets):
            return
        if type(taken) is int and taken > 0:
            octets = octets[taken:]
    FileDescriptor.write(transport, octets)


class _Below(FileDescriptor):
    """How TLS writes to the socket below it: its methods are called with the transport in the place of `self`."""

    def write(self, data: bytes) -> None:
        """See FileDescriptor."""
        _write_below(self, data)


class Outgoing(Client):
    """One connection that we opened."""

    def doRead(self) -> Any:
        """See IReadDescriptor."""
        octets = _recv(self.fileno(), _address, _OCTETS, 0)
        if octets > 0:
            return self._dataReceived(_take(_address, octets))
        if octets == 0:
            return main.CONNECTION_DONE
        return None if _errno() in _AGAIN else main.CONNECTION_LOST

    def writeSomeData(self, data: Any) -> Any:
        """See FileDescriptor: how many octets were taken, or an exception."""
        if type(data) is not bytes or len(data) > _SMALL_OCTETS:
            return Client.writeSomeData(self, data)
        taken = _send(self.fileno(), data, len(data), socket.MSG_NOSIGNAL)
        if taken >= 0:
            return taken
        return 0 if _errno() in _AGAIN else main.CONNECTION_LOST

    def write_now(self, octets: bytes) -> None:
        """Like `write`, sooner. That the connection is gone is found out by the reactor, never inside this call."""
        if self.TLS:
            self.write(octets)
        else:
            _write_below(self, octets)

    def startTLS(self, ctx: Any, normal: bool = True) -> None:
        """See ITLSTransport."""
        start_tls(self, ctx, normal, _Below)


class _OutgoingConnector(Connector):
    def _makeTransport(self) -> Outgoing:
        return Outgoing(self.host, self.port, self.bindAddress, self, self.reactor)


class _Reactor:
    """What an endpoint wants of a reactor."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor

    def connectTCP(self, host: str, port: int, factory: Any, timeout: float, bindAddress: Any) -> Connector:
        connector = _OutgoingConnector(host, port, factory, timeout, bindAddress, self._reactor)
        connector.connect()
        return connector


def endpoint(reactor: Any, address: str, port: int, seconds: float, bind_address: str | None = None) -> Any:
    """A client endpoint for an IPv4 or IPv6 address, whose connections are `Outgoing` where the reactor has real sockets."""
    kind = TCP6ClientEndpoint if ":" in address else TCP4ClientEndpoint
    connecting = _Reactor(reactor) if isinstance(reactor, PosixReactorBase) else reactor
    return kind(connecting, address, port, seconds, (bind_address, 0) if bind_address else None)
