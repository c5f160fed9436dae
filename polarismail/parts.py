# SPDX-License-Identifier: MIT
"""The parts of one server, made and joined, started left to right and stopped right to left.

Everything that another process, a file or the network could hold up is started here and awaited, so that a listener is
served only when all of it works. What clients meet is joined in entrance.py.
"""

from __future__ import annotations

import os
import socket
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
from polarismail.entrance import Entrance
from polarismail.fellows import Fellows
from polarismail.headroom import Headroom
from polarismail.inheritance import Place
from polarismail.lag import LagGauge
from polarismail.memory import Relief
from polarismail.net.resolver import Resolver
from polarismail.net.shares import Shares
from polarismail.net.tls import CertificateStore
from polarismail.relay.bounces import Bounces
from polarismail.relay.greylisting import Greylist
from polarismail.relay.local import LocalDelivery
from polarismail.relay.manager import RelayManager
from polarismail.relay.settings import RelaySettings
from polarismail.serve.maildrop_door import MaildropDoors
from polarismail.serve.reception import Desk, Reception
from polarismail.store.database import COUNTERS, Database
from polarismail.store.directory import Directory
from polarismail.store.space import Space
from polarismail.store.spool import Spool
from polarismail.telemetry import EventLog


class Parts:
    """Made with nothing opened; `start` opens, `entrance` serves, `stop` ends. One instance is one server."""

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
        self._own_endpoints, self.certificates = own_endpoints, certificates
        record_event = telemetry.record_event
        self.lag = LagGauge(reactor, record_event)
        self.relief = Relief(reactor, lambda: self.entrance.sessions)
        self.database = Database(config.database_url, reactor=reactor, lock_path=config.lock_path)
        self.counters = Database(config.counters_url, reactor=reactor, branch=COUNTERS)
        self.spool = Spool(self.database, config.paths.spool, reactor, config.spool, now=now)
        self.directory = Directory(self.database, reactor, config.directory)
        self.greylist = Greylist(self.counters, reactor, config.greylisting, now=now)
        self.passwords = Passwords(reactor, config.auth.passwords)
        self.resolver = Resolver(reactor, config.dns)
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
        self.entrance = Entrance(
            config,
            reactor=reactor,
            now=now,
            record_event=record_event,
            portal=self.portal,
            certificates=certificates,
            counters=self.counters,
            place=place,
            shares=shares,
        )
        self.headroom = Headroom(
            reactor,
            config.memory,
            1 if place is None else place.workers,
            record_event,
            self.entrance.close_door,
            (logins.clear, self.directory.clear_caches, self.greylist.clear_cache, self.resolver.forget),
            self.entrance.relieve,
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
            stress=self.entrance.stress,
            space=self.space,
            headroom=self.headroom,
            describe_gate=self.entrance.describe_gate,
            now=now,
        )
        inherited = None if place is None else socket.socket(fileno=place.control)
        self.control_server = ControlServer(
            self.control, config.paths.control_socket, reactor, config.control, inherited
        )
        self._started: list[Any] = []

    # -- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open databases, spool and threads; begin to relay. What was started is stopped again when one part fails."""
        order: tuple[Any, ...] = (
            self.database,
            self.counters,
            self.entrance.known,
            self.spool,
            self.passwords,
            self.directory,
            self.manager,
            *((self.fellows,) if self.fellows is not None else ()),
            self.space,
            self.control_server,
            self.lag,
            *self.entrance.stress.values(),
            self.headroom,
            self.relief,
        )
        self.entrance.find_places()
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

    # -- reload ------------------------------------------------------------------------------------------------------

    def reconfigure(self, config: Config) -> None:
        """Take what may change while running; new connections and new attempts see it."""
        self.desk.settings = config.reception
        self.entrance.reconfigure(config)
        self.headroom.reconfigure(config.memory)
        self.space.reconfigure(config.space, config.smtp.max_message_octets)
        self.greylist.reconfigure(config.greylisting)
        self.manager.reconfigure(self._relay_settings(config))

    def _relay_settings(self, config: Config) -> RelaySettings:
        """The relay's settings with what is said elsewhere: where we listen, so that no MX loops to us."""
        return evolve(
            config.relay,
            routing=evolve(config.relay.routing, own_endpoints=self._own_endpoints),
            client=evolve(config.relay.client, max_recipients=config.relay.recipients_per_transaction),
            local_batch=config.local.batch,
            large_octets=config.local.small_octets,
        )
