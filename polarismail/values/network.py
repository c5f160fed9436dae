# SPDX-License-Identifier: MIT
"""Networks of clients: lists that the configuration names, and the network that one address counts for."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from functools import lru_cache

from attrs import field, frozen

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
LOCAL_CLIENT = "local"
"""Stands for the address of who came over a UNIX socket, in logs, in trace fields, and in lists of networks."""


def parse_network(text: str) -> Network:
    """`192.0.2.0/24`, `2001:db8::/32` or a single address. Raises ValueError with a text for people."""
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError as problem:
        raise ValueError(f"{text!r} is no network: expected e.g. 192.0.2.0/24 or 2001:db8::/32") from problem


def _parse_networks(given: Iterable[Network | str]) -> tuple[Network, ...]:
    return tuple(parse_network(one) if isinstance(one, str) else one for one in given)


@frozen
class NetworkList:
    """Does an address belong to any of these networks? IPv4 clients of IPv6 sockets (::ffff:a.b.c.d) count as IPv4."""

    networks: tuple[Network, ...] = field(default=(), converter=_parse_networks)

    def __contains__(self, address: str) -> bool:
        if not self.networks:
            return False
        parsed = _parse_address(address)
        return parsed is not None and any(
            parsed.version == network.version and parsed in network for network in self.networks
        )


@lru_cache(4096)
def client_network(address: str, v4_bits: int = 24, v6_bits: int = 64) -> str:
    """The network that an address counts for in limits and greylisting: `192.0.2.0/24`, `2001:db8::/64`.

    What is no address (a UNIX socket's peer) counts for itself.
    """
    parsed = _parse_address(address)
    if parsed is None:
        return address
    bits = v4_bits if parsed.version == 4 else v6_bits
    return str(ipaddress.ip_network((parsed, bits), strict=False))


def host_of(address: str) -> str:
    """What counts as one client: an IPv4 address, an IPv6 /64."""
    if ":" not in address:
        return address  # at a thousand new clients a second, parsing would cost a hundredth of a core
    return client_network(address, 32, 64).removesuffix("/32")


def network_of(address: str) -> str:
    """The network around it: IPv4 /24, IPv6 /48."""
    if ":" not in address:
        front = address.rpartition(".")[0]
        return f"{front}.0/24" if front else address
    return client_network(address, 24, 48)


@lru_cache(4096)
def _parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        parsed = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = parsed.ipv4_mapped if parsed.version == 6 else None
    return mapped or parsed
