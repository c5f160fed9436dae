# SPDX-License-Identifier: MIT
"""The rows of memory: what one idle SMTP connection costs, after EHLO, or after STARTTLS and EHLO.

The figure is the growth of the proportional set size of all processes of the server from a few connections to many more,
divided by how many more. The few are there so that what a server needs once is not counted.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager

from attrs import frozen

from benchmarks.bench import Bar, Bench, Line
from benchmarks.load import RoundFailed
from benchmarks.peers import Polarismail, Postfix
from benchmarks.usage import pss_octets

_FIRST = 10
_SETTLE_SECONDS = 2.0
_LIMITS = "[connections]\ntotal = 20000\nper_address = 20000\n[transport]\nhandshakes_per_minute = 0\n"
Peer = Polarismail | Postfix


@frozen
class Connections:
    """`ours` and `theirs`: how many more connections each gets."""

    name: str
    work: str
    bar: Bar
    ours: int
    theirs: int
    tls: bool = False

    def run(self, bench: Bench) -> list[Line]:
        """Start both servers, measure, stop them. Raises RoundFailed, PeerFailed."""
        certificate = bench.certificate() if self.tls else None
        peers: list[tuple[Peer, int]] = [
            (
                Polarismail(
                    bench.place(self.name, "polarismail"),
                    port=bench.port,
                    workers=bench.workers,
                    certificate=certificate,
                    extra=_LIMITS,
                ),
                self.ours,
            ),
            (
                Postfix(bench.place(self.name, "postfix"), port=bench.port + 10, certificate=certificate),
                max(50, int(self.theirs * bench.scale)),
            ),
        ]
        figures: dict[str, float] = {}
        for peer, count in peers:
            peer.start()
            try:
                figures[peer.name] = self._measure(peer, count) / 1000
                bench.say(f"{self.name}: {peer.name:12} {figures[peer.name]:8.1f} KB for each of {count}")
            finally:
                peer.stop()
        details = {"connections": {peer.name: count for peer, count in peers}}
        return [Line(self.name, self.work, "KB", figures["polarismail"], figures["postfix"], self.bar, "", details)]

    def _measure(self, peer: Peer, count: int) -> float:
        with _idle(peer.port, _FIRST, self.tls):
            time.sleep(_SETTLE_SECONDS)
            before = pss_octets(peer.roots)
            with _idle(peer.port, count, self.tls) as connections:
                time.sleep(_SETTLE_SECONDS)
                after = pss_octets(peer.roots)
                for connection in connections:  # each is still there, or it was not measured
                    _ask(connection, b"NOOP\r\n")
        return (after - before) / count


@contextmanager
def _idle(port: int, count: int, tls: bool) -> Iterator[list[socket.socket]]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    opened: list[socket.socket] = []
    try:
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", port), 30)
            opened.append(connection)
            _ask(connection, b"")
            _ask(connection, b"EHLO client.test\r\n")
            if tls:
                _ask(connection, b"STARTTLS\r\n")
                opened[-1] = connection = context.wrap_socket(connection)
                _ask(connection, b"EHLO client.test\r\n")
        yield opened
    except OSError as problem:
        raise RoundFailed(f"connection {len(opened)} of {count} to port {port}: {problem}") from problem
    finally:
        for connection in opened:
            connection.close()


def _ask(connection: socket.socket, command: bytes) -> None:
    if command:
        connection.sendall(command)
    octets = b""
    while not (octets.endswith(b"\n") and octets.rstrip(b"\r\n").rpartition(b"\n")[2][3:4] == b" "):
        piece = connection.recv(4096)
        if not piece:
            raise OSError("closed")
        octets += piece
    if octets[:1] != b"2":
        raise OSError(f"{command!r} was answered with {octets!r}")
