# SPDX-License-Identifier: MIT
"""Hands octets to the kernel at once where nothing waits before them, else to Twisted's transport.

A command group or a small content fits the socket's buffer nearly always. Twisted's way, to wait until epoll says that the
socket is writable, costs two epoll_ctl calls and a turn of the reactor for each write. What the kernel does not take, and all
that is said inside TLS, goes Twisted's way.

Never: octets out of order, and never an octet twice.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.tcp import Connection


def writes_directly(transport: Any) -> bool:
    """Whether `write_now` may be used on this transport: a TCP connection of Twisted's (with or without TLS, later)."""
    return isinstance(transport, Connection)


def write_now(transport: Any, octets: bytes) -> None:
    """Like `transport.write`, sooner. A connection that is gone is found out by the transport itself, as ever."""
    if not (
        transport.TLS
        or transport.dataBuffer
        or transport._tempDataBuffer
        or transport.disconnecting
        or not transport.connected
    ):
        taken = transport.writeSomeData(octets)
        if taken == len(octets):
            return
        if isinstance(taken, int) and taken > 0:
            octets = octets[taken:]
    transport.write(octets)
