# SPDX-License-Identifier: MIT
"""DNS lists of addresses: who lists this client, found out in parallel, while others wait, and never held against a client
that nobody could answer for.

Guarantees: a list that fails, is late, or answers with an address that is not one of its `answers` counts as "not listed";
so does a client whose turn did not come. What is asked at a time, what waits, and what is remembered is bounded. Under a
flood the newest is asked first: its answer may still come in time.

The name to ask for is the address backwards (IPv6: its 32 digits) before the list's name, the answer an A record in
127.0.0.0/8 (RFC 5782 §2.1, §2.4).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from typing import Any

from attrs import field, frozen
from twisted.internet.defer import Deferred, gatherResults
from twisted.logger import Logger

from polarismail.store.lru import LruCache
from polarismail.values.address import parse_domain, to_ascii
from polarismail.values.checks import check_positive
from polarismail.values.errors import BadAddress, LookupFailed, NoSuchName

_MAX_LINE = 10_000
_INCOMPLETE_SECONDS = 10.0  # how long an answer is used that some list did not contribute to
_OCTET = r"(\*|\d{1,3}(?:\.\.\d{1,3})?)"
_PATTERN = re.compile(r"\.".join([_OCTET] * 4))


def _check_name(_: object, __: object, name: str) -> None:
    try:
        to_ascii(parse_domain(name))
    except BadAddress as problem:
        raise ValueError(f'name: expected a domain name, found "{name}": {problem}') from problem


def _check_answers(_: object, __: object, answers: tuple[str, ...]) -> None:
    for answer in answers:
        parse_pattern(answer)


def parse_pattern(text: str) -> tuple[range, ...]:
    """Four octets, each a number, a range as `2..11`, or `*`. Raises ValueError."""
    found = _PATTERN.fullmatch(text)
    octets = [] if found is None else [_parse_octet(each) for each in found.groups()]
    if not octets or not all(octet and octet[-1] <= 255 for octet in octets):
        raise ValueError(f'answers: expected four octets as "127.0.0.2..11" or "127.0.*.1", found "{text}"')
    return tuple(octets)


def _parse_octet(text: str) -> range:
    first, _, last = ("0", "", "255") if text == "*" else text.partition("..")
    return range(int(first), int(last or first) + 1)


@frozen
class DnsList:
    """One list, `[[gate.lists]]`. Raises ValueError."""

    name: str = field(validator=_check_name)
    weight: int = 1
    # 127.255.255.0/24 is how lists say that they do not answer us: never a listing.
    answers: tuple[str, ...] = field(default=("127.0.0.2..255",), validator=_check_answers)


@frozen
class DnsListSettings:
    """Which lists are asked, and how long and how many answers are remembered. Raises ValueError."""

    lists: tuple[DnsList, ...] = ()
    allow_lists: tuple[DnsList, ...] = ()
    lists_cache_seconds: float = 600.0
    lists_cache_entries: int = field(default=20_000, validator=check_positive)
    lists_at_once: int = field(default=50, validator=check_positive)  # addresses


@frozen
class Hit:
    """A list that has the client, and what that counts: below 0 where it speaks for the client."""

    name: str
    weight: int


@frozen
class Listing:
    """What lists say of one address; `complete` once all of them have answered."""

    hits: tuple[Hit, ...] = ()
    complete: bool = False


UNKNOWN = Listing()
_NOWHERE = Listing(complete=True)


def query_name(address: str, zone: str) -> str | None:
    """The name that a list is asked for; None for what is no address."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return f"{parsed.reverse_pointer.removesuffix('.ip6.arpa').removesuffix('.in-addr.arpa')}.{zone}"


@frozen
class _Rule:
    """Answers of one zone that mean a hit."""

    patterns: tuple[tuple[range, ...], ...]
    hit: Hit

    def fits(self, answers: Iterable[str]) -> bool:
        octets = [[int(octet) for octet in answer.split(".")] for answer in answers]
        return any(
            all(octet in wanted for octet, wanted in zip(each, pattern, strict=True))
            for each in octets
            for pattern in self.patterns
        )


class DnsLists:
    """Asks for one address at a time and list; `when_known(address, listing)` is called whenever all have answered.

    `find(name)` fires with the A records of a name, as Resolver.ipv4_addresses does.
    """

    log = Logger()

    def __init__(self, find: Callable[[str], Any], reactor: Any, settings: DnsListSettings | None = None) -> None:
        self.when_known: Callable[[str, Listing], None] = lambda address, listing: None
        self._find, self._reactor = find, reactor
        self.asked = self.failed = self.not_asked = 0
        self._running: dict[str, list[Hit]] = {}
        self._line: dict[str, None] = {}
        self.reconfigure(settings or DnsListSettings())

    def reconfigure(self, settings: DnsListSettings) -> None:
        """Ask other lists from now on."""
        self._settings = settings
        self._zones: dict[str, list[_Rule]] = {}
        for sign, lists in ((1, settings.lists), (-1, settings.allow_lists)):
            for each in lists:
                rule = _Rule(tuple(map(parse_pattern, each.answers)), Hit(each.name, sign * each.weight))
                self._zones.setdefault(to_ascii(parse_domain(each.name)), []).append(rule)
        self._cache: LruCache[str, tuple[float, Listing]] = LruCache(settings.lists_cache_entries)

    def look(self, address: str) -> Listing:
        """What is known now; at once."""
        kept = self._cache.get(address)
        if kept is not None:
            seconds = self._settings.lists_cache_seconds if kept[1].complete else _INCOMPLETE_SECONDS
            if 0 <= self._reactor.seconds() - kept[0] < seconds:
                return kept[1]
            self._cache.drop(address)
        hits = self._running.get(address)
        return Listing(tuple(hits)) if hits else UNKNOWN

    def ask(self, address: str) -> Listing:
        """What is known now. Where that is not all, it is found out."""
        known = self.look(address)
        if not self._zones or known.complete or address in self._running:
            return known
        if len(self._running) < self._settings.lists_at_once:
            self._begin(address)
        else:
            self._line.pop(address, None)
            self._line[address] = None
            if len(self._line) > _MAX_LINE:
                del self._line[next(iter(self._line))]
                self.not_asked += 1
        return known

    def statistics(self) -> dict[str, int]:
        """Questions asked, those that brought no answer, and clients that nobody was asked about."""
        return {"lists_asked": self.asked, "lists_failed": self.failed, "lists_not_asked": self.not_asked}

    def _begin(self, address: str) -> None:
        self._running[address] = []
        Deferred.fromCoroutine(self._ask_all(address)).addErrback(
            lambda failure: self.log.failure("DNS lists could not be asked", failure)
        )

    async def _ask_all(self, address: str) -> None:
        hits, cache = self._running[address], self._cache
        try:
            answered = await gatherResults(
                [Deferred.fromCoroutine(self._ask_one(address, *zone, hits)) for zone in self._zones.items()]
            )
            complete = all(answered)
            listing = Listing(tuple(hits), complete) if hits or not complete else _NOWHERE
            if cache is self._cache:  # else other lists are asked by now
                cache.put(address, (self._reactor.seconds(), listing))
        finally:
            del self._running[address]
            self._go_on()
        if complete and cache is self._cache:
            self.when_known(address, listing)

    async def _ask_one(self, address: str, zone: str, rules: list[_Rule], hits: list[Hit]) -> bool:
        name = query_name(address, zone)
        if name is None:
            return True
        self.asked += 1
        try:
            answers = await self._find(name)
        except NoSuchName:
            return True
        except LookupFailed:
            self.failed += 1
            return False
        except Exception:
            self.failed += 1
            self.log.failure("a DNS list could not be asked", zone=zone)
            return False
        hits += [rule.hit for rule in rules if rule.fits(answers)]
        return True

    def _go_on(self) -> None:
        # In another turn: answers that come without waiting (from the resolver's cache) would nest.
        if self._line:
            self._reactor.callLater(0, self._next)

    def _next(self) -> None:
        while self._line and len(self._running) < self._settings.lists_at_once:
            self._begin(self._line.popitem()[0])
