# SPDX-License-Identifier: MIT
"""Where a next hop is: a domain becomes the site that takes its mail, by smarthost, address literal, or MX.

A site is the set of hosts behind a next hop: domains with the same mail exchangers share one queue, one limit of
connections, and one transaction for the recipients of a message.

Guarantees: a route that the configuration names is taken as it is (its address may be private), and its faults are
deferrals, because they are ours. RFC 5321 §5.1, §4.1.3.
"""

from __future__ import annotations

import random as randomness
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Literal

from attrs import field, frozen

from polarismail.relay.clients import RemoteHost
from polarismail.relay.mx import (
    Exchanger,
    Lookup,
    MxSettings,
    find_exchangers,
    is_address,
    is_own_endpoint,
    is_public,
    order_addresses,
)
from polarismail.store.lru import LruCache
from polarismail.values.address import literal_address, parse_domain
from polarismail.values.errors import BadAddress, LookupFailed, NoSuchName
from polarismail.values.reply import Reply

# So much longer than its TTL says may a destination be used.
_KNOWN_SECONDS = 5.0
_KNOWN_ENTRIES = 1000


@frozen
class Smarthost:
    """A configured next hop. `tls`: none, opportunistic, required or implicit; `verify`: its certificate must be valid."""

    host: str
    port: int = 25
    user: str = ""
    password: str = field(default="", repr=False)
    tls: Literal["none", "opportunistic", "required", "implicit"] = "opportunistic"
    verify: bool = False


@frozen
class RoutingSettings:
    """Routes by domain, and how the Internet is reached where there is none."""

    smarthost: Smarthost | None = None
    """For every domain that `domains` does not name."""
    domains: Mapping[str, Smarthost | None] = field(factory=dict)
    """By folded domain; None: to its own MX, though there is a smarthost for the rest."""
    port: int = 25
    """Where mail exchangers listen. Another one is for tests."""
    allow_private_targets: bool = False
    max_addresses: int = 5
    max_mx_hosts: int = 10
    own_names: frozenset[str] = frozenset()
    own_endpoints: frozenset[tuple[str, int]] = frozenset()

    @property
    def mx(self) -> MxSettings:
        """The part that mx.py reads."""
        return MxSettings(
            port=self.port,
            max_hosts=self.max_mx_hosts,
            allow_private_targets=self.allow_private_targets,
            own_names=self.own_names,
            own_endpoints=self.own_endpoints,
        )


@frozen
class Destination:
    """A site and how to reach it."""

    site: str
    exchangers: tuple[Exchanger, ...]
    port: int
    tls: str = "opportunistic"
    verify: bool = False
    credentials: tuple[str, str] | None = field(default=None, repr=False)
    is_explicit: bool = False  # the configuration names it: what fails there is ours to repair


class Router:
    """Finds destinations. One for the process."""

    def __init__(
        self,
        lookup: Lookup,
        settings: RoutingSettings,
        random: randomness.Random,
        seconds: Callable[[], float] = monotonic,
    ) -> None:
        self.settings = settings
        self._lookup, self._random, self._seconds = lookup, random, seconds
        self._found: LruCache[str, tuple[Destination, RoutingSettings, float]] = LruCache(_KNOWN_ENTRIES)

    def known(self, next_hop: str) -> Destination | None:
        """What `find` found a moment ago under the same settings: mail to a busy site costs no look-up for each message."""
        found = self._found.get(next_hop)
        if found is None or found[1] is not self.settings or not 0 <= self._seconds() - found[2] < _KNOWN_SECONDS:
            return None
        return found[0]

    async def find(self, next_hop: str) -> Destination | Reply:
        """The destination for a domain in A-labels or an address literal; or the reply for all mail that goes there."""
        settings = self.settings
        destination = await self._find(next_hop, settings)
        if isinstance(destination, Destination):
            self._found.put(next_hop, (destination, settings, self._seconds()))
        return destination

    async def _find(self, next_hop: str, settings: RoutingSettings) -> Destination | Reply:
        domain = next_hop.lower().rstrip(".")
        smarthost = settings.domains.get(domain, settings.smarthost)
        if smarthost is not None:
            return await self._find_smarthost(smarthost)
        if next_hop[:1] == "[":
            return self._find_literal(next_hop)
        found = await find_exchangers(domain, self._lookup, settings.mx)
        if isinstance(found, Reply):
            return found
        site = ",".join(exchanger.name for exchanger in found)
        return Destination(f"{site}:{settings.port}", found, settings.port)

    def order(self, destination: Destination) -> tuple[RemoteHost, ...]:
        """The addresses for one connection, in the order to try them; a new order each time."""
        limit = self.settings.max_addresses
        return order_addresses(destination.exchangers, destination.port, limit, self._random)

    def _find_literal(self, next_hop: str) -> Destination | Reply:
        settings = self.settings
        try:
            address = literal_address(parse_domain(next_hop))
        except BadAddress:
            return Reply(550, (5, 1, 2), f"{next_hop} is no address literal")
        if is_own_endpoint(address, settings.port, settings.own_endpoints):
            return Reply(554, (5, 4, 6), f"Mail for {next_hop} loops back to this host")
        if not (settings.allow_private_targets or is_public(address)):
            return Reply(550, (5, 4, 4), f"{next_hop} is no public address")
        return Destination(f"{next_hop}:{settings.port}", (Exchanger(0, address, (address,)),), settings.port)

    async def _find_smarthost(self, smarthost: Smarthost) -> Destination | Reply:
        host = smarthost.host.strip("[]")
        try:
            addresses = (host,) if is_address(host) else await self._lookup.addresses(host)
        except LookupFailed as problem:
            return Reply(451, (4, 4, 3), f"Name service gave no answer for the smarthost: {problem}")
        except NoSuchName:
            addresses = ()
        if not addresses:
            return Reply(451, (4, 3, 5), f"The smarthost {host} has no address")
        return Destination(
            f"smarthost {smarthost.user}@{host}:{smarthost.port} {smarthost.tls}",
            (Exchanger(0, host, addresses),),
            smarthost.port,
            tls=smarthost.tls,
            verify=smarthost.verify,
            credentials=(smarthost.user, smarthost.password) if smarthost.user else None,
            is_explicit=True,
        )
