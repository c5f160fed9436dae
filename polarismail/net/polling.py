# SPDX-License-Identifier: MIT
"""Turns of the epoll reactor without a log context for each event, which only lines of the old `twisted.python.log` show.

Making and dropping that context costs two microseconds an event, ten events a message.

Guarantees: what a reactor does with an event, and with an error that comes out of it, is its own code as before.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.epollreactor import EPollReactor
from twisted.logger import Logger

_log = Logger()


def poll_plainly(reactor: Any) -> None:
    """Make this reactor's turns cheap, if it is Twisted's epoll reactor; others stay as they are. Idempotent."""
    if type(reactor) is not EPollReactor:
        return
    poll, selectables = reactor._poller.poll, reactor._selectables
    do_read_or_write = reactor._doReadOrWrite

    def do_poll(timeout: float | None) -> None:
        try:
            events = poll(-1 if timeout is None else timeout, len(selectables))
        except InterruptedError:
            return
        for descriptor, event in events:
            selectable = selectables.get(descriptor)
            if selectable is None:
                continue  # an event before this one has closed it
            try:
                do_read_or_write(selectable, descriptor, event)
            except Exception:
                _log.failure("an event of {selectable} failed", selectable=selectable)

    reactor.doPoll = reactor.doIteration = do_poll  # type: ignore[method-assign]  # of this instance alone
