# SPDX-License-Identifier: MIT
"""Listeners are data; their sockets are bound before privileges are dropped and served after.

`bind` does the part that may need root; `serve` hands bound sockets to the reactor once databases and spool are open,
so that early clients wait in the kernel's backlog rather than meet a half-started server.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal

from attrs import field, frozen

from polarismail.net.accepting import Acceptor, Stage
from polarismail.net.shares import Shares
from polarismail.values.errors import ConfigError
from polarismail.values.network import NetworkList

_BACKLOG = 1024


def _check_port(_: object, __: object, port: int) -> None:
    if not 0 <= port <= 65535:
        raise ValueError(f"port: expected 0 to 65535, found {port}")


def _check_networks(_: object, __: object, networks: tuple[str, ...]) -> None:
    for network in networks:
        try:
            ipaddress.ip_network(network)
        except ValueError as problem:
            raise ValueError(f'expected networks as "192.0.2.0/24" or "2001:db8::/32", found {network!r}') from problem


@frozen
class Listener:
    """One port that we answer on, `[[listeners]]`.

    `tls`: "none", "starttls" (offered; STLS on POP3) or "implicit" (RFC 8314 §3).
    `plaintext_auth`: where passwords may cross the wire in clear: "never"; "networks", for clients from
    `plaintext_networks`; or "always". Raises ValueError.
    """

    name: str
    port: int = field(validator=_check_port)
    role: Literal["mx", "submission", "pop3"]
    tls: Literal["none", "starttls", "implicit"] = "starttls"
    address: str = ""  # "": every address of the machine, IPv4 and IPv6
    plaintext_auth: Literal["never", "networks", "always"] = "never"
    plaintext_networks: tuple[str, ...] = field(default=("127.0.0.0/8", "::1/128"), validator=_check_networks)

    def __attrs_post_init__(self) -> None:
        if not self.name.replace("-", "").isalnum():
            raise ValueError(f"name: expected letters, digits and hyphens, found {self.name!r}")
        if self.address:
            try:
                ipaddress.ip_address(self.address)
            except ValueError as problem:
                raise ValueError(f'address: expected an IP address or "", found {self.address!r}') from problem

    @property
    def protocol(self) -> Literal["smtp", "pop3"]:
        """What is spoken here; the role says it."""
        return "pop3" if self.role == "pop3" else "smtp"


def permits_plaintext(listener: Listener, client_address: str) -> bool:
    """Whether this client may log in without TLS here: never, unless the listener says so (RFC 4954 §4, RFC 2595 §2.3)."""
    if listener.plaintext_auth == "networks":
        return client_address in _network_list(listener.plaintext_networks)
    return listener.plaintext_auth == "always"


@lru_cache(64)
def _network_list(networks: tuple[str, ...]) -> NetworkList:
    return NetworkList(networks)


def bind(listener: Listener) -> list[socket.socket]:
    """Listening, non-blocking sockets. Raises ConfigError that names the listener and says what to do."""
    if listener.address:
        return [_bind_one(listener, listener.address)]
    bound = [_bind_one(listener, "0.0.0.0")]
    try:
        bound.append(_bind_one(listener, "::"))
    except ConfigError as problem:
        cause = problem.__cause__
        if not isinstance(cause, OSError) or cause.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            bound[0].close()
            raise  # a machine without IPv6 is served on IPv4 alone; anything else is a fault
    return bound


def _bind_one(listener: Listener, address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    bound = None
    try:
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((address, listener.port))
        bound.listen(_BACKLOG)
        bound.setblocking(False)
    except OSError as problem:
        if bound is not None:
            bound.close()
        raise ConfigError(
            f'listener "{listener.name}" cannot listen on {address} port {listener.port}: {problem.strerror}; '
            "is another server running there, is the address this machine's, and does a port below 1024 have root?"
        ) from problem
    return bound


def serve(
    reactor: Any,
    bound: Iterable[socket.socket],
    factory: Any,
    shares: Shares | None = None,
    stages: Sequence[Stage] = (),
) -> list[Acceptor]:
    """Accept from bound sockets, which are the acceptors' from now on. `shares`: where other processes accept as well;
    `stages`: what each connection goes through first."""
    return [Acceptor(reactor, each, factory, shares, stages) for each in bound]
