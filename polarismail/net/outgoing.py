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

from typing import Any

from twisted.internet._newtls import startTLS as start_tls
from twisted.internet.abstract import FileDescriptor
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP6ClientEndpoint
from twisted.internet.posixbase import PosixReactorBase
from twisted.internet.tcp import Client, Connector

from polarismail.net import kernel


class _Below(FileDescriptor):
    """How TLS writes to the socket below it: its methods are called with the transport in the place of `self`."""

    def write(self, data: bytes) -> None:
        """See FileDescriptor."""
        kernel.write_at_once(self, data)


class Outgoing(Client):
    """One connection that we opened."""

    def doRead(self) -> Any:
        """See IReadDescriptor."""
        return kernel.receive(self.fileno(), self._dataReceived)

    def writeSomeData(self, data: Any) -> Any:
        """See FileDescriptor."""
        return kernel.send(self, data, Client.writeSomeData)

    def write_now(self, octets: bytes) -> None:
        """Like `write`, sooner. That the connection is gone is found out by the reactor, never inside this call."""
        if self.TLS:
            self.write(octets)
        else:
            kernel.write_at_once(self, octets)

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
