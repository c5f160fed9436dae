# SPDX-License-Identifier: MIT
"""What is said to a next hop and what comes back: the client's engine on a socket, one answer awaited at a time.

RFC 5321 §4.5.3.2 (time-outs).

Guarantees: every wait ends, with what was waited for or with ConnectFailed, whatever the next hop does; each has a deadline
that dribbling octets do not move. What the engine has to say is written before anything is waited for.

Never: decides what is said next; net/outgoing.py is the socket, relay/session.py who speaks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IHandshakeListener, IPushProducer
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from polarismail.net.outgoing import Outgoing
from polarismail.relay.clients import ClientSettings, ConnectFailed, local_reply, where
from polarismail.relay.deadlines import NEVER, Deadline
from polarismail.values.reply import Reply
from polarismail.wire.smtp_client import Broken, SendContent, SmtpClient, Step


@implementer(IHandshakeListener, IPushProducer)
class Dialogue(Protocol):
    """One connection. Who inherits says things to `_engine` and then awaits `_wait()`."""

    transport: Any
    _begin_content: Callable[[], None]
    """Called when the next hop wants the content."""

    def __init__(self, reactor: Any, settings: ClientSettings) -> None:
        self._settings = settings
        self._engine = SmtpClient(settings.hostname)
        self._waiter: Deferred[Any] | None = None  # for Answered, Finished, or the end of a handshake
        self._writable: Deferred[None] | None = None  # set while the next hop does not read
        self._ready = self._closed = self._handshaking = self._streaming = False
        self._allowed_for: Step | None = None
        self._allowed_at = -1
        self._write: Callable[[bytes], None]  # set in connectionMade
        self._deadline = Deadline(reactor, self._timed_out)

    def abort(self) -> None:
        """Close at once."""
        self._ready = False
        if not self._closed and self.transport is not None:
            self.transport.abortConnection()

    # -- what Twisted calls --------------------------------------------------------------------------------------------

    def connectionMade(self) -> None:
        if hasattr(self.transport, "setTcpNoDelay"):
            self.transport.setTcpNoDelay(True)
        transport = self.transport
        self._write = transport.write_now if isinstance(transport, Outgoing) else transport.write

    def handshakeCompleted(self) -> None:
        if self._handshaking:
            self._handshaking = False
            self._settle(None)

    def dataReceived(self, data: bytes) -> None:
        self._engine.receive(data)
        self._pump()

    def pauseProducing(self) -> None:
        """The next hop does not read (IPushProducer)."""
        if self._writable is None:
            self._writable = Deferred()

    def resumeProducing(self) -> None:
        """The next hop reads again."""
        waiter, self._writable = self._writable, None
        if waiter is not None:
            waiter.callback(None)

    def stopProducing(self) -> None:
        """Nothing to do: connectionLost follows."""

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._closed = True
        self._ready = False
        self._deadline.stop()
        handshaking, self._handshaking = self._handshaking, False
        if handshaking:
            what = f"{type(reason.value).__name__} {reason.value}"[:300].strip()
            self._settle(Failure(ConnectFailed(local_reply(4, 7, 5, f"TLS handshake failed: {what}"))))
        self._end(local_reply(4, 4, 2, f"Lost the connection {self._where()}"))
        self.resumeProducing()

    # -- inside ------------------------------------------------------------------------------------------------------------

    def _wait(self) -> Deferred[Any]:
        """Send what the engine has to say, and wait for what comes of it. Fails with ConnectFailed."""
        waiter = self._waiter = Deferred()
        if self._closed:
            self._end(local_reply(4, 4, 2, "The connection is closed"))
        else:
            self._pump()
        return waiter

    def _pump(self) -> None:
        """Take events, write output, move the deadline."""
        if self._handshaking:
            return
        while (event := self._engine.next_event()) is not None:
            if isinstance(event, SendContent):
                self._begin_content()
            elif isinstance(event, Broken):
                self._end(event.reply)
                self.abort()
            else:
                # Goes on with whoever waits, at once: the next command may be said before this returns.
                self._settle(event)
        out = self._engine.output()
        if out:
            self._write(out)
        if not (self._streaming or self._handshaking):
            self._allow_next()  # those two have deadlines of their own

    def _settle(self, result: Any) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.callback(result)

    def _end(self, reply: Reply) -> None:
        """The connection is of no use any more; `reply` says why, unless something said so before."""
        self._ready = False
        self._settle(Failure(ConnectFailed(self._engine.lost(reply).reply)))

    def _where(self) -> str:
        return "while sending the content" if self._streaming else where(self._engine.expects)

    # -- deadlines -----------------------------------------------------------------------------------------------------

    def _allow_next(self) -> None:
        """The next reply's time begins when the one before it has come; octets of half a reply move nothing."""
        step = self._engine.expects
        if step is not self._allowed_for or self._engine.answers != self._allowed_at:
            self._allowed_for, self._allowed_at = step, self._engine.answers
            self._deadline.allow(self._settings.seconds_for(step) if step is not None else NEVER)

    def _timed_out(self) -> None:
        if self._handshaking:
            self._handshaking = False
            self._settle(Failure(ConnectFailed(local_reply(4, 7, 5, "TLS handshake timed out"))))
        self._end(local_reply(4, 4, 2, f"Timed out {self._where()}"))
        self.abort()
