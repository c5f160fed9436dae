# SPDX-License-Identifier: MIT
"""Listeners are data: where one answers, what is spoken there, to whom, and within which limits of its own.

A Listener is valid once it is made; net/binding.py makes its sockets before privileges are dropped, and `serve` hands them
to the reactor once databases and spool are open, so that early clients wait in the kernel's line rather than meet a
half-started server.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal

from attrs import field, fields_dict, frozen

from polarismail.net.accepting import Acceptor, Client, GoOn, Porch
from polarismail.net.shares import Shares
from polarismail.values.network import LOCAL_CLIENT, NetworkList
from polarismail.wire.smtp_parameters import DEFAULT_OFFERS, check_offers

NO_PORT = -1
_ROLES = '"mx", "submission", "lmtp", "pop3"'
_WIDEST = {4: 8, 6: 16}
"""The shortest prefixes of networks that may relay: what is wider belongs to more than one organisation."""


def _check_port(_: object, __: object, port: int) -> None:
    if not NO_PORT <= port <= 65535:
        raise ValueError(f"port: expected 0 to 65535, found {port}")


def _check_role(_: object, __: object, role: str) -> None:
    if not role:
        raise ValueError(f"role: missing: expected one of {_ROLES}")


def _check_mode(_: object, __: object, mode: int) -> None:
    if not 0 <= mode <= 0o777:
        raise ValueError(f"socket_mode: expected a file's mode as 0o660, found 0o{mode:o}")


def _check_networks(_: object, attribute: Any, networks: tuple[str, ...]) -> None:
    for network in networks:
        try:
            if network != LOCAL_CLIENT:
                ipaddress.ip_network(network)
        except ValueError as problem:
            raise ValueError(
                f'{attribute.name}: expected networks as "192.0.2.0/24" or "2001:db8::/32", or "local" for clients of a UNIX '
                f"socket, found {network!r}"
            ) from problem


def _check_relay_networks(_: object, attribute: Any, networks: tuple[str, ...]) -> None:
    _check_networks(_, attribute, networks)
    for network in networks:
        if network == LOCAL_CLIENT:
            continue
        parsed = ipaddress.ip_network(network)
        if parsed.prefixlen < _WIDEST[parsed.version]:
            raise ValueError(
                f'relay_networks: "{network}" would let strangers send through this server to anywhere: an open relay, which '
                f"others block within hours; expected your own networks, /{_WIDEST[parsed.version]} or smaller"
            )


@frozen
class ListenerLimits:
    """`[listeners.limits]`: what is other on this listener than `[connections]`, `[smtp]` and `[session]` say. None: it is not.

    `connections` and `connections_per_address` count this listener's alone, beside what holds for all of a protocol.
    """

    connections: int | None = None
    connections_per_address: int | None = None
    max_message_octets: int | None = None
    max_recipients: int | None = None
    command_seconds: float | None = None
    content_seconds: float | None = None

    def __attrs_post_init__(self) -> None:
        for name in fields_dict(type(self)):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: expected more than 0, found {value}")

    def over(self, settings: Any) -> dict[str, Any]:
        """Those that are set and are fields of these settings, for attrs' `evolve`."""
        names = fields_dict(type(settings)).keys() & fields_dict(type(self)).keys()
        return {name: value for name in names if (value := getattr(self, name)) is not None}


NO_LIMITS = ListenerLimits()
_FOR_ALL_ROLES = {"connections", "connections_per_address"}


def _check_offers(_: object, __: object, offers: tuple[str, ...] | None) -> None:
    check_offers(offers or ())


@frozen
class Listener:
    """One place that we answer at, `[[listeners]]`.

    `address`: "" (every address of the machine, IPv4 and IPv6), an IP address, `unix:/path`, `systemd:NAME` (sockets that
    systemd hands over), or `fd:N` (a listening socket that this process was started with). Only the first two have a port.
    `tls`: "none", "starttls" (offered; STLS on POP3) or "implicit" (RFC 8314 §3).
    `plaintext_auth`: where passwords may cross the wire in clear: "never"; "networks", for clients from
    `plaintext_networks`; or "always".
    `proxy_networks`: where not empty, only proxies in these networks are served, and the client is who they say
    (net/proxying.py). `xclient_networks`: front ends that may speak for other clients. `relay_networks`: whose clients send
    anywhere without a login. `offers`: extensions of SMTP that are offered, beyond those that always are. Raises ValueError.
    """

    name: str
    port: int = field(default=NO_PORT, validator=_check_port)
    # The port comes first and has a default, so this has one that is never good.
    role: Literal["mx", "submission", "lmtp", "pop3"] = field(default="", validator=_check_role)
    tls: Literal["none", "starttls", "implicit"] = "starttls"
    address: str = ""
    plaintext_auth: Literal["never", "networks", "always"] = "never"
    plaintext_networks: tuple[str, ...] = field(
        default=("127.0.0.0/8", "::1/128", LOCAL_CLIENT), validator=_check_networks
    )
    proxy_networks: tuple[str, ...] = field(default=(), validator=_check_networks)
    xclient_networks: tuple[str, ...] = field(default=(), validator=_check_networks)
    relay_networks: tuple[str, ...] = field(default=(), validator=_check_relay_networks)
    socket_mode: int = field(default=0o660, validator=_check_mode)
    socket_group: str = ""  # "": the service's own
    limits: ListenerLimits = NO_LIMITS
    offers: tuple[str, ...] | None = field(default=None, validator=_check_offers)  # None: what the role does

    def __attrs_post_init__(self) -> None:
        if not self.name.replace("-", "").isalnum():
            raise ValueError(f"name: expected letters, digits and hyphens, found {self.name!r}")
        if self.kind == "tcp":
            if self.port == NO_PORT:
                raise ValueError("port: missing: expected a whole number, 0 or more")
        elif self.port != NO_PORT:
            raise ValueError(f'port: expected none with address = "{self.address}", found {self.port}')
        if self.role == "lmtp" and self.port == 25:
            raise ValueError(
                "port: expected another one than 25, which is SMTP's and never LMTP's (RFC 2033 §5), found 25"
            )
        if self.relay_networks and self.role in ("submission", "pop3"):
            raise ValueError(
                f'relay_networks: expected none where the role is "{self.role}", which is for who logs in; make a listener '
                'with role = "mx" for machines that cannot'
            )
        if self.offers and self.protocol != "smtp":
            raise ValueError("offers: SMTP has extensions to offer, POP3 has not")
        if self.xclient_networks and self.protocol != "smtp":
            raise ValueError("xclient_networks: XCLIENT and XFORWARD are SMTP's, POP3 has nothing like them")
        if self.role == "pop3":
            for name in fields_dict(ListenerLimits).keys() - _FOR_ALL_ROLES:
                if getattr(self.limits, name) is not None:
                    raise ValueError(f'limits: expected no {name} where the role is "pop3"')

    @property
    def kind(self) -> Literal["tcp", "unix", "systemd", "fd"]:
        """What its address is. Raises ValueError where it is nothing that we know."""
        kind, colon, value = self.address.partition(":")
        if colon and kind == "unix":
            if not value.startswith("/") or value.endswith("/"):
                raise ValueError(f"address: expected unix: and the absolute path of a socket, found {self.address!r}")
            return "unix"
        if colon and kind == "systemd":
            if not re.fullmatch(r"[!-9;-~]{1,255}", value):  # what systemd allows as FileDescriptorName=
                raise ValueError(f"address: expected systemd: and a FileDescriptorName, found {self.address!r}")
            return "systemd"
        if colon and kind == "fd":
            if not re.fullmatch(r"[0-9]{1,6}", value) or int(value) < 3:
                raise ValueError(f"address: expected fd: and a descriptor's number, 3 or more, found {self.address!r}")
            return "fd"
        if self.address:
            try:
                ipaddress.ip_address(self.address)
            except ValueError as problem:
                raise ValueError(
                    f'address: expected an IP address, "unix:/path", "systemd:NAME", "fd:N" or "", found {self.address!r}'
                ) from problem
        return "tcp"

    @property
    def within(self) -> str:
        """The address without its kind: the socket's path, systemd's name, the descriptor's number."""
        return self.address if self.kind == "tcp" else self.address.partition(":")[2]

    @property
    def protocol(self) -> Literal["smtp", "pop3"]:
        """What is spoken here, LMTP being a kind of SMTP; the role says it."""
        return "pop3" if self.role == "pop3" else "smtp"

    @property
    def extensions(self) -> frozenset[str]:
        """The extensions of SMTP that are offered here, of those that can be chosen."""
        return frozenset(DEFAULT_OFFERS.get(self.role, ()) if self.offers is None else self.offers)


def permits_plaintext(listener: Listener, client_address: str) -> bool:
    """Whether this client may log in without TLS here: never, unless the listener says so (RFC 4954 §4, RFC 2595 §2.3)."""
    if listener.plaintext_auth == "networks":
        return is_in(client_address, listener.plaintext_networks)
    return listener.plaintext_auth == "always"


def is_front_end(listener: Listener, peer_address: str) -> bool:
    """Whether this client may say XCLIENT and XFORWARD here."""
    return bool(listener.xclient_networks) and is_in(peer_address, listener.xclient_networks)


def permits_relaying(listener: Listener, client_address: str) -> bool:
    """Whether this client may send anywhere without a login: no, unless its network is named."""
    return bool(listener.relay_networks) and is_in(client_address, listener.relay_networks)


def is_in(client_address: str, networks: tuple[str, ...]) -> bool:
    """Whether the client's address, or "local", is in one of these networks."""
    if client_address == LOCAL_CLIENT:
        return LOCAL_CLIENT in networks
    return client_address in _network_list(networks)


@lru_cache(64)
def _network_list(networks: tuple[str, ...]) -> NetworkList:
    return NetworkList([each for each in networks if each != LOCAL_CLIENT])


class StrangersOnly:
    """A porch that clients of these networks pass by: machines of ours, and what a proxy does for itself."""

    def __init__(self, porch: Porch, networks: tuple[str, ...]) -> None:
        self._porch, self._networks = porch, networks

    def take(self, accepted: socket.socket, client: Client, go_on: GoOn) -> None:
        """See Porch."""
        if is_in(client[0] if client else LOCAL_CLIENT, self._networks):
            go_on(accepted, client)
        else:
            self._porch.take(accepted, client, go_on)

    def stop(self) -> None:
        """See Porch."""
        self._porch.stop()


def serve(
    reactor: Any,
    bound: Iterable[socket.socket],
    factory: Any,
    shares: Shares | None = None,
    porches: Sequence[Porch] = (),
) -> list[Acceptor]:
    """Accept from bound sockets, which are the acceptors' from now on. `shares`: where other processes accept as well;
    `porches`: what each connection goes through first."""
    return [Acceptor(reactor, each, factory, shares, porches) for each in bound]
