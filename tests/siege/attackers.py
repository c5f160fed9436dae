# SPDX-License-Identifier: MIT
"""The attackers: thousands of hostile clients in one process on raw epoll, each kind from addresses of its own.

`python -m tests.siege.attackers KIND=COUNT... --mx PORT --submission PORT --submissions PORT --seconds S`. Kinds:

slow         clients that wait for the greeting and then send an octet each ten seconds, on all three ports; one that is
             sent away comes back when its next octet would be due, so that there are always so many
connections  new connections a second, each from an address that no other had for an hour: it waits for the greeting, says
             EHLO and QUIT, and leaves; after eight seconds in any case
harvest      sessions that try a dictionary of recipients, ten at a time, eight to an address; they come back at once
lines        sessions that send lines of 10 MB as fast as they are read, half of them as commands, half as content

A line of JSON a second says what was done so far. Addresses are below 127.16.0.0/12 (slow), 127.64.0.0/10 (connections),
127.32.0.0/16 (harvest), 127.33.0.0/16 (lines).
"""

from __future__ import annotations

import argparse
import errno
import heapq
import json
import os
import select
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import count

TARGET = "127.0.0.1"
OCTET_SECONDS = 10.0
PATIENCE_SECONDS = 8.0
AGAIN_SECONDS = 0.1
LINE_OCTETS = 10 * 1024 * 1024
SLOW_NETWORKS = 1250  # four slow clients in each
_DRIBBLE = b"EHLO dribble.example\r\nMAIL FROM:<slow@dribble.example>\r\n"
_PIECE = b"x" * 65536
_IP_BIND_ADDRESS_NO_PORT = 24


class Loop:
    """One epoll, its clients by descriptor, and what is due when."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.clients: dict[int, Client] = {}
        self.done: Counter[str] = Counter()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def later(self, seconds: float, then: Callable[[], None]) -> None:
        """Call `then` once, so long from now."""
        heapq.heappush(self._due, (time.monotonic() + seconds, next(self._order), then))

    def run(self, seconds: float) -> None:
        """Until so long from now, or until whoever started this has gone."""
        end, parent = time.monotonic() + seconds, os.getppid()
        next_word = 0.0
        while (now := time.monotonic()) < end and os.getppid() == parent:
            if now >= next_word:
                next_word = now + 1
                self.done["slow held"] = sum(
                    client.greeted for client in self.clients.values() if client.kind == "slow"
                )
                print(json.dumps(self.done), flush=True)
            while self._due and self._due[0][0] <= now:
                heapq.heappop(self._due)[2]()
            wait = min(0.1, max(0.0, self._due[0][0] - time.monotonic())) if self._due else 0.1
            for descriptor, events in self.epoll.poll(wait, 512):
                client = self.clients.get(descriptor)
                if client is not None:
                    client.look(events)


class Client:
    """One connection of an attacker; subclasses say what it does. `open` may be called again once it is closed."""

    kind = ""
    sock: socket.socket

    def __init__(self, loop: Loop, address: str, port: int) -> None:
        self.loop, self.address, self.port = loop, address, port
        self.greeted = False
        self.is_open = False
        self.life = 0

    def open(self) -> None:
        """Begin to connect."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
        self.sock, self.greeted, self.is_open = sock, False, True
        self.life += 1
        self.loop.done[f"{self.kind} opened"] += 1
        try:
            sock.bind((self.address, 0))
            sock.connect((TARGET, self.port))
        except BlockingIOError:
            pass
        except OSError as problem:
            self._end(f"not connected: {errno.errorcode.get(problem.errno or 0)}")
            return
        self.loop.clients[sock.fileno()] = self
        self.loop.epoll.register(sock.fileno(), select.EPOLLIN)

    def look(self, events: int) -> None:
        """What epoll says."""
        if events & select.EPOLLOUT:
            self.writable()
        if self.is_open and events & ~select.EPOLLOUT:
            try:
                octets = self.sock.recv(65536)
            except BlockingIOError:
                return
            except OSError as problem:
                self._end(f"cut: {errno.errorcode.get(problem.errno or 0)}")
                return
            if not octets:
                self._end("closed by the server")
                return
            if not self.greeted:
                if octets[:3] != b"220":
                    self._end(f"refused: {octets[:3].decode('ascii', 'replace')}")
                    return
                self.greeted = True
                self.loop.done[f"{self.kind} greeted"] += 1
            self.said(octets)

    def say(self, octets: bytes) -> int:
        """Send now; how many octets went."""
        try:
            return self.sock.send(octets)
        except BlockingIOError:
            return 0
        except OSError as problem:
            self._end(f"cut: {errno.errorcode.get(problem.errno or 0)}")
            return 0

    def close(self) -> None:
        """Hang up."""
        if self.is_open:
            self.is_open = self.greeted = False
            self.loop.clients.pop(self.sock.fileno(), None)
            self.sock.close()

    def _end(self, why: str) -> None:
        self.loop.done[f"{self.kind} {why}"] += 1
        self.close()
        self.ended()

    def said(self, octets: bytes) -> None:
        """The server said something; the first time it is the greeting."""

    def writable(self) -> None:
        """There is room to write."""

    def ended(self) -> None:
        """The connection is gone, and not by us."""


class Slow(Client):
    """An octet each ten seconds."""

    kind = "slow"

    def __init__(self, loop: Loop, address: str, port: int, speaks_first: bool) -> None:
        super().__init__(loop, address, port)
        self._speaks_first = speaks_first
        self._at = 0
        self._dribbling = -1

    def open(self) -> None:
        super().open()
        self._at = 0
        if self.is_open and self._speaks_first:
            self.greeted = True  # where TLS comes first nobody greets
            self._dribble_from_now()

    def said(self, octets: bytes) -> None:
        if self._dribbling != self.life:
            self._dribble_from_now()

    def _dribble_from_now(self) -> None:
        life = self._dribbling = self.life
        self.loop.later(OCTET_SECONDS, lambda: self._dribble(life))

    def _dribble(self, life: int) -> None:
        if life != self.life or not self.is_open:
            return
        # 0x16 begins a TLS handshake, whose length is then 0x1616: it is never complete.
        octet = b"\x16\x03\x01\x16\x16\x01"[self._at : self._at + 1] if self._speaks_first else b""
        self.say(octet or _DRIBBLE[self._at % len(_DRIBBLE) :][:1])
        self._at += 1
        self.loop.done["slow octets"] += 1
        if self.is_open:
            self.loop.later(OCTET_SECONDS, lambda: self._dribble(life))

    def ended(self) -> None:
        self.loop.later(OCTET_SECONDS, self.open)


class Caller(Client):
    """A new connection that does nothing useful."""

    kind = "connections"
    _words = 0

    def said(self, octets: bytes) -> None:
        self._words += 1
        if self._words == 1:
            self.say(b"EHLO caller.example\r\n")
        elif self._words == 2:
            self.say(b"QUIT\r\n")
        else:
            self.close()


class Callers:
    """So many new connections a second."""

    def __init__(self, loop: Loop, rate: int, port: int) -> None:
        self._loop, self._rate, self._port = loop, rate, port
        self._began = time.monotonic()
        self._made = 0
        self._again()

    def _again(self) -> None:
        self._loop.later(0.01, self._again)
        due = int((time.monotonic() - self._began) * self._rate)
        # Who falls behind does not make up for it by a burst of more than a tenth of a second's.
        for _ in range(min(due - self._made, self._rate // 10)):
            number = self._made
            self._made += 1
            address = f"127.{64 + (number >> 16) % 64}.{number >> 8 & 255}.{number & 255}"
            caller = Caller(self._loop, address, self._port)
            caller.open()
            self._loop.later(PATIENCE_SECONDS, caller.close)


class Harvester(Client):
    """Who may live here?"""

    kind = "harvest"
    _number = 0
    _waits_for = 0

    def said(self, octets: bytes) -> None:
        self._waits_for -= octets.count(b"\n")
        if octets.startswith(b"220"):
            self.say(b"EHLO harvest.example\r\n")
            self._waits_for = 0
        elif self._waits_for <= 0:
            first = b"" if self._waits_for == 0 and self._number % 100 else b"RSET\r\nMAIL FROM:<a@harvest.example>\r\n"
            names = [b"name%07d" % (self._number + at) for at in range(10)]
            self._number += 10
            self._waits_for = 10 + first.count(b"\n")
            self.say(first + b"".join(b"RCPT TO:<%s@here.test>\r\n" % name for name in names))
            self.loop.done["harvest recipients"] += 10

    def ended(self) -> None:
        self.loop.later(AGAIN_SECONDS, self.open)


class Flooder(Client):
    """Lines of 10 MB."""

    kind = "lines"
    _SCRIPT = (
        b"EHLO flood.example\r\n",
        b"MAIL FROM:<a@flood.example>\r\n",
        b"RCPT TO:<ann@here.test>\r\n",
        b"DATA\r\n",
    )

    def __init__(self, loop: Loop, address: str, port: int, in_content: bool) -> None:
        super().__init__(loop, address, port)
        self._in_content = in_content
        self._step = self._left = 0

    def open(self) -> None:
        self._step = self._left = 0
        super().open()

    def said(self, octets: bytes) -> None:
        script = self._SCRIPT if self._in_content else self._SCRIPT[:1]
        if self._left:
            return
        if octets[:1] in b"45":
            self._step = 1  # begin anew behind EHLO, whatever it was
        if self._step < len(script):
            self.say(script[self._step])
            self._step += 1
        else:
            self._step = 1 if self._in_content else self._step
            self._left = LINE_OCTETS
            self.loop.epoll.modify(self.sock.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def writable(self) -> None:
        if self._left > 0:
            sent = self.say(_PIECE[: self._left])
            self._left -= sent
            self.loop.done["lines octets"] += sent
        if self.is_open and self._left == 0:
            self.loop.done["lines ended"] += 1
            self.say(b"\r\n.\r\n" if self._in_content else b"\r\n")
            if self.is_open:
                self.loop.epoll.modify(self.sock.fileno(), select.EPOLLIN)

    def ended(self) -> None:
        self.loop.later(AGAIN_SECONDS, self.open)


def _begin(loop: Loop, kind: str, number: int, ports: argparse.Namespace) -> None:
    if kind == "slow":
        for at in range(number):
            network, host = at % SLOW_NETWORKS, at // SLOW_NETWORKS
            address = f"127.{16 + (network >> 8)}.{network & 255}.{1 + host}"
            # Seven of ten where everybody may come; the others where users are.
            port = ports.mx if at % 10 < 7 else ports.submission if at % 10 < 9 else ports.submissions
            client = Slow(loop, address, port, port == ports.submissions)
            loop.later(
                5.0 * at / number, client.open
            )  # a thousand connections a second of its own would be another attack
    elif kind == "connections":
        Callers(loop, number, ports.mx)
    elif kind == "harvest":
        for at in range(number):
            loop.later(0.01 * at, Harvester(loop, f"127.32.{at // 8}.1", ports.mx).open)
    elif kind == "lines":
        for at in range(number):
            loop.later(0.01 * at, Flooder(loop, f"127.33.{at}.1", ports.mx, at % 2 == 1).open)
    else:
        sys.exit(f"no attacker of kind {kind!r}")


def main() -> None:
    """Attack for so long; see the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.siege.attackers")
    parser.add_argument("kinds", nargs="+", metavar="KIND=COUNT")
    for port in ("--mx", "--submission", "--submissions"):
        parser.add_argument(port, type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    chosen = parser.parse_args()
    os.nice(5)  # attackers have machines of their own
    loop = Loop()
    for each in chosen.kinds:
        kind, _, number = each.partition("=")
        _begin(loop, kind, int(number), chosen)
    loop.run(chosen.seconds)
    print(json.dumps(loop.done), flush=True)
    os._exit(0)  # thousands of sockets are closed by the kernel at once


if __name__ == "__main__":
    main()
