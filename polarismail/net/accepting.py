# SPDX-License-Identifier: MIT
"""Takes connections off a listening socket: a few at a time, no more than our share of them, and never the last descriptors.

Guarantees
    Several processes may accept from one socket: who has more than its share of the sessions leaves the next client to the
    others for a moment, and takes it after all where nobody did, so that a process that hangs delays clients but loses none.
    Near the limit of descriptors, and on errors of the machine, accepting pauses and clients wait in the kernel's line: what
    serves the sessions there are (spool, maildirs, outgoing connections) keeps `RESERVED_DESCRIPTORS` (HOSTILE E3).
Never
    A loop that spins on an error; an exception that reaches the reactor.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from typing import Protocol as Interface

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IListeningPort, IReadDescriptor
from twisted.logger import Logger
from zope.interface import implementer

from polarismail.net.shares import Shares
from polarismail.net.stream import Stream, address_of

RESERVED_DESCRIPTORS = 50
_A_TURN, _A_LONG_TURN = 16, 128
"""Connections taken before others on this reactor get their turn: the first number, and twice as many each time while clients
still wait, up to the second. What floods of octets cost is then shared by more connections, and the kernel's line does not
overflow: a client that the kernel drops from it waits for a greeting for seconds, or for ever (tests/siege)."""
_LEAVE_TO_OTHERS_SECONDS = 0.001
_BACK_OFF_SECONDS = 0.5
# The client has gone again, or a packet filter or the network says so: the next one may be well (accept(2)).
_OF_ONE_CLIENT = {
    errno.ECONNABORTED, errno.EPERM, errno.EPROTO, errno.ENETDOWN, errno.ENOPROTOOPT, errno.EHOSTDOWN, errno.ENONET,
    errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENETUNREACH,
}  # fmt: skip


Client = tuple[Any, ...]
"""Who is at the other end, as `socket.accept` says it: (address, port) or IPv6's four; () over a UNIX socket. IPv4 in IPv6's
clothes is IPv4."""
GoOn = Callable[[socket.socket, Client], None]


class Porch(Interface):
    """What a connection goes through before it costs an engine and a session: nothing has been sent or read yet."""

    def take(self, accepted: socket.socket, client: Client, go_on: GoOn) -> None:
        """Own the socket until `go_on(accepted, client)` is called, now or later, perhaps with another client; or close it.
        Never raises on what a client does."""

    def stop(self) -> None:
        """Nothing is accepted any more: close what is held."""


@implementer(IListeningPort, IReadDescriptor)
class Acceptor:
    """One listening socket of TCP or UNIX, which it owns. Made by `listeners.serve`; starts at once.

    `porches`: in the order in which a connection goes through them; shared by all listeners that have them.
    """

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        listening: socket.socket,
        factory: Any,
        shares: Shares | None = None,
        porches: Sequence[Porch] = (),
    ) -> None:
        self._reactor, self._listening, self._factory, self._shares = reactor, listening, factory, shares
        self._begin: GoOn = self._take
        for porch in reversed(porches):
            self._begin = partial(_pass_through, porch, self._begin)
        self._family = listening.family
        self._resume: Any = None  # the timer of a pause
        self._insists = False
        self._limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._told = False
        self._a_turn = _A_TURN
        listening.setblocking(False)
        if self._family != socket.AF_UNIX:
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)  # accepted sockets inherit it
        self.startListening()

    # -- IListeningPort

    def startListening(self) -> None:
        """Accept from now on."""
        self._factory.doStart()
        self._reactor.addReader(self)

    def stopListening(self) -> Deferred[None]:
        """Accept no more, and close the socket: who waits in line is another process's, or refused. Idempotent."""
        if self._listening.fileno() >= 0:
            self._reactor.removeReader(self)
            if self._resume is not None:
                self._resume.cancel()
                self._resume = None
            self._listening.close()
            self._factory.doStop()
        return succeed(None)

    def getHost(self) -> Any:
        """Where it listens."""
        return address_of(self._listening.getsockname())

    # -- IReadDescriptor

    def fileno(self) -> int:
        """Of the listening socket."""
        return self._listening.fileno()

    def logPrefix(self) -> str:
        """ILoggingContext."""
        return "accepting"

    def connectionLost(self, reason: Any) -> None:
        """The reactor is at its end."""
        self.stopListening()

    def doRead(self) -> None:
        """Clients wait: take some."""
        for _ in range(self._a_turn):
            if self._shares is not None and not self._insists and self._shares.has_more_than_its_share():
                self._insists = True
                self._pause(_LEAVE_TO_OTHERS_SECONDS, self._read_on)
                return
            try:
                accepted, client = self._listening.accept()
            except BlockingIOError:
                self._insists, self._a_turn = False, _A_TURN
                return
            except OSError as problem:
                if problem.errno in _OF_ONE_CLIENT:
                    continue
                self._tell(str(problem))
                self._pause(_BACK_OFF_SECONDS, self._look)
                return
            self._insists = False
            descriptor = accepted.fileno()
            if self._family != socket.AF_INET:
                client = _plain(client)
            self._begin(accepted, client)
            if descriptor >= self._limit - RESERVED_DESCRIPTORS:
                self._tell(f"{descriptor} of {self._limit} descriptors are in use")
                self._pause(_BACK_OFF_SECONDS, self._look)
                return
        self._a_turn = min(2 * self._a_turn, _A_LONG_TURN)

    def _take(self, accepted: socket.socket, client: Client) -> None:
        try:
            self._serve(accepted, client)
        except Exception:
            self.log.failure("a connection could not be begun")
            accepted.close()

    def _serve(self, accepted: socket.socket, client: Client) -> None:
        protocol = self._factory.buildProtocol(address_of(client))
        if protocol is None:
            accepted.close()
            return
        protocol.makeConnection(Stream(accepted, protocol, client, self, 0, self._reactor))

    # -- pauses

    def _pause(self, seconds: float, then: Callable[[], None]) -> None:
        self._reactor.removeReader(self)
        self._resume = self._reactor.callLater(seconds, then)

    def _read_on(self) -> None:
        self._resume = None
        self._reactor.addReader(self)

    def _look(self) -> None:
        """Whether there is room again."""
        if self._near_limit():
            self._pause(_BACK_OFF_SECONDS, self._look)
            return
        self._told = False
        self._read_on()

    def _near_limit(self) -> bool:
        # The kernel gives the lowest number that is free.
        try:
            probe = os.dup(self._listening.fileno())
        except OSError:
            return True
        os.close(probe)
        return probe >= self._limit - RESERVED_DESCRIPTORS

    def _tell(self, why: str) -> None:
        """Once for each time that it begins."""
        if not self._told:
            self._told = True
            self.log.critical("accepting pauses until there is room: {why}", why=why, event="accepting_paused")


def _plain(client: Any) -> Client:
    if type(client) is not tuple:
        return ()  # a UNIX socket's: the name that the client may have given to its end says nothing
    if client[0].startswith("::ffff:") and "." in client[0]:
        return client[0][7:], client[1]  # a socket for both families was handed over
    return client


def _pass_through(porch: Porch, go_on: GoOn, accepted: socket.socket, client: Client) -> None:
    porch.take(accepted, client, go_on)
