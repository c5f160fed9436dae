# SPDX-License-Identifier: MIT
"""What a connection wants of an engine and of a session, and the bounds it keeps: between `wire`, `net` and `serve`.

Whoever writes a protocol reads this; net/transport.py is who calls.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any
from typing import Protocol as Interface

from attrs import evolve, frozen

if TYPE_CHECKING:
    from polarismail.net.transport import Connection


class Engine(Interface):
    """Octets to events, without I/O (`wire/`)."""

    @property
    def buffered(self) -> int: ...

    def receive(self, octets: bytes) -> None: ...
    def next_event(self) -> Any: ...


class Session(Interface):
    """What a protocol does about events (`serve/`). Each method may call `connection.send`."""

    def connected(self, connection: Connection) -> Awaitable[None] | None:
        """The client is there (on an implicit TLS listener: the handshake may still be running)."""

    def secured(self) -> None:
        """A TLS handshake has completed."""

    def do(self, event: Any) -> Awaitable[None] | None:
        """Perform one event; None when done."""

    def waiting(self) -> float:
        """Seconds that the client has, from now, to send what the engine needs next."""

    def behind(self) -> float:
        """Seconds that we have waited for the client longer than we should have to; negative: it must not be put out."""

    def stays(self) -> bool:
        """Whether somebody has logged in, who keeps the place and the usual time under stress."""

    def change_settings(self, settings: Any) -> None:
        """Other time-outs and budgets from now on."""

    def may_end(self) -> bool:
        """Whether a goodbye of ours would interrupt nothing: False within a message's content."""

    def timed_out(self) -> bytes:
        """Last words to a client that was too slow."""

    def failed(self, problem: BaseException) -> bytes:
        """`do` raised: log it; the reply that the client is owed."""

    def lost(self) -> None:
        """The connection is gone: drop what was not committed."""


@frozen
class Hurry:
    """What all waits and budgets are cut to while places run out (Postfix, STRESS_README)."""

    command_seconds: float = 10.0
    hard_errors: int = 1
    max_junk_commands: int = 1


@frozen
class TransportSettings:
    """Bounds of every connection."""

    max_buffered_octets: int = 65536
    handshake_seconds: float = 30.0
    handshakes_per_minute: int = 600  # on one listener, from one address (IPv6: one /64); 0: no limit
    write_seconds: float = 300.0
    linger_seconds: float = 10.0
    linger_octets: int = 1048576  # what is read and thrown away meanwhile
    drain_seconds: float = 30.0  # what a transaction has left when the server is told to stop

    def hurried(self, hurry: Hurry) -> TransportSettings:
        """The same under stress."""
        seconds = hurry.command_seconds
        return evolve(
            self,
            handshake_seconds=min(self.handshake_seconds, seconds),
            write_seconds=min(self.write_seconds, seconds),
            linger_seconds=min(self.linger_seconds, 1.0),
        )


DEFAULT_SETTINGS = TransportSettings()
