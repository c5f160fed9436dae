# SPDX-License-Identifier: MIT
"""The one IProtocol of the server side: joins an engine, a session and a socket, one command at a time.

Guarantees: a reply never overtakes another, because the next event is pulled from the engine only when the session is done
with the last; input is read only as fast as it is used (at most `max_buffered_octets` wait); output is written in one piece
for a burst of commands and waits when the client does not read; every wait for the client has an absolute deadline, so
that an octet each ten seconds buys nothing (HOSTILE F12, F13).

Never: lets an exception of a session reach the reactor. The session is asked for its last words, and the rest goes on.
Never: says anything once it has closed.
"""

from __future__ import annotations

from collections.abc import Awaitable
from time import monotonic
from typing import Any

from twisted.internet.address import UNIXAddress
from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.interfaces import IHalfCloseableProtocol, IHandshakeListener, IPushProducer, ISSLTransport
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.tcp import Connection as TcpConnection
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from polarismail.net.contracts import DEFAULT_SETTINGS, Engine, Session, TransportSettings
from polarismail.net.stream import Stream
from polarismail.values.network import LOCAL_CLIENT

_EVENTS_A_TURN = 200
_LINGERS = 1e9


class _Nobody:
    """The session and the engine of a connection that is gone."""

    buffered = 0

    def __getattr__(self, name: str) -> Any:
        return _nothing


def _nothing(*_: Any) -> None:
    return None


_NOBODY: Any = _Nobody()


@implementer(IHalfCloseableProtocol, IHandshakeListener, IPushProducer)
class Connection(Protocol):
    """One client. `peer` and `host` are twisted addresses, once connected."""

    log = Logger()
    transport: Any
    client_address = ""
    """Its IP address, or "local" for who came over a UNIX socket."""

    def __init__(self, reactor: Any, engine: Engine, session: Session, settings: TransportSettings = DEFAULT_SETTINGS):
        self._reactor, self.engine, self._session, self._settings = reactor, engine, session, settings
        self._out: list[bytes] = []
        self._busy = True  # until the session has greeted
        self._reading = True
        self._writable: Deferred[None] | None = None  # set while the client does not read
        self._closing = False
        self._lingers = False
        self._ended = False
        self._read_all = False  # the client has closed its side
        self.closed = False
        self._handshaking = False
        self._deadline = 0.0
        self._timer: Any = None
        self._timer_due = 0.0
        self._last_words = b""
        self._direct = False
        self._lingered = 0

    # -- what sessions use -------------------------------------------------------------------------------------------

    def send(self, octets: bytes) -> None:
        """Queue octets; they are written together, before anything is waited for."""
        self._out.append(octets)

    def close(self, lingers: bool = False) -> None:
        """Write what is queued, then close; nothing more is performed.

        `lingers`: the client may still be sending, and what nobody reads would make the kernel reset the connection before
        our last words were read. So only our side is closed, and what comes is thrown away until the client closes too.
        """
        self._closing, self._lingers = True, lingers

    def flush(self) -> None:
        """Write what is queued now."""
        if self._out and not self.closed:
            out, self._out = self._out, []
            self._write(out[0] if len(out) == 1 else b"".join(out))

    def _write(self, octets: bytes) -> None:
        """Hand octets to the kernel now where nothing waits before them, else to the transport.

        A reply fits the socket's buffer nearly always; writing it here saves two epoll_ctl calls and a turn of the reactor for
        each reply, a quarter of the CPU that a message costs. What the kernel does not take goes the usual way.
        """
        transport = self.transport
        if self._direct and not (
            transport.TLS or transport.dataBuffer or transport._tempDataLen or transport.disconnecting
        ):
            taken = transport.writeSomeData(octets)
            if taken == len(octets):
                return
            if isinstance(taken, int) and taken > 0:
                octets = octets[taken:]
        transport.write(octets)

    def when_writable(self) -> Deferred[None] | None:
        """None when the client keeps up; else a Deferred for when it does again, or is gone."""
        if self._writable is None or self.closed:
            return None
        waiter: Deferred[None] = Deferred()
        self._writable.addBoth(_pass_on, waiter)
        return waiter

    def may_start_tls(self) -> bool:
        """Whether this client has not begun too many handshakes."""
        return True

    def start_tls(self, options: Any) -> None:
        """Begin TLS as the server. Raises what the TLS library raises; the reply must have been sent."""
        self.flush()
        self._handshaking = True
        self.transport.startTLS(options)
        self._wait_for_client(self._settings.handshake_seconds)

    def retire(self, last_words: bytes) -> None:
        """We are going down: say so and close, unless a command is being performed or content received; then after the
        reply to it."""
        if not self._closing:
            self._last_words = last_words
            if not self._busy:
                self._settle()

    def change_settings(self, session_settings: Any, settings: TransportSettings) -> None:
        """Other time-outs, also for the wait that is under way."""
        if self.closed:
            return
        self._settings = settings
        self._session.change_settings(session_settings)
        if self._closing or self._handshaking or self._writable is not None:
            seconds = settings.write_seconds
            if self._closing:
                seconds = settings.linger_seconds
            elif self._handshaking:
                seconds = settings.handshake_seconds
            self._wait_for_client(min(self._deadline - monotonic(), seconds))
        elif not self._busy:
            self._wait_for_client(self._session.waiting())

    @property
    def behind(self) -> float:
        """Seconds that the client has kept us waiting, for who must choose whom to put out; negative: it must stay.
        Who only lingers goes before all others, and who is served goes last."""
        if self._closing:
            if self._lingers or not self._ended:
                return _LINGERS
            # It said QUIT, perhaps in one group with a message: a reset may overtake the 250, and it would send it again.
            return self._settings.linger_seconds - max(0.0, self._deadline - monotonic())
        if self._handshaking or self._writable is not None:
            if not self._handshaking and (self._busy or self._session.stays()):
                return (
                    -1.0
                )  # what it was promised may be under way: a message on its way to the disk, or out of a maildrop
            waits = self._settings.handshake_seconds if self._handshaking else self._settings.write_seconds
            return waits - max(0.0, self._deadline - monotonic())
        return -1.0 if self._busy else self._session.behind()

    @property
    def stays(self) -> bool:
        """Whether it keeps its place and the usual time, whoever needs them."""
        return bool(self._session.stays())

    def put_out(self, last_words: bytes) -> None:
        """Cut now, with last words where they can be read at once: somebody else needs the place."""
        transport = self.transport
        if not (self._closing or self._handshaking or self._writable is not None):
            self.send(last_words)
            self.flush()
        self._closing = self._ended = True
        if type(transport) is Stream and not transport.TLS:
            transport.unregisterProducer()
            transport.finish()
        if not self.closed:
            transport.abortConnection()

    def count_for(self, address: str) -> bool:
        """A front end speaks for a client with this address: whether that may have one connection more."""
        return True

    @property
    def host(self) -> Any:
        """Our end's address."""
        return self.transport.getHost()

    # -- what Twisted calls ------------------------------------------------------------------------------------------

    def connectionMade(self) -> None:
        transport = self.transport
        peer = self.peer = transport.getPeer()
        self.client_address = LOCAL_CLIENT if type(peer) is UNIXAddress else getattr(peer, "host", None) or ""
        self._direct = isinstance(transport, TcpConnection)
        if type(transport) is not Stream and hasattr(transport, "setTcpNoDelay"):
            transport.setTcpNoDelay(True)  # a Stream has it from its listening socket
        transport.registerProducer(self, True)
        self._handshaking = not self._direct and ISSLTransport.providedBy(transport)
        if self._handshaking:
            self._wait_for_client(self._settings.handshake_seconds)
        self._perform(self._session.connected, self)

    def handshakeCompleted(self) -> None:
        self._handshaking = False
        try:
            self._session.secured()
        except Exception as problem:
            self._give_up(problem)
            if not self._busy:
                self._settle()
        if not self._closing:
            paused = self._writable is not None
            self._wait_for_client(self._settings.write_seconds if paused else self._session.waiting())

    def dataReceived(self, data: bytes) -> None:
        if self._closing:
            self._lingered += len(data)
            if self._lingered > self._settings.linger_octets:
                self.transport.abortConnection()
            return
        self.engine.receive(data)
        if not self._busy and self._writable is None:
            self._pump()
        elif self._reading and self.engine.buffered > self._settings.max_buffered_octets:
            self._reading = False
            self.transport.pauseProducing()

    def readConnectionLost(self) -> None:
        """The client sends no more, but may read on, as Exim does behind a message and a QUIT in one group: what it has sent
        is performed and answered (IHalfCloseableProtocol). Whether it has gone altogether, a write will show."""
        self._read_all = True
        if self._closing:
            self.transport.loseConnection()
        elif not self._busy and self._writable is None:
            self._closing = True
            self._end()

    def writeConnectionLost(self) -> None:
        """Our side is closed, and the client's is awaited: see `_end` (IHalfCloseableProtocol)."""

    def pauseProducing(self) -> None:
        """The client does not read: perform nothing more until it does (IPushProducer)."""
        if self._writable is None:
            self._writable = Deferred()
            if not (self._handshaking or self._closing):  # their deadlines are closer
                self._wait_for_client(self._settings.write_seconds)

    def resumeProducing(self) -> None:
        """The client reads again."""
        waiter, self._writable = self._writable, None
        if waiter is not None:
            waiter.callback(None)
        if not self._busy and not self.closed:
            self._resume()

    def stopProducing(self) -> None:
        """Nothing to do: connectionLost follows."""

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.closed = self._closing = True
        self._out.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiter, self._writable = self._writable, None
        if waiter is not None:
            waiter.callback(None)
        try:
            self._session.lost()
        except Exception:
            self.log.failure("what a lost connection leaves could not be put away")
        if not self._busy:
            self._let_go()

    def _let_go(self) -> None:
        """Connection, session and engine know one another: thousands of them, and what TLS keeps for each, would wait for the
        garbage collector. From here on nothing asks them any more."""
        self._session = self.engine = _NOBODY

    # -- one command at a time ---------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Pull and perform events until octets run out, something must be waited for, or others deserve a turn."""
        engine, session = self.engine, self._session
        self._busy = True
        for _ in range(_EVENTS_A_TURN):
            if self._closing or self._writable is not None or (self._last_words and session.may_end()):
                break
            try:
                event = engine.next_event()
                if event is None:
                    break
                awaited = session.do(event)
            except Exception as problem:
                self._give_up(problem)
                awaited = None
            if awaited is not None and not self._await(awaited):
                return
        else:
            self.flush()  # 10,000 pipelined commands are not one turn of the reactor
            self._reactor.callLater(0, self._resume)
            return
        self._busy = False
        self._settle()

    def _await(self, awaited: Awaitable[None]) -> bool:
        """True when it was done at once; else the pump goes on when it is."""
        d: Deferred[Any] = awaited if isinstance(awaited, Deferred) else ensureDeferred(awaited)  # type: ignore[arg-type]
        if d.called and not d.paused and not isinstance(d.result, Deferred):
            d.addErrback(self._failed)
            return True
        self.flush()
        d.addCallbacks(self._resume, self._fail_and_resume)
        return False

    def _perform(self, function: Any, *args: Any) -> None:
        try:
            awaited = function(*args)
        except Exception as problem:
            self._give_up(problem)
            awaited = None
        if awaited is None or self._await(awaited):
            self._pump()

    def _resume(self, _: object = None) -> None:
        self._pump()

    def _fail_and_resume(self, failure: Failure) -> None:
        self._failed(failure)
        self._pump()

    def _settle(self) -> None:
        """Nothing more to perform for now: write, then close or wait for the client."""
        if self.closed:
            self._let_go()
            return
        if self._last_words and not self._closing and self._session.may_end():
            self.send(self._last_words)
            self.close()
        if self._out:
            self.flush()
        if self._closing:
            self._end()
        elif self._writable is None:
            if self._read_all:
                self._closing = True
                self._end()
                return
            if not self._reading:
                self._read_on()
            if not self._handshaking:
                self._wait_for_client(self._session.waiting())

    def _read_on(self) -> None:
        # Only once what had come is used up, or a client that sends faster than we perform would fill the memory.
        if not self._reading:
            self._reading = True
            self.transport.resumeProducing()

    def _end(self) -> None:
        """Everything is written, or waits in the transport: close, and cut what takes longer than `linger_seconds`."""
        if self._ended:
            return
        self._ended = True
        transport = self.transport
        self._read_on()  # the client's side of a TLS goodbye
        transport.unregisterProducer()
        # Who has closed its side already sends nothing any more that could be waited for.
        if self._lingers and self._direct and not (self._read_all or transport.TLS):
            transport.loseWriteConnection()
        elif type(transport) is Stream:
            transport.finish()
        else:
            transport.loseConnection()
        self._wait_for_client(self._settings.linger_seconds)

    def _failed(self, failure: Failure) -> None:
        assert failure.value is not None
        self._give_up(failure.value)

    def _give_up(self, problem: BaseException) -> None:
        """A defect of ours: the client is told to try again, and loses the connection, whose state nobody knows now."""
        try:
            self.send(self._session.failed(problem))
        except Exception:
            self.log.failure("a session has no last words", Failure(problem))
        self.close(lingers=True)

    # -- deadlines ---------------------------------------------------------------------------------------------------

    def _wait_for_client(self, seconds: float) -> None:
        deadline = self._deadline = monotonic() + seconds
        # One timer that looks again when it fires, instead of one re-armed for each command.
        if self._timer is None or self._timer_due > deadline + 1:
            self._arm()

    def _arm(self) -> None:
        if self.closed:
            return
        seconds = max(0.01, self._deadline - monotonic())
        self._timer_due = self._deadline
        if self._timer is not None:
            self._timer.cancel()  # Twisted's reset() looks through the timers of all connections
        self._timer = self._reactor.callLater(seconds, self._look)

    def _look(self) -> None:
        self._timer = None
        if self.closed:
            return
        if self._busy and self._writable is None and not self._handshaking:
            self._deadline = monotonic() + 1.0  # we are the slow side: the client's clock stands still
            self._arm()
        elif monotonic() < self._deadline:
            self._arm()
        elif self._closing or self._writable is not None or self._handshaking:
            self.transport.abortConnection()
        else:
            self.send(self._session.timed_out())
            self.close(lingers=True)
            self._settle()


def _pass_on(result: Any, waiter: Deferred[None]) -> Any:
    waiter.callback(None)
    return result
