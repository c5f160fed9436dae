# SPDX-License-Identifier: MIT
"""A worker's line to its supervisor, and the supervisor's to a worker: JSON lines over a socket pair that both trust.

A line is `{"say": name, ...arguments}`. The end of the line is the end of whoever was there.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.logger import Logger
from twisted.protocols.basic import LineOnlyReceiver
from twisted.python.failure import Failure

from polarismail.inheritance import MAX_PACKET_OCTETS
from polarismail.net import unix_sockets


class _Line(LineOnlyReceiver):
    delimiter = b"\n"
    MAX_LENGTH = MAX_PACKET_OCTETS

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def lineReceived(self, line: bytes) -> None:
        self._channel._heard(line)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._channel._ended()


class _LineFactory(Factory):
    noisy = False

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def buildProtocol(self, addr: Any) -> Protocol:
        return _Line(self._channel)


class Channel:
    """One end, on a connected descriptor that is ours from now on."""

    log = Logger()

    def __init__(self, reactor: Any, descriptor: int) -> None:
        self._subscribers: dict[str, Callable[..., Any]] = {}
        self._lost: Callable[[], None] | None = None
        self._early: list[dict[str, Any]] = []
        self.is_open = True
        self._line = unix_sockets.adopt(reactor, socket.socket(fileno=descriptor), _LineFactory(self))

    def subscribe(self, name: str, subscriber: Callable[..., Any]) -> None:
        """Who hears of this word, with its arguments by name. What was said before is heard now."""
        self._subscribers[name] = subscriber
        early, self._early = self._early, []
        for words in early:
            self._tell(words)

    def when_lost(self, callback: Callable[[], None]) -> None:
        """Call this when the other side is gone, now if it is already."""
        self._lost = callback
        if not self.is_open:
            callback()

    def say(self, word: str, /, **arguments: Any) -> None:
        """To the other side, if it is there."""
        if self.is_open:
            self._line.sendLine(json.dumps({"say": word, **arguments}).encode("ascii"))

    def say_raw(self, line: bytes) -> None:
        """A line that is rendered already."""
        self._line.transport.write(line)

    def close(self) -> None:
        """Hang up."""
        self._line.transport.loseConnection()

    def _heard(self, line: bytes) -> None:
        try:
            self._tell(json.loads(line))
        except Exception:
            self.log.failure("a word on the line between supervisor and worker")

    def _tell(self, words: dict[str, Any]) -> None:
        subscriber = self._subscribers.get(words["say"])
        if subscriber is None:
            self._early.append(words)
            return
        subscriber(**{name: value for name, value in words.items() if name != "say"})

    def _ended(self) -> None:
        self.is_open = False
        if self._lost is not None:
            self._lost()
