# SPDX-License-Identifier: MIT
"""One worker process: reads what it inherits from its supervisor, then serves until it is told to stop.

Started by `workers.Supervisor` as `python -m polarismail.worker`; of no use by hand.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from twisted.logger import (
    FilteringLogObserver,
    LogLevel,
    LogLevelFilterPredicate,
    globalLogBeginner,
    textFileLogObserver,
)

from polarismail.inheritance import MAX_PACKET_OCTETS, Inheritance
from polarismail.values.errors import ConfigError

_CHANNEL = 3


def read_inheritance(channel: int) -> Inheritance:
    """The first line of the channel, and not an octet more. Raises SystemExit where nobody is there."""
    line = bytearray()
    with socket.socket(fileno=os.dup(channel)) as line_in:
        while not line.endswith(b"\n"):
            peeked = line_in.recv(65536, socket.MSG_PEEK)
            if not peeked or len(line) > MAX_PACKET_OCTETS:
                raise SystemExit(
                    "polarismail.worker is started by twistd polarismail, with workers in its configuration"
                )
            end = peeked.find(b"\n")
            line += line_in.recv(len(peeked) if end < 0 else end + 1)
    return Inheritance.parse(bytes(line))


def main() -> None:
    """Run one worker. The status is 0 when it was told to stop."""
    # A terminal's Ctrl-C reaches the whole group; the supervisor answers it, in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    inheritance = read_inheritance(_CHANNEL)
    try:
        config = inheritance.config()
    except ConfigError as problem:
        raise SystemExit(f"polarismail: {problem}") from problem
    loud = FilteringLogObserver(textFileLogObserver(sys.stderr), [LogLevelFilterPredicate(LogLevel.warn)])
    globalLogBeginner.beginLoggingTo([loud], redirectStandardIO=False, discardBuffer=True)
    from twisted.internet import reactor

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


if __name__ == "__main__":
    main()
