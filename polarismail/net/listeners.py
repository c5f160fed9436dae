# SPDX-License-Identifier: MIT
"""Listeners are data; their sockets are bound before privileges are dropped and served after.

`bind` does the part that may need root; `serve` hands a bound socket to the reactor once databases and spool are open,
so that early clients wait in the kernel's backlog rather than meet a half-started server.
"""

from __future__ import annotations

import socket
from typing import Any

from attrs import frozen

from polarismail.values.errors import ConfigError

TLS_MODES = ("none", "starttls", "implicit")
ROLES = ("mx", "submission", "pop3")
PLAINTEXT_AUTH = ("never", "networks", "always")
_BACKLOG = 1024


@frozen
class Listener:
    """One address and port that we answer on.

    `tls`: "none", "starttls" (offered; POP3's STLS too) or "implicit" (RFC 8314 §3).
    `plaintext_auth`: where passwords may cross the wire in clear: "never"; "networks", for clients from
    `plaintext_networks`; or "always".
    """

    name: str
    port: int
    address: str = "0.0.0.0"
    role: str = "mx"
    tls: str = "starttls"
    plaintext_auth: str = "never"
    plaintext_networks: tuple[str, ...] = ()

    @property
    def protocol(self) -> str:
        """`"pop3"` or `"smtp"`."""
        return "pop3" if self.role == "pop3" else "smtp"


def bind(listener: Listener) -> socket.socket:
    """A listening, non-blocking socket. Raises ConfigError that names the listener and says what to do."""
    family = socket.AF_INET6 if ":" in listener.address else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((listener.address, listener.port))
        bound.listen(_BACKLOG)
        bound.setblocking(False)
    except OSError as problem:
        bound.close()
        raise ConfigError(
            f"listener {listener.name!r} cannot listen on {listener.address} port {listener.port}: {problem.strerror}; "
            "is another server running there, is the address this machine's, and does a port below 1024 have root?"
        ) from problem
    return bound


def serve(reactor: Any, bound: socket.socket, factory: Any) -> Any:
    """Give a bound socket to the reactor; returns its IListeningPort. The socket is closed here: the reactor has its own
    descriptor for it."""
    try:
        return reactor.adoptStreamPort(bound.fileno(), bound.family, factory)
    finally:
        bound.close()
