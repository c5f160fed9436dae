# SPDX-License-Identifier: MIT
"""Behind a proxy: who the client is stands in a header that comes before TLS and before the greeting (wire/proxy_protocol.py).

The porch of listeners with `proxy_networks`.

Guarantees
    The header is taken off the socket and not an octet more. Who connects from elsewhere than the named networks is closed
    without a word and its octets are not looked at: nobody else can say who he is. A proxy has `header_seconds` in all to
    send the header, however it dribbles in; meanwhile it costs a descriptor and some hundred octets, and no timer, and at
    most `waiting` of them are held, of which the oldest makes room.
Never
    An exception that reaches the reactor; a log line for each refusal of a flood: at most one a second, with a count.
"""

from __future__ import annotations

import socket
from typing import Any

from attrs import frozen
from twisted.internet.interfaces import IReadDescriptor
from twisted.logger import Logger
from zope.interface import implementer

from polarismail.net.accepting import Client, GoOn
from polarismail.net.listeners import Listener, is_in
from polarismail.values.events import RecordEvent
from polarismail.values.network import LOCAL_CLIENT
from polarismail.wire.proxy_protocol import MAX_HEADER_OCTETS, Fault, ProxiedClient, ProxyParser

_QUIET_SECONDS = 1.0


@frozen
class ProxySettings:
    """`[proxy]`: bounds of what waits for a PROXY header."""

    header_seconds: float = 5.0
    waiting: int = 1000  # for each listener and worker


class ProxyPorch:
    """See `net.accepting.Porch`; one for each listener."""

    log = Logger()

    def __init__(self, reactor: Any, listener: Listener, settings: ProxySettings, record_event: RecordEvent) -> None:
        self._reactor, self._listener, self._record_event = reactor, listener, record_event
        self.settings = settings  # others may be put in its place; who waits already sees them, too
        self._waiting: dict[_Waiting, float] = {}  # since when; the oldest first
        self._timer: Any = None
        self._refused = 0
        self._last_told = float("-inf")

    def take(self, accepted: socket.socket, client: Client, go_on: GoOn) -> None:
        """See Porch."""
        address = client[0] if client else LOCAL_CLIENT
        if not is_in(address, self._listener.proxy_networks):
            accepted.close()
            self._tell(address, "not in proxy_networks")
            return
        accepted.setblocking(False)
        # Proxies send the header with the connection: mostly it is there, and nothing has to wait.
        waiting = _Waiting(self, accepted, client, go_on)
        if waiting.read():
            return
        if len(self._waiting) >= max(1, self.settings.waiting):
            self.refuse(next(iter(self._waiting)), "too many wait")
        self._waiting[waiting] = self._reactor.seconds()
        self._reactor.addReader(waiting)
        if self._timer is None:
            self._timer = self._reactor.callLater(self.settings.header_seconds, self._look)

    def stop(self) -> None:
        """See Porch. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for each in list(self._waiting):
            self.forget(each)
            each.accepted.close()

    def forget(self, waiting: _Waiting) -> None:
        """It waits no more."""
        if self._waiting.pop(waiting, None) is not None:
            self._reactor.removeReader(waiting)

    def refuse(self, waiting: _Waiting, why: str) -> None:
        """Close it, and say why in the log."""
        self.forget(waiting)
        waiting.accepted.close()
        self._tell(waiting.client[0] if waiting.client else LOCAL_CLIENT, why)

    def _look(self) -> None:
        """One timer for all of them: they came in the order in which their time runs out."""
        self._timer = None
        now, seconds = self._reactor.seconds(), self.settings.header_seconds
        for each, since in list(self._waiting.items()):
            if since + seconds > now:
                self._timer = self._reactor.callLater(since + seconds - now, self._look)
                return
            self.refuse(each, "no complete PROXY header in time")

    def _tell(self, proxy: str, why: str) -> None:
        self._refused += 1
        now = self._reactor.seconds()
        if now - self._last_told >= _QUIET_SECONDS:
            self._last_told = now
            fields = {"listener": self._listener.name, "proxy": proxy, "problem": why, "refused": self._refused}
            self._refused = 0
            self._record_event("proxy-refused", fields)


@implementer(IReadDescriptor)
class _Waiting:
    """A connection whose header has not come yet. `client` is the proxy."""

    __slots__ = ("_go_on", "_parser", "_porch", "accepted", "client")

    def __init__(self, porch: ProxyPorch, accepted: socket.socket, client: Client, go_on: GoOn) -> None:
        self._porch, self.accepted, self.client, self._go_on = porch, accepted, client, go_on
        self._parser = ProxyParser()

    def read(self) -> bool:
        """Take what belongs to the header. True when nothing more has to be waited for, well or not."""
        try:
            peeked = self.accepted.recv(MAX_HEADER_OCTETS, socket.MSG_PEEK)
            # All that was seen, but for what stands behind a complete header: a socket that shows again what was left in it
            # would wake us without end.
            taken = self._parser.receive(peeked)
            if taken:
                self.accepted.recv(taken)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            peeked = b""
        result = self._parser.result
        if not peeked:
            self._porch.refuse(self, "closed before the PROXY header was complete")
        elif isinstance(result, Fault):
            self._porch.refuse(self, result.reason)
        elif result is None:
            return False
        else:
            self._porch.forget(self)
            self._go_on(
                self.accepted,
                _client(result.address, result.port) if isinstance(result, ProxiedClient) else self.client,
            )
        return True

    def fileno(self) -> int:
        """IReadDescriptor."""
        return self.accepted.fileno()

    def logPrefix(self) -> str:
        """ILoggingContext."""
        return "proxy"

    def doRead(self) -> None:
        """Something has come, or the proxy has gone."""
        self.read()

    def connectionLost(self, reason: Any) -> None:
        """The reactor saw the connection break, or is at its end."""
        self._porch.forget(self)
        self.accepted.close()


def _client(address: str, port: int) -> Client:
    return (address, port, 0, 0) if ":" in address else (address, port)
