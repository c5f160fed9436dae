# SPDX-License-Identifier: MIT
"""DNS for mail: answers that distinguish "there is none" from "I could not find out", behind a bounded cache.

Guarantees
    `NoSuchName` is raised on NXDOMAIN alone; whatever else goes wrong (SERVFAIL, REFUSED, time-out, an answer to
    another question, a CNAME loop) is `LookupFailed`. Names are compared without case and without their final dot. At
    most `max_records` records of an answer are looked at, and only those that answer the question or are reached from
    it by CNAMEs. The same question is asked once however many wait for it; questions in flight and cache entries are
    bounded. Answers live as long as their TTL says, clamped; negative ones at least a minute; failures some seconds.
Transport
    Twisted names' message codec and protocols: a socket with a port of its own for each query, connected to the server
    (so that a dead one is noticed at once); TCP where the answer was truncated.

RFC 1034 §3.6.2 (CNAME), RFC 1035, RFC 2308 (negative answers), RFC 5321 §5.1.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Iterable
from typing import Any

from attrs import field, frozen
from twisted.internet.defer import Deferred, DeferredSemaphore, gatherResults
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP6ClientEndpoint, connectProtocol
from twisted.internet.error import ConnectionRefusedError
from twisted.logger import Logger
from twisted.names import dns
from twisted.python.failure import Failure

from polarismail.store.lru import LruCache
from polarismail.values.errors import LookupFailed, NoSuchName

RESOLV_CONF = "/etc/resolv.conf"
MAX_NAME_OCTETS = 255
DNS_PORT = 53


@frozen
class ResolverSettings:
    """How to ask, and how long to believe. Defaults: NUMBERS.md, "DNS"."""

    servers: tuple[tuple[str, int], ...] = ()
    """(address, port) in order of preference; empty: the nameservers of /etc/resolv.conf."""
    timeout_seconds: float = 5.0
    tries: int = 2
    ipv6: bool = True
    cache_entries: int = 20_000
    min_ttl_seconds: float = 60.0
    max_ttl_seconds: float = 86_400.0
    max_negative_ttl_seconds: float = 3_600.0
    failure_seconds: float = 5.0
    max_records: int = 100
    max_cnames: int = 8
    max_queries: int = 200


def system_servers(path: str = RESOLV_CONF) -> tuple[tuple[str, int], ...]:
    """The nameservers of a resolv.conf(5), at most three; loopback when it names none."""
    servers: list[tuple[str, int]] = []
    if os.path.exists(path):
        with open(path, encoding="ascii", errors="replace") as lines:
            for line in lines:
                words = line.split()
                if len(words) >= 2 and words[0] == "nameserver":
                    servers.append((words[1], DNS_PORT))
    return tuple(servers[:3]) or (("127.0.0.1", DNS_PORT),)


def fold_name(name: bytes | str) -> str:
    """A domain name as keys and comparisons use it: lower case, no final dot; what is not ASCII is shown escaped."""
    text = name if isinstance(name, str) else name.decode("ascii", "backslashreplace")
    return text.lower().rstrip(".")


class Resolver:
    """MX and address records of a name. One for the process; methods run on the reactor's thread."""

    log = Logger()

    def __init__(self, reactor: Any, settings: ResolverSettings | None = None) -> None:
        self._reactor = reactor
        self._settings = settings or ResolverSettings()
        self._servers = self._settings.servers
        self._cache: Cache = Cache(self._settings.cache_entries, reactor.seconds)
        self._asking: dict[tuple[str, int], list[Deferred[Answer]]] = {}
        self._slots = DeferredSemaphore(self._settings.max_queries)

    async def mx(self, domain: str) -> tuple[tuple[int, str], ...]:
        """(preference, host) of each MX record, ascending; empty when the name exists without one.

        Hosts are folded; the host of a null MX (RFC 7505) is "". Raises NoSuchName, LookupFailed.
        """
        return await self._find(domain, dns.MX)

    async def addresses(self, host: str) -> tuple[str, ...]:
        """IPv6 and IPv4 addresses in turns, IPv6 first; empty when the name exists without one.

        One family that answers is enough. Raises NoSuchName, LookupFailed.
        """
        kinds = (dns.AAAA, dns.A) if self._settings.ipv6 else (dns.A,)
        found = await gatherResults(
            [Deferred.fromCoroutine(self._find_or_problem(host, kind)) for kind in kinds], consumeErrors=True
        )
        families = [answer for answer in found if not isinstance(answer, Exception)]
        mixed = _in_turns(families)
        if mixed:
            return mixed
        for wanted in (LookupFailed, NoSuchName):
            for answer in found:
                if isinstance(answer, wanted):
                    raise answer
        return ()

    async def ipv4_addresses(self, host: str) -> tuple[str, ...]:
        """The A records of a name, and nothing else; empty when it exists without one. Raises NoSuchName, LookupFailed."""
        return await self._find(host, dns.A)

    def forget(self) -> None:
        """Drop every cached answer."""
        self._cache.clear()

    async def _find_or_problem(self, name: str, kind: int) -> tuple[Any, ...] | Exception:
        try:
            return await self._find(name, kind)
        except (LookupFailed, NoSuchName) as problem:
            return problem

    async def _find(self, name: str, kind: int) -> tuple[Any, ...]:
        key = (fold_name(name), kind)
        answer = self._cache.get(key)
        if answer is None:
            waiting = self._asking.get(key)
            if waiting is not None:
                turn: Deferred[Answer] = Deferred()
                waiting.append(turn)
                answer = await turn
            else:
                answer = await self._ask(key)
        if answer.problem is not None:
            raise answer.problem(answer.text)
        return answer.values

    async def _ask(self, key: tuple[str, int]) -> Answer:
        self._asking[key] = []
        try:
            answer = await self._follow(*key)
        except LookupFailed as problem:
            answer = Answer(problem=LookupFailed, text=str(problem), ttl=self._settings.failure_seconds)
        except Exception:
            self.log.failure("DNS query failed in an unexpected way", name=key[0])
            answer = Answer(problem=LookupFailed, text=f"{key[0]}: lookup failed", ttl=1.0)
        self._cache.put(key, answer)
        for turn in self._asking.pop(key):
            turn.callback(answer)
        return answer

    async def _follow(self, name: str, kind: int) -> Answer:
        """Ask, and ask again where a CNAME leads out of the answer."""
        settings, seen, ttl = self._settings, {name}, self._settings.max_ttl_seconds
        if not name or len(name) > MAX_NAME_OCTETS or not name.isascii():
            return Answer(problem=NoSuchName, text=f"{name[:80]!r} is no domain name", ttl=settings.min_ttl_seconds)
        while True:
            message = await self._query(name, kind)
            aliases, values = _sort_answers(message.answers[: settings.max_records], kind)
            while name in aliases and name not in values:
                target, alias_ttl = aliases[name]
                if target in seen or len(seen) > settings.max_cnames:
                    raise LookupFailed(f"{name}: CNAMEs loop, or are more than {settings.max_cnames}")
                seen.add(target)
                name, ttl = target, min(ttl, alias_ttl)
            if name in values:
                found, found_ttl = values[name]
                return Answer(values=_ordered(found, kind), ttl=max(min(ttl, found_ttl), settings.min_ttl_seconds))
            if message.rCode == dns.OK and name != fold_name(message.queries[0].name.name):
                continue  # the chain leaves this answer: ask for its end
            lifetime = max(min(ttl, _negative_ttl(message, settings)), settings.min_ttl_seconds)
            if message.rCode == dns.ENAME:
                return Answer(problem=NoSuchName, text=f"{name}: no such domain", ttl=lifetime)
            return Answer(ttl=lifetime)

    async def _query(self, name: str, kind: int) -> dns.Message:
        """The first usable answer (NOERROR or NXDOMAIN) of any server. Raises LookupFailed."""
        if not self._servers:
            self._servers = system_servers()
        trouble = "no server"
        query = dns.Query(name, kind, dns.IN)
        for _ in range(self._settings.tries):
            for server in self._servers:
                try:
                    message = await self._slots.run(self._exchange, server, query)
                except _PASSED_OVER as problem:
                    trouble = str(problem) or type(problem).__name__
                    continue
                if message.rCode in (dns.OK, dns.ENAME):
                    return message
                trouble = _RCODES.get(message.rCode, f"rcode {message.rCode}")
        raise LookupFailed(f"{name}: {trouble}")

    def _exchange(self, server: tuple[str, int], query: dns.Query) -> Deferred[dns.Message]:
        return Deferred.fromCoroutine(self._exchange_once(server, query))

    async def _exchange_once(self, server: tuple[str, int], query: dns.Query) -> dns.Message:
        seconds = self._settings.timeout_seconds
        protocol = _Datagrams(_Silent(), self._reactor)
        port = self._reactor.listenUDP(0, protocol, interface="::" if ":" in server[0] else "")
        try:
            protocol.transport.connect(*server)
            message = await protocol.query(server, [query], seconds)
        except _TROUBLE:
            raise LookupFailed("the name server did not answer") from None
        finally:
            port.stopListening()
        if message.trunc:
            message = await self._exchange_stream(server, query)
        if not message.answer or len(message.queries) != 1 or not _same_question(message.queries[0], query):
            raise LookupFailed("the answer does not fit the question")
        return message

    async def _exchange_stream(self, server: tuple[str, int], query: dns.Query) -> dns.Message:
        seconds = self._settings.timeout_seconds
        endpoint = (TCP6ClientEndpoint if ":" in server[0] else TCP4ClientEndpoint)(
            self._reactor, server[0], server[1], timeout=seconds
        )
        controller = _Silent()
        try:
            stream = await connectProtocol(endpoint, dns.DNSProtocol(controller, self._reactor))
        except Exception as problem:
            raise LookupFailed(f"no TCP connection: {problem}") from problem
        try:
            return await controller.guard(stream.query([query], seconds))
        except _TROUBLE:
            raise LookupFailed("the name server did not answer over TCP") from None
        finally:
            stream.transport.loseConnection()


@frozen
class Answer:
    """What one question brought: values, or the kind of problem; `ttl` seconds to believe it."""

    values: tuple[Any, ...] = ()
    problem: type[Exception] | None = None
    text: str = ""
    ttl: float = field(default=60.0, kw_only=True)


class Cache:
    """Answers by question, at most `limit` (the least recently used goes first), each until its time is up."""

    def __init__(self, limit: int, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        self._entries: LruCache[tuple[str, int], tuple[float, Answer]] = LruCache(limit)

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        self._entries.clear()

    def get(self, key: tuple[str, int]) -> Answer | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        stored, answer = entry
        # `0 <=`: the reactor's clock may be set back, which must not make an answer live longer.
        if not 0 <= self._seconds() - stored < answer.ttl:
            self._entries.drop(key)
            return None
        return answer

    def put(self, key: tuple[str, int], answer: Answer) -> None:
        self._entries.put(key, (self._seconds(), answer))


class _Silent:
    """The controller that names' protocols want: unexpected messages are dropped, a lost stream fails its query."""

    def __init__(self) -> None:
        self._result: Deferred[dns.Message] | None = None

    def guard(self, answer: Deferred[dns.Message]) -> Deferred[dns.Message]:
        result = self._result = Deferred()

        def finish(value: Any) -> None:
            if not result.called:
                result.callback(value)

        answer.addBoth(finish)
        return result

    def messageReceived(self, *_: Any) -> None:
        return None

    def connectionMade(self, protocol: Any) -> None:
        return None

    def connectionLost(self, protocol: Any) -> None:
        if self._result is not None and not self._result.called:
            self._result.errback(Failure(LookupFailed("the server closed the connection")))


class _Datagrams(dns.DNSDatagramProtocol):
    """One query on a connected socket: ICMP's "port unreachable" fails it at once instead of after the time-out."""

    def connectionRefused(self) -> None:
        waiting, self.liveMessages = list(self.liveMessages.values()), {}
        for result, timer in waiting:
            timer.cancel()
            result.errback(Failure(ConnectionRefusedError()))

    def stopProtocol(self) -> None:
        # Where the reactor sees the socket's error before its data, it closes the port without connectionRefused.
        self.connectionRefused()
        super().stopProtocol()


_TROUBLE: tuple[type[Exception], ...] = (dns.DNSQueryTimeoutError, ConnectionRefusedError)
_PASSED_OVER: tuple[type[Exception], ...] = (LookupFailed, OSError, *_TROUBLE)
_RCODES = {dns.EFORMAT: "FORMERR", dns.ESERVER: "SERVFAIL", dns.ENOTIMP: "NOTIMP", dns.EREFUSED: "REFUSED"}


def _same_question(one: dns.Query, other: dns.Query) -> bool:
    return (fold_name(one.name.name), one.type, one.cls) == (fold_name(other.name.name), other.type, other.cls)


def _sort_answers(
    records: Iterable[dns.RRHeader], kind: int
) -> tuple[dict[str, tuple[str, float]], dict[str, tuple[list[Any], float]]]:
    """CNAMEs by owner, and values of the wanted kind by owner, each with its least TTL."""
    aliases: dict[str, tuple[str, float]] = {}
    values: dict[str, tuple[list[Any], float]] = {}
    for record in records:
        if record.cls != dns.IN or record.payload is None:
            continue
        owner = fold_name(record.name.name)
        if record.type == kind:
            found, ttl = values.get(owner, ([], float("inf")))
            found.append(_value(record.payload, kind))
            values[owner] = (found, min(ttl, record.ttl))
        elif record.type == dns.CNAME:
            alias: Any = record.payload
            aliases.setdefault(owner, (fold_name(alias.name.name), record.ttl))
    return aliases, values


def _value(payload: Any, kind: int) -> Any:
    if kind == dns.MX:
        return (payload.preference, fold_name(payload.name.name))
    return str(ipaddress.ip_address(payload.address))


def _ordered(values: list[Any], kind: int) -> tuple[Any, ...]:
    unique = dict.fromkeys(values)
    return tuple(sorted(unique)) if kind == dns.MX else tuple(unique)


def _negative_ttl(message: dns.Message, settings: ResolverSettings) -> float:
    """How long "there is none" holds: the SOA's lesser number (RFC 2308 §5), bounded."""
    for record in message.authority:
        soa: Any = record.payload
        if record.type == dns.SOA and soa is not None:
            return float(min(record.ttl, soa.minimum, settings.max_negative_ttl_seconds))
    return settings.min_ttl_seconds


def _in_turns(families: list[tuple[str, ...]]) -> tuple[str, ...]:
    """a1 b1 a2 b2 ...: so that a bound on addresses never cuts off one family."""
    longest = max(map(len, families), default=0)
    return tuple(family[at] for at in range(longest) for family in families if at < len(family))
