# SPDX-License-Identifier: MIT
"""Which hosts take a domain's mail: the answer of DNS judged by RFC 5321 §5.1, or the reply that says why there is none.

Guarantees
    A failure of DNS is a deferral (4.4.3), never a failure: only NXDOMAIN (5.1.2), a null MX (5.1.10, RFC 7505), "no MX
    and no address" (5.4.4), targets that may not be connected to (5.4.4) and a loop to ourselves (5.4.6) are final.
    Where we are among the hosts, those of our own or a worse preference are dropped (RFC 5321 §5.1): mail never goes
    round. Hosts and addresses that are looked at are bounded.
Never
    A connection to loopback, private, link-local, multicast or unspecified addresses on the word of DNS, unless
    `allow_private_targets` (HOSTILE part 5): an MX record must not open our own network to whoever writes one.
"""

from __future__ import annotations

import ipaddress
import random as randomness
import socket
from collections.abc import Callable, Sequence
from typing import Protocol

from attrs import frozen
from twisted.internet.defer import Deferred, gatherResults

from polarismail.relay.clients import RemoteHost
from polarismail.values.address import parse_domain
from polarismail.values.errors import BadAddress, LookupFailed, NoSuchName
from polarismail.values.reply import Reply

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_ANY = ("", "0.0.0.0", "::")


class Lookup(Protocol):
    """What is asked of net.resolver.Resolver."""

    async def mx(self, domain: str) -> tuple[tuple[int, str], ...]:
        """(preference, host), ascending."""

    async def addresses(self, host: str) -> tuple[str, ...]:
        """IPv6 and IPv4 in turns."""


@frozen
class MxSettings:
    """How mail exchangers are found and judged."""

    port: int = 25
    max_hosts: int = 10
    allow_private_targets: bool = False
    own_names: frozenset[str] = frozenset()
    """Our host names in MX records, folded."""
    own_endpoints: frozenset[tuple[str, int]] = frozenset()
    """(address, port) of our listeners; the address may be 0.0.0.0 or ::."""


@frozen
class Exchanger:
    """One host that takes mail for the domain, with its usable addresses."""

    preference: int
    name: str
    addresses: tuple[str, ...]


def order_addresses(
    exchangers: Sequence[Exchanger], port: int, limit: int, random: randomness.Random
) -> tuple[RemoteHost, ...]:
    """The addresses to try, best first: by preference, equal ones shuffled (RFC 5321 §5.1), at most `limit`.

    Every host gets a place or two before one host gets more, so that a first MX with many dead addresses does not hide
    the second MX.
    """
    hosts = sorted(exchangers, key=lambda exchanger: (exchanger.preference, random.random()))
    taken = [0] * len(hosts)
    left = limit
    for most in (2, limit):
        for at, host in enumerate(hosts):
            more = min(most, len(host.addresses), taken[at] + left) - taken[at]
            if more > 0:
                taken[at] += more
                left -= more
    return tuple(
        RemoteHost(host.name, address, port)
        for host, many in zip(hosts, taken, strict=True)
        for address in host.addresses[:many]
    )


async def find_exchangers(domain: str, lookup: Lookup, settings: MxSettings) -> tuple[Exchanger, ...] | Reply:
    """The hosts for `domain` (A-labels), ascending by preference and name; or the 4yz or 5yz that speaks for all its mail."""
    try:
        records = await lookup.mx(domain)
    except NoSuchName:
        return Reply(550, (5, 1, 2), f"No such domain: {domain}")
    except LookupFailed as problem:
        return _unanswered(domain, problem)
    if not records:
        records = ((0, domain),)  # implicit MX, RFC 5321 §5.1
    elif [host for _, host in records] == [""]:
        return Reply(556, (5, 1, 10), f"{domain} does not accept mail (null MX)")
    named = [(preference, host) for preference, host in records if host]
    valid = [(preference, host) for preference, host in named if _is_host_name(host)]
    ours = min((preference for preference, host in valid if host in settings.own_names), default=None)
    candidates = [(p, host) for p, host in valid if ours is None or p < ours][: settings.max_hosts]
    if not candidates and ours is not None:
        return _loops(domain)
    if not candidates:
        # An address where a name belongs: broken, but somebody may repair it, so the mail waits.
        return Reply(451, (4, 4, 4), f"The MX of {domain} does not name a host")
    return await _resolve(domain, candidates, lookup, settings)


async def _resolve(
    domain: str, candidates: list[tuple[int, str]], lookup: Lookup, settings: MxSettings
) -> tuple[Exchanger, ...] | Reply:
    found = await gatherResults(
        [Deferred.fromCoroutine(_addresses_or_problem(lookup, host)) for _, host in candidates], consumeErrors=True
    )
    exchangers: list[Exchanger] = []
    prohibited: list[str] = []
    failed: list[tuple[int, LookupFailed]] = []
    for (preference, host), answer in zip(candidates, found, strict=True):
        if isinstance(answer, LookupFailed):
            failed.append((preference, answer))
        elif any(is_own_endpoint(address, settings.port, settings.own_endpoints) for address in answer):
            # We are among them: everything from here on is equal or worse, and so are equals that came before.
            exchangers = [e for e in exchangers if e.preference < preference]
            failed = [each for each in failed if each[0] < preference]
            if not (exchangers or failed):
                return _loops(domain)
            break
        else:
            usable = tuple(a for a in answer if settings.allow_private_targets or is_public(a))
            prohibited += [a for a in answer if a not in usable]
            if usable:
                exchangers.append(Exchanger(preference, host, usable))
    if exchangers:
        return tuple(sorted(exchangers, key=lambda e: (e.preference, e.name)))
    if failed:
        return _unanswered(domain, failed[0][1])
    if prohibited:
        return Reply(550, (5, 4, 4), f"The mail exchangers of {domain} have no public address ({prohibited[0]})")
    return Reply(550, (5, 4, 4), f"No mail exchanger of {domain} has an address")


async def _addresses_or_problem(lookup: Lookup, host: str) -> tuple[str, ...] | LookupFailed:
    try:
        return await lookup.addresses(host)
    except NoSuchName:
        return ()
    except LookupFailed as problem:
        return problem


def is_address(text: str) -> bool:
    """Whether the text is an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_public(address: str) -> bool:
    """Whether an address is one of the Internet's, also behind the IPv6 forms that embed an IPv4 address."""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        embedded = parsed.ipv4_mapped or parsed.sixtofour
        if embedded is None and parsed in _NAT64:
            embedded = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if embedded is not None:
            return is_public(str(embedded))
    return parsed.is_global and not (parsed.is_multicast or parsed.is_reserved or parsed.is_unspecified)


def is_own_endpoint(
    address: str, port: int, endpoints: frozenset[tuple[str, int]], is_local: Callable[[str], bool] | None = None
) -> bool:
    """Whether a connection to (address, port) would reach one of our listeners."""
    if not any(number == port for _, number in endpoints):
        return False
    if (address, port) in endpoints:
        return True
    return any((any_, port) in endpoints for any_ in _ANY) and (is_local or is_local_address)(address)


def is_local_address(address: str) -> bool:
    """Whether this machine has the address: whether a socket can be bound to it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _is_host_name(host: str) -> bool:
    try:
        return parse_domain(host)[:1] != "["
    except BadAddress:
        return False


def _loops(domain: str) -> Reply:
    return Reply(554, (5, 4, 6), f"Mail for {domain} loops back to this host")


def _unanswered(domain: str, problem: LookupFailed) -> Reply:
    return Reply(451, (4, 4, 3), f"Name service gave no answer for {domain}: {problem}")
