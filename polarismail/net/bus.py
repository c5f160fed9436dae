# SPDX-License-Identifier: MIT
"""Frames between the workers of one server, over UNIX sockets that only the server's user can open.

Each worker listens under its own name and connects to every other; a link carries frames one way. What a frame means is
the business of who has subscribed to its kind.

Guarantees
    Frames of one sender arrive whole and in order, or not at all: with the end of a link what was on it is lost, and
    `when_broken` says so. A frame has at most 16 MB; what waits for a worker that does not read is bounded where senders ask
    `is_open` first; answers are waited for so long and no longer.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from typing import Any

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from polarismail.net import unix_sockets

MAX_FRAME_OCTETS = 16 * 1024 * 1024
_HIGH_WATER_OCTETS = 8 * 1024 * 1024
_CONNECT_AGAIN_SECONDS = 0.2
_HELLO, _ASK, _ANSWER = "hello", "ask", "answer"

Subscriber = Callable[[int, bytes], Any]
"""Is called with the sender's number and the body. What it returns (or its Deferred fires with) answers an `ask`."""


def render_frame(kind: str, body: bytes) -> bytes:
    """`length kind-length kind body`: 4 octets for all that follows, 1 for the kind."""
    name = kind.encode("ascii")
    return (1 + len(name) + len(body)).to_bytes(4, "big") + bytes((len(name),)) + name + body


class FrameReader:
    """Frames out of a stream, however it is sliced."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def receive(self, octets: bytes) -> list[tuple[str, bytes]]:
        """Every frame that is complete now. Raises ValueError for a stream that is none of ours."""
        buffer = self._buffer
        buffer += octets
        found, at = [], 0
        while len(buffer) - at >= 4:
            length = int.from_bytes(buffer[at : at + 4], "big")
            if not 1 <= length <= MAX_FRAME_OCTETS or (len(buffer) - at > 4 and buffer[at + 4] >= length):
                raise ValueError("no frame of the bus")
            end = at + 4 + length
            if len(buffer) < end:
                break
            body = at + 5 + buffer[at + 4]
            found.append((buffer[at + 5 : body].decode("ascii"), bytes(buffer[body:end])))
            at = end
        del buffer[:at]
        return found


class _Incoming(Protocol):
    """The reading end of a link."""

    factory: _Incomings

    def __init__(self) -> None:
        self._frames = FrameReader()
        self._from = -1

    def connectionMade(self) -> None:
        self.factory.open.add(self)

    def dataReceived(self, data: bytes) -> None:
        try:
            for kind, body in self._frames.receive(data):
                if kind == _HELLO:
                    self._from = int(body)
                elif self._from >= 0:
                    self.factory.bus._received(self._from, kind, body)
        except ValueError as problem:
            Bus.log.error(
                "the bus to worker {worker} is out of step: {problem}", worker=self._from, problem=str(problem)
            )
            self.transport.abortConnection()  # type: ignore[union-attr]

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.factory.open.discard(self)
        if self._from >= 0:
            self.factory.bus._broken(self._from)


class _Incomings(Factory):
    protocol = _Incoming  # type: ignore[assignment]
    noisy = False

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.open: set[_Incoming] = set()


@implementer(IPushProducer)
class _Outgoing(Protocol):
    """The writing end of a link: as a producer it hears when the other side does not read."""

    def __init__(self, number: int, bus: Bus) -> None:
        self.number, self._bus = number, bus
        self.flows = True
        self.lost = False
        self._held: list[bytes] = []
        self.held_octets = 0

    def connectionMade(self) -> None:
        transport: Any = self.transport
        transport.registerProducer(self, True)

    def put(self, frame: bytes) -> None:
        """Send it, behind what waits."""
        if self.flows:
            self.transport.write(frame)  # type: ignore[union-attr]
        else:
            self._held.append(frame)
            self.held_octets += len(frame)

    def pauseProducing(self) -> None:
        self.flows = False

    def resumeProducing(self) -> None:
        self.flows = True
        held, self._held, self.held_octets = self._held, [], 0
        if held:
            self.transport.write(b"".join(held))  # type: ignore[union-attr]

    def stopProducing(self) -> None:
        self.flows = False

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.lost = True
        self._bus._link_lost(self)


class _OutgoingFactory(Factory):
    noisy = False

    def __init__(self, number: int, bus: Bus) -> None:
        self._number, self._bus = number, bus

    def buildProtocol(self, addr: Any) -> Protocol:
        return _Outgoing(self._number, self._bus)


class Bus:
    """One worker's place on the bus. `directory` is where the sockets are; `number` is ours."""

    log = Logger()

    def __init__(self, reactor: Any, directory: str, number: int) -> None:
        self._reactor, self._directory, self.number = reactor, directory, number
        self._names: dict[int, str] = {}
        self._links: dict[int, _Outgoing] = {}
        self._subscribers: dict[str, Subscriber] = {}
        self._questions: dict[int, tuple[int, Deferred[bytes]]] = {}  # whom was asked, and who wants to know
        self._ids = itertools.count(1)
        self._acceptor: unix_sockets.UnixAcceptor | None = None
        self.name = self._own_path = ""
        self._again: Any = None
        self._incomings = _Incomings(self)
        self._when_broken: list[Callable[[int], None]] = []
        self._when_linked: list[Callable[[int], None]] = []

    # -- life

    def listen(self, name: str) -> None:
        """Be reachable under this name, which nobody else has or had. Raises OSError."""
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        self.name, self._own_path = name, os.path.join(self._directory, name)
        listening = unix_sockets.listen(self._own_path, 0o600)
        self._acceptor = unix_sockets.UnixAcceptor(self._reactor, listening, self._incomings)
        self._acceptor.start()

    def stop(self) -> None:
        """Leave. Idempotent."""
        if self._acceptor is not None:
            self._acceptor.stop()
            self._acceptor = None
            try:
                os.unlink(self._own_path)
            except FileNotFoundError:
                pass  # swept by somebody who took us for dead
        if self._again is not None:
            self._again.cancel()
            self._again = None
        self._names.clear()
        for protocol in (*self._links.values(), *self._incomings.open):
            protocol.transport.loseConnection()  # type: ignore[union-attr]

    def set_members(self, names: Mapping[int, str]) -> None:
        """Who there is now, by number: links to the others are made, those to who has gone are cut."""
        self._names = {number: name for number, name in names.items() if number != self.number}
        for number, link in list(self._links.items()):
            if number not in self._names:
                link.transport.abortConnection()  # type: ignore[union-attr]
        self._connect()

    def subscribe(self, kind: str, subscriber: Subscriber) -> None:
        """Who hears of frames of this kind."""
        self._subscribers[kind] = subscriber

    def when_broken(self, callback: Callable[[int], None]) -> None:
        """Call this with the number of a worker whose link to us has ended: what it had sent may be lost."""
        self._when_broken.append(callback)

    def when_linked(self, callback: Callable[[int], None]) -> None:
        """Call this with the number of a worker that can be sent to from now on."""
        self._when_linked.append(callback)

    # -- sending

    @property
    def others(self) -> list[int]:
        """Every other member, linked or not."""
        return list(self._names)

    def send(self, number: int, kind: str, body: bytes) -> bool:
        """Send a frame; False where the worker is not linked. Ask `is_open` before what need not be said now."""
        link = self._links.get(number)
        if link is None:
            return False
        link.put(render_frame(kind, body))
        return True

    def is_open(self, number: int) -> bool:
        """Whether the worker is linked, and reads what it is sent."""
        link = self._links.get(number)
        return link is not None and link.held_octets <= _HIGH_WATER_OCTETS

    def broadcast(self, kind: str, body: bytes) -> None:
        """To every other worker that is linked."""
        for number in list(self._links):
            self.send(number, kind, body)

    def ask(self, number: int, kind: str, body: bytes, seconds: float) -> Deferred[bytes]:
        """Fires with the answer; fails with ConnectionError or TimeoutError (of Twisted's `defer`)."""
        question = next(self._ids)
        answered: Deferred[bytes] = Deferred()
        if not self.send(number, _ASK, b"%d %s " % (question, kind.encode("ascii")) + body):
            answered.errback(ConnectionError(f"worker {number} cannot be reached"))
            return answered
        self._questions[question] = number, answered
        answered.addTimeout(seconds, self._reactor)
        answered.addBoth(self._forget_question, question)
        return answered

    def _forget_question(self, result: Any, question: int) -> Any:
        self._questions.pop(question, None)
        return result

    # -- inside

    def _connect(self) -> None:
        self._again = None
        missing = False
        for number, name in self._names.items():
            if number in self._links:
                continue
            try:
                connected = unix_sockets.connect(os.path.join(self._directory, name))
            except OSError:
                missing = True  # it has just died, and the supervisor will say so; or its line is full
                continue
            link = unix_sockets.adopt(self._reactor, connected, _OutgoingFactory(number, self))
            self._links[number] = link
            link.put(render_frame(_HELLO, b"%d" % self.number))
            for callback in self._when_linked:
                callback(number)
        if missing:
            self._again = self._reactor.callLater(_CONNECT_AGAIN_SECONDS, self._connect)

    def _link_lost(self, link: _Outgoing) -> None:
        if self._links.get(link.number) is link:
            del self._links[link.number]
        for answered in [each for number, each in self._questions.values() if number == link.number]:
            answered.errback(ConnectionError(f"worker {link.number} has gone"))
        if link.number in self._names and self._again is None:
            self._again = self._reactor.callLater(_CONNECT_AGAIN_SECONDS, self._connect)

    def _broken(self, number: int) -> None:
        for callback in self._when_broken:
            callback(number)

    def _received(self, sender: int, kind: str, body: bytes) -> None:
        if kind == _ANSWER:
            question, _, answer = body.partition(b" ")
            waiting = self._questions.get(int(question))
            if waiting is not None:
                waiting[1].callback(answer)
            return
        if kind != _ASK:
            self._tell(sender, kind, body)
            return
        question, name, inner = body.split(b" ", 2)
        done = maybeDeferred(self._tell, sender, name.decode("ascii"), inner)
        done.addCallback(lambda answer: self.send(sender, _ANSWER, question + b" " + (answer or b"")))
        done.addErrback(lambda failure: self.log.failure("a question of worker {worker}", failure, worker=sender))

    def _tell(self, sender: int, kind: str, body: bytes) -> Any:
        subscriber = self._subscribers.get(kind)
        if subscriber is None:
            self.log.error("nobody here knows what {kind} of worker {worker} is", kind=kind, worker=sender)
            return None
        try:
            return subscriber(sender, body)
        except Exception:
            self.log.failure("{kind} of worker {worker}", kind=kind, worker=sender)
            return None
