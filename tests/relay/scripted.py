# SPDX-License-Identifier: MIT
"""A next hop on a real socket that follows a script, however rude: blocking, in threads, with Python's own ssl."""

from __future__ import annotations

import select
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any


class Gone(Exception):
    """The client closed the connection."""


class Peer:
    """One connection, from the server's side."""

    def __init__(self, connection: socket.socket, context: ssl.SSLContext | None) -> None:
        self._socket: Any = connection
        self._context = context
        self._buffer = b""
        self.client_address = connection.getpeername()[0]

    def say(self, octets: bytes) -> None:
        try:
            self._socket.sendall(octets)
        except OSError as problem:
            raise Gone from problem

    def line(self) -> bytes:
        """One line of the client, without its CRLF."""
        return self.until(b"\r\n")[:-2]

    def until(self, end: bytes) -> bytes:
        while end not in self._buffer:
            self._buffer += self.some()
        at = self._buffer.index(end) + len(end)
        out, self._buffer = self._buffer[:at], self._buffer[at:]
        return out

    def some(self) -> bytes:
        try:
            octets: bytes = self._socket.recv(65536)
        except OSError as problem:
            raise Gone from problem
        if not octets:
            raise Gone
        return octets

    def everything(self) -> bytes:
        """What the client says until it closes."""
        try:
            while True:
                self._buffer += self.some()
        except Gone:
            return self._buffer

    def wait_without_reading(self) -> None:
        """Until the client has given up."""
        poll = select.poll()
        poll.register(self._socket, 0)
        poll.poll(20_000)

    def start_tls(self) -> None:
        assert self._context is not None
        try:
            self._socket = self._context.wrap_socket(self._socket, server_side=True)
        except OSError as problem:
            raise Gone from problem

    def drop(self) -> None:
        self._socket.close()

    # -- the usual

    def greet(self, *extensions: bytes) -> None:
        self.say(b"220 mx.example.org ESMTP\r\n")
        self.introduce(*extensions)

    def introduce(self, *extensions: bytes) -> None:
        assert self.line().startswith(b"EHLO ")
        words = (b"mx.example.org", *extensions)
        self.say(b"".join(b"250%c%b\r\n" % (b" -"[at < len(words) - 1], word) for at, word in enumerate(words)))

    def take_or_leave(self) -> bytes:
        """`take`, unless the client says QUIT instead: then that is returned."""
        first = self.line()
        if first == b"QUIT":
            self.say(b"221 bye\r\n")
            return first
        self._buffer = first + b"\r\n" + self._buffer
        return self.take()

    def take(self, rcpt: bytes = b"250 2.1.5 ok\r\n", verdict: bytes = b"250 2.0.0 queued\r\n") -> bytes:
        """One whole transaction with one answer to all recipients; returns the content as sent (dots and all)."""
        assert self.line().startswith(b"MAIL FROM:")
        self.say(b"250 2.1.0 ok\r\n")
        while (line := self.line()) != b"DATA":
            assert line.startswith(b"RCPT TO:"), line
            self.say(rcpt)
        self.say(b"354 go\r\n")
        content = self.until(b"\r\n.\r\n")
        self.say(verdict)
        return content[:-3]


Script = Callable[[Peer], None]


class Server:
    """Listens on a loopback port; the n-th connection follows the n-th script, later ones the last."""

    def __init__(self, *scripts: Script, context: ssl.SSLContext | None = None, address: str = "127.0.0.1") -> None:
        self._scripts = scripts
        self._context = context
        self._listener = socket.create_server(
            (address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET
        )
        self.port: int = self._listener.getsockname()[1]
        self.problems: list[BaseException] = []
        self.peers: list[Peer] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Server:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        for thread in self._threads:
            thread.join(10)
        for problem in self.problems:
            raise problem

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.settimeout(20)
            script = self._scripts[min(len(self._threads), len(self._scripts) - 1)]
            peer = Peer(connection, self._context)
            self.peers.append(peer)
            thread = threading.Thread(target=self._follow, args=(script, peer), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _follow(self, script: Script, peer: Peer) -> None:
        try:
            script(peer)
        except Gone:
            return
        except BaseException as problem:
            self.problems.append(problem)
        finally:
            peer.drop()
