# SPDX-License-Identifier: MIT
"""Everything that a client meets, made and joined for all listeners: gate and proxies, places and limits, the factories.

Guarantees: the listeners of one protocol share its places, and all of them the limits of clients, over all workers; nothing
is opened here, so that what it needs (databases, a portal) may be started before the first client comes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from attrs import evolve
from twisted.logger import Logger

from polarismail.config import Config
from polarismail.inheritance import Place
from polarismail.net.accepting import Porch
from polarismail.net.descriptors import make_room_for
from polarismail.net.dnsbl import DnsLists
from polarismail.net.gate import Gate
from polarismail.net.limits import ConnectionCounter
from polarismail.net.listener_counter import ListenerCounter
from polarismail.net.listeners import NO_LIMITS, Listener, StrangersOnly
from polarismail.net.proxying import ProxyPorch
from polarismail.net.resolver import Resolver
from polarismail.net.shares import Shares
from polarismail.net.shares import alone as shares_alone
from polarismail.net.stress import Stress
from polarismail.net.tls import CertificateStore, Speaking
from polarismail.policy.gatekeeper import Gatekeeper
from polarismail.policy.limits import ClientLimits
from polarismail.serve.pop3 import Pop3Factory
from polarismail.serve.smtp_context import SessionSettings
from polarismail.store.database import Database
from polarismail.store.known_clients import KnownClients
from polarismail.values.events import RecordEvent
from polarismail.wire.smtp_states import ServerSettings, submission_settings


class Entrance:
    """The side of one server that faces clients. `known` and `stress` are to be started by whoever made it."""

    log = Logger()

    def __init__(
        self,
        config: Config,
        *,
        reactor: Any,
        now: Callable[[], float],
        record_event: RecordEvent,
        portal: Any,
        certificates: CertificateStore | None,
        counters: Database,
        place: Place | None = None,
        shares: Shares | None = None,
    ) -> None:
        """`counters`: where known clients are kept. `place` and `shares`: where this is one of several workers."""
        self.config, self._reactor, self._now = config, reactor, now
        self._record_event, self._portal, self._certificates = record_event, portal, certificates
        self._shares, self._workers = shares, 1 if place is None else place.workers
        self.limits = ClientLimits(
            config.limits, shares or shares_alone(), now=time.monotonic, record_event=record_event
        )
        self._counters = {name: self._counter(name) for name in ("smtp", "pop3")}
        self.stress = {
            name: Stress(reactor, counter, config.stress, record_event, name)
            for name, counter in self._counters.items()
        }
        self.known = KnownClients(counters, reactor, config.gate.known, now=now)
        self._keeper = self._make_gatekeeper()
        self._places_of_one()  # the gate looks at how many descriptors there are
        self._gate = Gate(
            reactor,
            self._keeper,
            config.gate.wait,
            record_event=record_event,
            is_stressed=self.stress["smtp"].is_stressed,
        )
        self._keeper.let_in = self._gate.let_in
        self._factories: list[Any] = []
        self._proxy_porches: list[ProxyPorch] = []

    # -- for listeners -----------------------------------------------------------------------------------------------

    def factory(self, listener: Listener) -> Any:
        """What to serve a listener with."""
        made = self._pop3(listener) if listener.protocol == "pop3" else self._smtp(listener)
        self._factories.append(made)
        return made if listener.tls != "implicit" else self._inside_tls(made, listener.protocol)

    def porches(self, listener: Listener) -> list[Porch]:
        """What its connections go through before they cost anything: who they are comes first."""
        porches: list[Porch] = []
        if listener.proxy_networks:
            proxies = ProxyPorch(self._reactor, listener, self.config.proxy, self._record_event)
            self._proxy_porches.append(proxies)
            porches.append(proxies)
        # Behind implicit TLS the client speaks first, and elsewhere it logs in.
        if listener.role == "mx" and listener.tls != "implicit":
            own = listener.relay_networks + listener.proxy_networks + listener.xclient_networks
            porches.append(StrangersOnly(self._gate, own) if own else self._gate)
        return porches

    def stop_porches(self) -> None:
        """Listeners are closed: what has not become a session yet ends, told so where it can be."""
        for each in self._proxy_porches:
            each.stop()
        self._gate.stop()

    # -- sessions ----------------------------------------------------------------------------------------------------

    @property
    def sessions(self) -> int:
        """Connections that are open now, over all listeners."""
        return sum(counter.total for counter in self._counters.values())

    def shut_down_sessions(self) -> None:
        """Tell every client that waits for nothing to come back later; the others after their reply."""
        for factory in self._factories:
            factory.shut_down()

    def drop_sessions(self) -> None:
        """Cut what is still open. The sessions put away what they hold in the reactor's next turn."""
        for factory in self._factories:
            for connection in list(factory.connections):
                connection.transport.abortConnection()

    # -- places ------------------------------------------------------------------------------------------------------

    def find_places(self) -> None:
        """As many as the configuration says, or as descriptors allow."""
        total = self.config.connections.total
        places = self._places_of_one() * self._workers
        if places < total:
            self.log.warn(
                "descriptors allow {places} of the {total} sessions of connections.total: raise LimitNOFILE (ulimit -n)",
                places=places, total=total,
            )  # fmt: skip
        for counter in self._counters.values():
            counter.ceiling = places

    def close_door(self, closed: bool) -> None:
        """Memory is short: newcomers are turned away while `closed`."""
        for counter in self._counters.values():
            counter.full_of_memory = closed

    def relieve(self) -> None:
        """Let go of clients that have kept us waiting even too long for stress."""
        for stress in self.stress.values():
            stress.relieve()

    def describe_gate(self) -> dict[str, Any]:
        """For `polarismail status`."""
        return self._gate.statistics() | self._keeper.statistics()

    # -- reload ------------------------------------------------------------------------------------------------------

    def reconfigure(self, config: Config) -> None:
        """Take what may change while running."""
        self.config = config
        self.limits.change_settings(config.limits)
        for counter in self._counters.values():
            counter.limits, counter.trusted = config.connections, self.limits.trusted
        self.find_places()
        for stress in self.stress.values():
            stress.reconfigure(config.stress)
        self._gate.settings = config.gate.wait
        self._keeper.reconfigure(config.gate)
        for porch in self._proxy_porches:
            porch.settings = config.proxy
        for made in self._factories:
            listener = made.context.listener
            if listener.protocol == "pop3":
                made.reconfigure(config.pop3.engine, config.pop3.session, config.transport)
            else:
                made.reconfigure(self._engine_settings(listener), self._session_settings(listener), config.transport)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _places_of_one(self) -> int:
        wait = self.config.gate.wait
        return make_room_for(self.config.connections.total, wait.max_waiting if wait.enabled else 0)

    def _counter(self, protocol: str) -> ConnectionCounter:
        shared = None if self._shares is None else self._shares.counting(protocol)
        counter = ConnectionCounter(self.config.connections, shared)
        counter.trusted, counter.may_connect = self.limits.trusted, self.limits.may_connect
        return counter

    def _counter_of(self, listener: Listener) -> Any:
        counter = self._counters[listener.protocol]
        if listener.limits == NO_LIMITS and not listener.proxy_networks:
            return counter
        shared = None if self._shares is None else self._shares.counting(listener.protocol)
        return ListenerCounter(listener, counter, shared)

    def _make_gatekeeper(self) -> Gatekeeper:
        settings = self.config.gate
        # A resolver of its own, so that a flood of clients takes neither places nor answers from mail that goes out; and one
        # that gives up when its answers would come too late.
        patience = min(self.config.dns.timeout_seconds, max(settings.wait.wait_seconds, 1.0))
        resolver = Resolver(
            self._reactor, evolve(self.config.dns, timeout_seconds=patience, tries=1, cache_entries=1000)
        )
        lists = DnsLists(resolver.ipv4_addresses, self._reactor, settings.dns)
        return Gatekeeper(self.known, lists, settings, now=self._now)

    def _smtp(self, listener: Listener) -> Any:
        # Imported here: its contract installs the global reactor, and a service with a reactor of its own comes first.
        from polarismail.serve.smtp import ESMTPFactory

        return ESMTPFactory(
            self._portal,
            listener=listener,
            hostname=self.config.hostname,
            reactor=self._reactor,
            tls_options=self._tls_options("smtp"),
            record_event=self._record_event,
            settings=self._engine_settings(listener),
            session_settings=self._session_settings(listener),
            transport_settings=self.config.transport,
            counter=self._counter_of(listener),
            limits=self.limits,
        )

    def _engine_settings(self, listener: Listener) -> ServerSettings:
        settings = evolve(
            self.config.smtp,
            hostname=self.config.hostname,
            offers=listener.extensions,
            max_hold_seconds=self.config.reception.wishes.max_hold_seconds,
            lmtp=listener.role == "lmtp",
            **listener.limits.over(self.config.smtp),
        )
        if listener.role != "submission":
            return settings
        strict = submission_settings()
        return evolve(
            settings,
            require_auth=strict.require_auth,
            bare_line_ends=strict.bare_line_ends,
            max_text_line_octets=strict.max_text_line_octets,
        )

    def _session_settings(self, listener: Listener) -> SessionSettings:
        settings = self.config.session
        return evolve(settings, **listener.limits.over(settings))

    def _pop3(self, listener: Listener) -> Any:
        return Pop3Factory(
            self._portal,
            listener=listener,
            hostname=self.config.hostname,
            reactor=self._reactor,
            tls_options=self._tls_options("pop3"),
            record_event=self._record_event,
            settings=self.config.pop3.engine,
            session_settings=self.config.pop3.session,
            transport_settings=self.config.transport,
            counter=self._counter_of(listener),
            limits=self.limits,
        )

    def _inside_tls(self, factory: Any, protocol: str) -> Any:
        from twisted.protocols.tls import TLSMemoryBIOFactory

        assert self._certificates is not None  # the service reads one wherever a listener has TLS
        return TLSMemoryBIOFactory(self._certificates.speaking(protocol), False, factory)

    def _tls_options(self, protocol: str) -> Callable[[], Speaking | None]:
        options = None if self._certificates is None else self._certificates.speaking(protocol)
        return lambda: options if options is not None and options.ready else None
