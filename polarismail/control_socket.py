# SPDX-License-Identifier: MIT
"""The control socket: JSON lines over a UNIX socket that only the server's user (or its group) can open, all of it bounded.

One request a line, `{"operation": "queue_show", "arguments": {"queue_id": "..."}}`; one answer a line, `{"result": ...}` or
`{"error": text, "kind": "refused" | "unavailable" | "failed"}`. Requests of one connection are answered in order, one at
a time. What may be asked is `control.OPERATIONS`, and nothing else: a name from the socket never reaches getattr.

Guarantees: a request is at most 256 KB, an answer at most 16 MB, connections at most 32, each idle for at most 300 s; the
socket has mode 0600 (0660 with `control.group_access`) from the moment that it exists.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from typing import Any

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Factory, connectionDone
from twisted.logger import Logger
from twisted.protocols.basic import LineOnlyReceiver
from twisted.protocols.policies import TimeoutMixin
from twisted.python.failure import Failure
from zope.interface import implementer

from polarismail.config import ControlSettings
from polarismail.control import Control, do_operation
from polarismail.net import unix_sockets
from polarismail.net.unix_sockets import UnixAcceptor
from polarismail.values.errors import ControlError, Unavailable

MAX_REQUEST_OCTETS = 256 * 1024
MAX_ANSWER_OCTETS = 16 * 1024 * 1024
MAX_CONNECTIONS = 32
IDLE_SECONDS = 300.0


class NoServer(Exception):
    """Nobody answers at the socket: no server runs here."""


@implementer(IHalfCloseableProtocol)
class ControlProtocol(LineOnlyReceiver, TimeoutMixin):
    """One operator's connection."""

    delimiter = b"\n"
    MAX_LENGTH = MAX_REQUEST_OCTETS
    log = Logger()
    factory: ControlFactory

    def __init__(self) -> None:
        self._waiting: list[bytes] = []
        self._busy = False
        self._ended = False  # the client asks nothing more
        self._gone = False

    def connectionMade(self) -> None:
        """Refuse it when there are too many."""
        self.factory.open.add(self)
        if len(self.factory.open) > MAX_CONNECTIONS:
            self._answer({"error": "too many connections to the control socket", "kind": "unavailable"})
            self.close()
            return
        self.callLater = self.factory.reactor.callLater  # type: ignore[method-assign]  # TimeoutMixin's way in
        self.setTimeout(IDLE_SECONDS)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Forget it; an operation that runs goes on to its end."""
        self._gone = True
        self.setTimeout(None)
        self.factory.open.discard(self)

    def readConnectionLost(self) -> None:
        """The client has asked everything; it still reads the answers (`nc -U` does so)."""
        self._ended = True
        if not self._busy:
            self.close()

    def writeConnectionLost(self) -> None:
        """The client has gone; what runs goes on to its end."""
        self.close()

    def timeoutConnection(self) -> None:
        """Idle for too long; while an operation runs the client is not idle."""
        if self._busy:
            self.setTimeout(IDLE_SECONDS)
        else:
            self.close()

    def lineReceived(self, line: bytes) -> None:
        """Queue one request; reading stops while one is being answered."""
        self._waiting.append(line)
        if not self._busy:
            self._busy = True
            self._pause()
            self._next()

    def lineLengthExceeded(self, line: bytes) -> None:
        """The stream cannot be read any further."""
        self._answer({"error": f"a request has at most {MAX_REQUEST_OCTETS} octets", "kind": "refused"})
        self.close()

    def _next(self) -> None:
        # A loop over the reactor, so that many requests in one segment are no recursion.
        line = self._waiting.pop(0)
        self.resetTimeout()
        done: Deferred[Any] = maybeDeferred(self._do, line)
        done.addCallbacks(lambda result: {"result": result}, self._failed)
        done.addCallback(self._answer).addErrback(self._unexpected)
        done.addCallback(lambda _: self._go_on())

    def _go_on(self) -> None:
        if self._gone:
            return
        if self._waiting:
            self.factory.reactor.callLater(0, self._next)
        else:
            self._busy = False
            self._resume()
            if self._ended:
                self.close()

    def _do(self, line: bytes) -> Any:
        try:
            request = json.loads(line)
            name, arguments = request["operation"], request.get("arguments", {})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as problem:
            raise ControlError('a request is {"operation": name, "arguments": {...}}') from problem
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise ControlError('a request is {"operation": name, "arguments": {...}}')
        return Deferred.fromCoroutine(do_operation(self.factory.control, name, arguments))

    def _failed(self, failure: Failure) -> dict[str, Any]:
        if failure.check(ControlError) is not None:
            return {"error": str(failure.value), "kind": "refused"}
        if failure.check(Unavailable) is not None:
            return {"error": str(failure.value), "kind": "unavailable"}
        self.log.failure("an operation of the control socket failed", failure)
        return {"error": "unexpected failure, see the log", "kind": "failed"}

    def _unexpected(self, failure: Failure) -> None:
        self.log.failure("an answer of the control socket could not be sent", failure)
        self.close()

    def _answer(self, answer: dict[str, Any]) -> None:
        octets = json.dumps(answer).encode("ascii")
        if len(octets) > MAX_ANSWER_OCTETS:
            octets = b'{"error": "the answer is too long: ask for less at a time", "kind": "refused"}'
        if not self._gone:
            self.sendLine(octets)

    def close(self) -> None:
        """End the connection when what was said has gone out."""
        if self.transport is not None:
            self.transport.loseConnection()

    def _pause(self) -> None:
        if self.transport is not None:
            self.transport.pauseProducing()  # type: ignore[attr-defined]

    def _resume(self) -> None:
        if self.transport is not None:
            self.transport.resumeProducing()  # type: ignore[attr-defined]


class ControlFactory(Factory):
    """Connections to one Control."""

    protocol = ControlProtocol  # type: ignore[assignment]
    noisy = False

    def __init__(self, control: Control, reactor: Any) -> None:
        self.control, self.reactor = control, reactor
        self.open: set[ControlProtocol] = set()


def listen(path: str, settings: ControlSettings) -> socket.socket:
    """The listening socket. A file that a killed server left behind is replaced; a live server's is not.

    Raises OSError, EADDRINUSE when another server answers there.
    """
    _remove_stale(path)
    return unix_sockets.listen(path, 0o660 if settings.group_access else 0o600)


def _remove_stale(path: str) -> None:
    try:
        ControlClient(path, timeout_seconds=2.0).close()
    except NoServer:
        remove(path)
    else:
        raise OSError(errno.EADDRINUSE, "another server answers at the control socket", path)


def remove(path: str) -> None:
    """Remove the socket's file. Idempotent."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass  # somebody cleaned up before us, which is as good


class ControlServer:
    """The listening side: on a socket of its own, or on one that a supervisor has made and shares with others."""

    def __init__(
        self,
        control: Control,
        path: str,
        reactor: Any,
        settings: ControlSettings,
        inherited: socket.socket | None = None,
    ) -> None:
        self._reactor, self._settings, self.path = reactor, settings, path
        self._inherited = inherited
        self.factory = ControlFactory(control, reactor)
        self._acceptor: UnixAcceptor | None = None

    def start(self) -> None:
        """Listen. Raises OSError, EADDRINUSE when another server answers there."""
        listening = self._inherited or listen(self.path, self._settings)
        self._acceptor = UnixAcceptor(self._reactor, listening, self.factory)
        self._acceptor.start()

    def stop(self) -> None:
        """Stop listening, remove the socket's file where it is ours, drop the connections. Idempotent."""
        acceptor, self._acceptor = self._acceptor, None
        if acceptor is None:
            return
        acceptor.stop()
        if self._inherited is None:
            remove(self.path)
        for protocol in list(self.factory.open):
            protocol.close()


class ControlClient:
    """The asking side, for commands: blocking. Raises NoServer when no server runs, Unavailable when it does not answer,
    PermissionError when we may not ask."""

    def __init__(self, path: str, *, timeout_seconds: float = 120.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_seconds)
        try:
            with unix_sockets.short_name(path) as name:
                self._connect(name, time.monotonic() + timeout_seconds)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as problem:
            self._socket.close()
            raise NoServer(path) from problem
        except PermissionError:
            self._socket.close()
            raise
        except OSError as problem:
            self._socket.close()
            raise Unavailable(f"the server does not answer at its control socket: {problem}") from problem
        self._lines = self._socket.makefile("rb")

    def _connect(self, name: str, until: float) -> None:
        while True:
            try:
                self._socket.connect(name)
                return
            except BlockingIOError:
                # More clients wait than the kernel keeps in line; it does not wait for a place by itself.
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)

    def call(self, operation: str, **arguments: Any) -> Any:
        """Ask for one operation. Raises ControlError as the server did, and Unavailable, also when it does not answer."""
        request = json.dumps({"operation": operation, "arguments": arguments}).encode("ascii") + b"\n"
        if len(request) > MAX_REQUEST_OCTETS:
            raise ControlError("the request is too long: ask for less at a time")
        try:
            try:
                self._socket.sendall(request)
            except BrokenPipeError:
                pass  # a server that refuses us may have said so, and closed, before we asked
            line = self._lines.readline(MAX_ANSWER_OCTETS + 64)
        except OSError as problem:
            raise Unavailable(f"the server does not answer at its control socket: {problem}") from problem
        if not line.endswith(b"\n"):
            raise Unavailable("the server closed the control socket before it answered")
        answer = json.loads(line)
        if "result" in answer:
            return answer["result"]
        raise (ControlError if answer.get("kind") == "refused" else Unavailable)(answer.get("error", "no answer"))

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._lines.close()
        self._socket.close()
