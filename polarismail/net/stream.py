# SPDX-License-Identifier: MIT
"""Server sockets at their price: one accepted TCP connection without what Twisted's own does for everybody else.

A mail session is a dozen short reads and writes, so what each of them costs beside the kernel's share is what a message
costs. Differences to `twisted.internet.tcp.Server`, whose contract is kept:

- recv and send are called without letting go of the interpreter. The sockets never block, so nothing is gained by letting
  go; but each time a thread that waits for the interpreter is woken and put to sleep again, which costs more than the call.
- What is written goes to the kernel at once where nothing waits before it, instead of in another turn of the reactor
  behind two calls of epoll_ctl.
- `finish` closes at once where nothing waits to be written: three calls of epoll_ctl and a turn less.
- No names for logs are made that nobody reads.

Guarantees: the order of octets; `connectionLost` once. Never: reads or writes a descriptor that is closed.
"""

from __future__ import annotations

from typing import Any

from twisted.internet import main
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.tcp import Server
from twisted.python.failure import Failure

from polarismail.net import kernel

_DONE = Failure(main.CONNECTION_DONE)


def address_of(name: Any) -> Any:
    """What a socket says of one of its ends, as Twisted says it. () and any text are a UNIX socket's."""
    if not name or type(name) is not tuple:
        return UNIXAddress(name or None)
    return (IPv4Address if len(name) == 2 else IPv6Address)("TCP", name[0], name[1])


class Stream(Server):
    """One accepted connection. Reactors other than epoll's work too."""

    def __init__(self, sock: Any, protocol: Any, client: Any, server: Any, sessionno: int, reactor: Any) -> None:
        # What the constructors of Server, Connection and FileDescriptor do; none of them is called.
        self.reactor = reactor
        self.protocol = protocol
        self.socket = sock
        self.fileno = sock.fileno
        self.client = client
        self.server = server
        self._tempDataBuffer = []
        self._tempDataLen = 0
        sock.setblocking(False)
        reactor.addReader(self)
        self.connected = 1

    def __repr__(self) -> str:
        where = self.client[0] if self.client else "here"
        return f"<{type(self.protocol).__name__ if self.connected else 'closed'} from {where}>"

    def getPeer(self) -> Any:
        """Who the client is, which need not be who is at the socket's other end: a proxy may speak for it."""
        return address_of(self.client)

    def getHost(self) -> Any:
        """See ITransport."""
        return address_of(self.socket.getsockname())

    def logPrefix(self) -> str:
        """For what Twisted logs itself."""
        return "mail"

    def doRead(self) -> Any:
        """See IReadDescriptor."""
        return kernel.receive(self.fileno(), self.protocol.dataReceived)

    def writeSomeData(self, data: Any) -> Any:
        """See FileDescriptor."""
        return kernel.send(self, data, Server.writeSomeData)

    def write(self, data: bytes) -> None:
        """See ITransport."""
        if self.TLS:
            if self.connected:
                inside: Any = self.protocol
                inside.write(data)
        else:
            kernel.write_at_once(self, data)

    def finish(self) -> None:
        """Close now where nothing waits to be written, else once it is. `connectionLost` may follow inside this call."""
        if self.TLS or self.producer is not None or self.disconnecting or not self.connected or self._waits:
            self.loseConnection()
            return
        self.disconnecting = 1
        self.connectionLost(_DONE)

    @property
    def _waits(self) -> bool:
        """Whether octets wait here, before which nothing may be written."""
        return bool(self.dataBuffer or self._tempDataLen)

    def _closeSocket(self, orderly: bool) -> None:
        # No shutdown(): nobody else has this descriptor, so close() says goodbye just as well.
        if orderly:
            self.socket.close()
        else:
            Server._closeSocket(self, orderly)
