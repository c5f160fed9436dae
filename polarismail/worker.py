# SPDX-License-Identifier: MIT
"""One worker process: reads what it inherits from its supervisor, then serves until it is told to stop.

Forked by the spawner, which has imported everything, and has no reactor that runs.
"""

from __future__ import annotations

import socket
import sys
from typing import Any

from twisted.logger import (
    FilteringLogObserver,
    LogLevel,
    LogLevelFilterPredicate,
    globalLogBeginner,
    textFileLogObserver,
)

from polarismail.inheritance import MAX_PACKET_OCTETS, Inheritance
from polarismail.net.clock import count_monotonic
from polarismail.values.errors import ConfigError


def read_inheritance(channel: int) -> Inheritance:
    """The first line of the channel, and not an octet more. Raises SystemExit where nobody is there any more."""
    line = bytearray()
    with socket.socket(fileno=channel) as whole:
        while not line.endswith(b"\n"):
            peeked = whole.recv(65536, socket.MSG_PEEK)
            if not peeked or len(line) > MAX_PACKET_OCTETS:
                raise SystemExit("polarismail: the supervisor has gone before it said what to do")
            end = peeked.find(b"\n")
            line += whole.recv(len(peeked) if end < 0 else end + 1)
        whole.detach()
    return Inheritance.parse(bytes(line))


def main(descriptors: list[int]) -> None:
    """Run one worker on what it has inherited, the channel first. Returns when it was told to stop.

    Raises SystemExit where it cannot start.
    """
    inheritance = read_inheritance(descriptors[0]).on(descriptors)
    try:
        config = inheritance.config()
    except ConfigError as problem:
        raise SystemExit(f"polarismail: {problem}") from problem
    loud = FilteringLogObserver(textFileLogObserver(sys.stderr), [LogLevelFilterPredicate(LogLevel.warn)])
    globalLogBeginner.beginLoggingTo([loud], redirectStandardIO=False, discardBuffer=True)
    reactor = _fresh_reactor()

    from polarismail.service import MailService

    service = MailService(
        config,
        inheritance.config_path,
        reactor=reactor,
        clock_offset_seconds=inheritance.clock_offset_seconds,
        uid=inheritance.uid,
        gid=inheritance.gid,
        inheritance=inheritance,
    )
    reactor.addSystemEventTrigger("before", "shutdown", service.stopService)
    reactor.callWhenRunning(service.startService)
    reactor.run()


def _fresh_reactor() -> Any:
    """A reactor of our own: the one that importing has installed shares its descriptors with every other worker."""
    sys.modules.pop("twisted.internet.reactor", None)
    from twisted.internet import epollreactor

    epollreactor.install()
    from twisted.internet import reactor

    count_monotonic(reactor)
    return reactor
