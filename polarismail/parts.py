# SPDX-License-Identifier: MIT
"""The parts of one server, made and joined, started left to right and stopped right to left.

Everything that another process, a file or the network could hold up is started here and awaited, so that a listener is
served only when all of it works.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import Any

from attrs import evolve
from twisted.internet.defer import maybeDeferred
from twisted.logger import Logger

from polarismail.auth.logins import VerifiedLogins
from polarismail.auth.passwords import Passwords
from polarismail.auth.portal import build_portal
from polarismail.channel import Channel
from polarismail.config import Config
from polarismail.control import Control
from polarismail.control_socket import ControlServer
from polarismail.fellows import Fellows
from polarismail.headroom import Headroom
from polarismail.inheritance import Place
from polarismail.lag import LagGauge
from polarismail.memory import Relief
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
from polarismail.relay.bounces import Bounces
from polarismail.relay.greylisting import Greylist
from polarismail.relay.local import LocalDelivery
from polarismail.relay.manager import RelayManager
from polarismail.relay.settings import RelaySettings
from polarismail.serve.maildrop_door import MaildropDoors
from polarismail.serve.pop3 import Pop3Factory
from polarismail.serve.reception import Desk, Reception
from polarismail.serve.smtp_context import SessionSettings
from polarismail.store.database import COUNTERS, Database
from polarismail.store.directory import Directory
from polarismail.store.known_clients import KnownClients
from polarismail.store.space import Space
from polarismail.store.spool import Spool
from polarismail.telemetry import EventLog
from polarismail.wire.smtp_states import ServerSettings, submission_settings


class Parts:
    """Made with nothing opened; `start` opens, `factory` serves, `stop` ends. One instance is one server."""

    log = Logger()

    def __init__(
        self,
        config: Config,
        *,
        reactor: Any,
        now: Callable[[], float],
        telemetry: EventLog,
        certificates: CertificateStore | None,
        random: Any,
        place: Place | None = None,
        shares: Shares | None = None,
        channel: Channel | None = None,
        own_endpoints: frozenset[tuple[str, int]] = frozenset(),
    ) -> None:
        """`place`, `shares` and `channel`: where this is one of several workers. `own_endpoints`: where SMTP is answered, as
        the sockets themselves say."""
        self.config, self._reactor, self._now = config, reactor, now
        self._own_endpoints = own_endpoints
        self._telemetry, self.certificates = telemetry, certificates
        record_event = telemetry.record_event
        self.lag = LagGauge(reactor, record_event)
        self.relief = Relief(reactor, lambda: self.sessions)
        self.database = Database(config.database_url, reactor=reactor, lock_path=config.lock_path)
        self.counters = Database(config.counters_url, reactor=reactor, branch=COUNTERS)
        self.spool = Spool(self.database, config.paths.spool, reactor, config.spool, now=now)
        self.directory = Directory(self.database, reactor, config.directory)
        self.greylist = Greylist(self.counters, reactor, config.greylisting, now=now)
        self.passwords = Passwords(reactor, config.auth.passwords)
        self.resolver = Resolver(reactor, config.dns)
        self.gatekeeper = self._make_gatekeeper()
        self._places_of_one()  # the gate looks at how many descriptors there are
        self.gate = Gate(
            reactor,
            self.gatekeeper,
            config.gate.wait,
            record_event=record_event,
            is_stressed=lambda: self.stress["smtp"].is_stressed(),
        )
        self.gatekeeper.let_in = self.gate.let_in
        self.local = LocalDelivery(
            reactor,
            self.spool.read,
            self.directory,
            config.local,
            hostname=config.hostname,
            mail_root=config.paths.mail,
            find_form=self.spool.maildir_form,
            record_event=record_event,
            now=now,
        )
        self.fellows: Fellows | None = None
        if place is not None and channel is not None and shares is not None:
            self.fellows = Fellows(
                reactor, place, channel, shares, directory=os.path.join(config.paths.state, "bus"), parts=self
            )
        bounces = Bounces(self.spool, self.directory, hostname=config.hostname, now=now)
        self.manager = RelayManager(
            reactor,
            self.spool,
            self.resolver,
            self.local,
            self._relay_settings(config),
            hostname=config.hostname,
            compose=bounces.compose,
            record_event=record_event,
            now=now,
            random=random,
            greylist=self.greylist,
            bus=None if self.fellows is None else self.fellows.bus,
            connection_limit=None if self.fellows is None else self.fellows.connection_limit,
        )
        paths = {"spool": config.paths.spool, "state": config.paths.state, "mail": config.paths.mail}
        self.space = Space(reactor, paths, config.space, config.smtp.max_message_octets, record_event)
        self.desk = Desk(
            hostname=config.hostname,
            spool=self.spool,
            directory=self.directory,
            accepted=self.manager.accepted,
            record_event=record_event,
            now=now,
            check_greylist=self.greylist.check,
            space=self.space,
            settings=config.reception,
        )
        self.doors = MaildropDoors(reactor, config.paths.mail, config.pop3.maildrop, config.pop3.door)
        logins = VerifiedLogins(config.auth.logins)
        self.portal = build_portal(
            self.directory,
            self.passwords,
            logins,
            lambda account, mind: Reception(self.desk, account),
            self.doors.door,
        )
        self.control = Control(
            database=self.database,
            spool=self.spool,
            directory=self.directory,
            passwords=self.passwords,
            config=config,
            telemetry=telemetry,
            greylist=self.greylist,
            manager=self.manager,
            fellows=self.fellows,
            lag=self.lag,
            describe_gate=lambda: self.gate.statistics() | self.gatekeeper.statistics(),
            now=now,
        )
        inherited = None if place is None else socket.socket(fileno=place.control)
        self.control_server = ControlServer(
            self.control, config.paths.control_socket, reactor, config.control, inherited
        )
        self.limits = ClientLimits(
            config.limits, shares or shares_alone(), now=time.monotonic, record_event=record_event
        )
        self._counters = {name: self._counter(name) for name in ("smtp", "pop3")}
        self.stress = {
            name: Stress(reactor, counter, config.stress, record_event, name)
            for name, counter in self._counters.items()
        }
        self.headroom = Headroom(
            reactor,
            config.memory,
            self._workers,
            record_event,
            self._close_door,
            (logins.clear, self.directory.clear_caches, self.greylist.clear_cache, self.resolver.forget),
            self._relieve,
        )
        self.control.stress, self.control.space, self.control.headroom = self.stress, self.space, self.headroom
        self._factories: list[Any] = []
        self._proxy_porches: list[ProxyPorch] = []
        self._started: list[Any] = []

    def _counter(self, protocol: str) -> ConnectionCounter:
        shared = None if self.fellows is None else self.fellows.shares.counting(protocol)
        counter = ConnectionCounter(self.config.connections, shared)
        counter.trusted, counter.may_connect = self.limits.trusted, self.limits.may_connect
        return counter

    @property
    def _workers(self) -> int:
        return 1 if self.fellows is None else self.fellows.place.workers

    def _close_door(self, closed: bool) -> None:
        for counter in self._counters.values():
            counter.full_of_memory = closed

    def _relieve(self) -> None:
        for stress in self.stress.values():
            stress.relieve()

    def _places_of_one(self) -> int:
        wait = self.config.gate.wait
        return make_room_for(self.config.connections.total, wait.max_waiting if wait.enabled else 0)

    def _find_places(self) -> None:
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

    def _counter_of(self, listener: Listener) -> Any:
        counter = self._counters[listener.protocol]
        if listener.limits == NO_LIMITS and not listener.proxy_networks:
            return counter
        shared = None if self.fellows is None else self.fellows.shares.counting(listener.protocol)
        return ListenerCounter(listener, counter, shared)

    def _make_gatekeeper(self) -> Gatekeeper:
        settings = self.config.gate
        # A resolver of its own, so that a flood of clients takes neither places nor answers from mail that goes out; and one
        # that gives up when its answers would come too late.
        patience = min(self.config.dns.timeout_seconds, max(settings.wait.wait_seconds, 1.0))
        resolver = Resolver(
            self._reactor, evolve(self.config.dns, timeout_seconds=patience, tries=1, cache_entries=1000)
        )
        known = KnownClients(self.counters, self._reactor, settings.known, now=self._now)
        lists = DnsLists(resolver.ipv4_addresses, self._reactor, settings.dns)
        return Gatekeeper(known, lists, settings, now=self._now)

    # -- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open databases, spool and threads; begin to relay. What was started is stopped again when one part fails."""
        order: tuple[Any, ...] = (
            self.database,
            self.counters,
            self.gatekeeper.known,
            self.spool,
            self.passwords,
            self.directory,
            self.manager,
            *((self.fellows,) if self.fellows is not None else ()),
            self.space,
            self.control_server,
            self.lag,
            *self.stress.values(),
            self.headroom,
            self.relief,
        )
        self._find_places()
        try:
            for part in order:
                await maybeDeferred(getattr(part, "startService", None) or part.start)
                self._started.append(part)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop what was started, last first. A part that fails to stop is logged and the rest goes on."""
        while self._started:
            part = self._started.pop()
            try:
                await maybeDeferred(getattr(part, "stopService", None) or part.stop)
                if part is self.manager:
                    await self.local.stop()
                    self.doors.stop()
            except Exception:
                self.log.failure("{part} did not stop", part=type(part).__name__)

    # -- serving -----------------------------------------------------------------------------------------------------

    def factory(self, listener: Listener) -> Any:
        """What to serve a listener with."""
        made = self._pop3(listener) if listener.protocol == "pop3" else self._smtp(listener)
        self._factories.append(made)
        return made if listener.tls != "implicit" else self._inside_tls(made, listener.protocol)

    def porches(self, listener: Listener) -> list[Porch]:
        """What its connections go through before they cost anything: who they are comes first."""
        porches: list[Porch] = []
        if listener.proxy_networks:
            proxies = ProxyPorch(self._reactor, listener, self.config.proxy, self._telemetry.record_event)
            self._proxy_porches.append(proxies)
            porches.append(proxies)
        # Behind implicit TLS the client speaks first, and elsewhere it logs in.
        if listener.role == "mx" and listener.tls != "implicit":
            own = listener.relay_networks + listener.proxy_networks + listener.xclient_networks
            porches.append(StrangersOnly(self.gate, own) if own else self.gate)
        return porches

    def stop_porches(self) -> None:
        """Listeners are closed: what has not become a session yet ends, told so where it can be."""
        for each in self._proxy_porches:
            each.stop()
        self.gate.stop()

    def _smtp(self, listener: Listener) -> Any:
        # Imported here: its contract installs the global reactor, and a service with a reactor of its own comes first.
        from polarismail.serve.smtp import ESMTPFactory

        return ESMTPFactory(
            self.portal,
            listener=listener,
            hostname=self.config.hostname,
            reactor=self._reactor,
            tls_options=self._tls_options("smtp"),
            record_event=self._telemetry.record_event,
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
            self.portal,
            listener=listener,
            hostname=self.config.hostname,
            reactor=self._reactor,
            tls_options=self._tls_options("pop3"),
            record_event=self._telemetry.record_event,
            settings=self.config.pop3.engine,
            session_settings=self.config.pop3.session,
            transport_settings=self.config.transport,
            counter=self._counter_of(listener),
            limits=self.limits,
        )

    def _inside_tls(self, factory: Any, protocol: str) -> Any:
        from twisted.protocols.tls import TLSMemoryBIOFactory

        assert self.certificates is not None  # the service reads one wherever a listener has TLS
        return TLSMemoryBIOFactory(self.certificates.speaking(protocol), False, factory)

    def _tls_options(self, protocol: str) -> Callable[[], Speaking | None]:
        options = None if self.certificates is None else self.certificates.speaking(protocol)
        return lambda: options if options is not None and options.ready else None

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

    # -- reload ------------------------------------------------------------------------------------------------------

    def reconfigure(self, config: Config) -> None:
        """Take what may change while running; new connections and new attempts see it."""
        self.config = config
        self.desk.settings = config.reception
        self.limits.change_settings(config.limits)
        for counter in self._counters.values():
            counter.limits, counter.trusted = config.connections, self.limits.trusted
        self._find_places()
        self.headroom.reconfigure(config.memory)
        self.space.reconfigure(config.space, config.smtp.max_message_octets)
        for stress in self.stress.values():
            stress.reconfigure(config.stress)
        self.gate.settings = config.gate.wait
        self.gatekeeper.reconfigure(config.gate)
        self.greylist.reconfigure(config.greylisting)
        self.manager.reconfigure(self._relay_settings(config))
        for porch in self._proxy_porches:
            porch.settings = config.proxy
        for made in self._factories:
            listener = made.context.listener
            if listener.protocol == "pop3":
                made.reconfigure(config.pop3.engine, config.pop3.session, config.transport)
            else:
                made.reconfigure(self._engine_settings(listener), self._session_settings(listener), config.transport)

    def _relay_settings(self, config: Config) -> RelaySettings:
        """The relay's settings with what is said elsewhere: where we listen, so that no MX loops to us."""
        return evolve(
            config.relay,
            routing=evolve(config.relay.routing, own_endpoints=self._own_endpoints),
            client=evolve(config.relay.client, max_recipients=config.relay.recipients_per_transaction),
            local_batch=config.local.batch,
            large_octets=config.local.small_octets,
        )
