# SPDX-License-Identifier: MIT
"""The composition root: chooses every part of the server, starts them in order, and stops them so that nothing is lost.

`makeService` opens nothing. Sockets are bound and the certificate is read while the process may still be root; databases,
spool and log are opened after privileges were dropped; clients are served when all of it is open. At the end listeners go
first, sessions finish or are told 421, then relay and store.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList, ensureDeferred, maybeDeferred
from twisted.internet.task import deferLater

from polarismail import __version__, memory, reloading
from polarismail.channel import Channel
from polarismail.config import Config
from polarismail.inheritance import Inheritance, Prepared
from polarismail.net import binding, listeners
from polarismail.net.polling import poll_plainly
from polarismail.net.shares import Shares
from polarismail.options import Options
from polarismail.parts import Parts
from polarismail.top_service import TopService
from polarismail.values.errors import ConfigError, PolarisError
from polarismail.workers import Supervisor

_LOOK_AGAIN_SECONDS = 0.1


def makeService(options: Options) -> Service:
    """What `twistd polarismail` runs: a server, or with `workers` the supervisor of several. Opens nothing, binds nothing."""
    parent: Any = getattr(options, "parent", None) or {}
    given: dict[str, Any] = {
        "clock_offset_seconds": options["clock-offset"],
        "uid": parent.get("uid"),
        "gid": parent.get("gid"),
    }
    config = options.configuration
    if config.workers == 1:
        return MailService(config, options["config"], **given)
    return Supervisor(config, options["config"], options.text, **given)


class MailService(TopService):
    """A complete mail server on one reactor; with `inheritance`, one of several that a supervisor looks after."""

    def __init__(
        self, config: Config, config_path: str, *, inheritance: Inheritance | None = None, **given: Any
    ) -> None:
        """`given`: what TopService takes."""
        super().__init__(config, config_path, **given)
        self._inheritance = inheritance
        self._channel: Channel | None = None
        self._ports: list[Any] = []
        self._starting = False
        self.parts: Parts | None = None

    # -- start -------------------------------------------------------------------------------------------------------

    def _prepare(self) -> Prepared:
        return super()._prepare() if self._inheritance is None else self._inheritance.prepared(self.config)

    def startService(self) -> None:
        """Open everything as the user that the service is now, then serve. A failure ends the process with status 1."""
        super().startService()
        self._starting = True
        if self._inheritance is None:
            self._install_signals(self.reload, self.telemetry.reopen)
        else:
            self._channel = Channel(self.reactor, self._inheritance.place.channel)
        ensureDeferred(self._start()).addErrback(self._failed_to_start).addBoth(self._start_ended)

    async def _start(self) -> None:
        self._open_log(warns=self._inheritance is None)  # of several, the supervisor says it
        place = self._inheritance.place if self._inheritance is not None else None
        assert self._prepared is not None
        shares = None if place is None else Shares(place.shares, place.workers, place.number)
        self.parts = Parts(
            self.config,
            reactor=self.reactor,
            now=self.now,
            telemetry=self.telemetry,
            certificates=self._prepared.certificates,
            random=random.Random(),
            place=place,
            shares=shares,
            channel=self._channel,
            own_endpoints=binding.endpoints(
                [
                    each
                    for listener in self.config.listeners
                    if listener.protocol == "smtp"
                    for each in self._prepared.bound[listener.name]
                ]
            ),
        )
        await self.parts.start()
        if self._stopping:
            return  # told to stop meanwhile: nobody is served, and `_stop`, which waits for this, closes everything
        for listener in self.config.listeners:
            bound, factory = self._prepared.bound.pop(listener.name), self.parts.entrance.factory(listener)
            self._ports += listeners.serve(self.reactor, bound, factory, shares, self.parts.entrance.porches(listener))
        poll_plainly(self.reactor)
        memory.settle()
        fields: dict[str, Any] = {"version": __version__, "pid": os.getpid(), "hostname": self.config.hostname}
        if place is not None:
            fields["worker"] = place.number
        self.telemetry.record_event("started", fields)
        self._starting = False
        if self._channel is not None:
            self._obey(self._channel)
            if self._inheritance is not None and self._inheritance.newer is not None:
                self.reload(self._inheritance.newer)

    def _obey(self, channel: Channel) -> None:
        """The supervisor's words that are for the whole server; when it is gone, so are we."""
        assert self.parts is not None
        channel.subscribe("reload", lambda text, pem: self.reload(text, pem))
        channel.subscribe("reopen", self.telemetry.reopen)
        channel.subscribe("stop", self.reactor.stop)
        channel.when_lost(self._supervisor_gone)
        channel.say("ready", incarnation=self.parts.database.incarnation)

    def _supervisor_gone(self) -> None:
        if not self._stopping:
            self.log.error("the supervisor has gone: this worker stops")
            self.reactor.stop()

    def _failed_to_start(self, failure: Any) -> None:
        if failure.check(PolarisError, OSError) is not None:
            self.log.critical("polarismail cannot start: {problem}", problem=failure.getErrorMessage())
        else:
            self.log.failure("polarismail cannot start", failure)
        if self._channel is not None:
            self._channel.say("failed", problem=failure.getErrorMessage())
        self._end_in_failure()

    def _start_ended(self, _: None) -> None:
        self._starting = False

    # -- stop --------------------------------------------------------------------------------------------------------

    def stopService(self) -> Deferred[None]:
        """Stop listening, let transactions finish (at most `drain_seconds`), give back what is claimed, close. Never fails."""
        super().stopService()
        self._stopping = True
        return ensureDeferred(self._stop())

    async def _stop(self) -> None:
        # A start that is under way comes to its end first: parts are not stopped while others are still started.
        await self._wait_while(lambda: self._starting, self.config.transport.drain_seconds)
        await DeferredList([maybeDeferred(port.stopListening) for port in self._ports], consumeErrors=True)
        self._ports.clear()
        if self._prepared is not None:
            self._prepared.close()
        parts = self.parts
        if parts is not None and self._inheritance is not None:
            parts.control_server.stop()  # others answer there, or a new server wants the place
        if parts is not None:
            try:
                parts.entrance.stop_porches()
                parts.entrance.shut_down_sessions()
                await self._wait_while(lambda: parts.entrance.sessions, self.config.transport.drain_seconds)
                parts.entrance.drop_sessions()
                await self._wait_while(lambda: parts.entrance.sessions, 1.0)
            except Exception:
                self.log.failure("sessions did not end as they should")
            await parts.stop()
        self._close_log()

    async def _wait_while(self, condition: Callable[[], Any], seconds: float) -> None:
        until = time.monotonic() + seconds
        while condition() and time.monotonic() < until:
            await deferLater(self.reactor, _LOOK_AGAIN_SECONDS)

    # -- reload ------------------------------------------------------------------------------------------------------

    def reload(self, text: str | None = None, pem: list[str] | None = None) -> str:
        """SIGHUP: reopen the log, read configuration and certificate again. Returns "" or what kept the old ones in force:
        either everything that can change does, or nothing.

        What was read applies to new connections and new attempts. What needs a restart stays as it was, and the log says
        where the file differs. `text` and `pem`: what the supervisor has read.
        """
        self.telemetry.reopen()
        parts = self.parts
        try:
            if parts is None or self._starting:
                raise ConfigError(f"{self.config_path}: not read: the server is still starting")
            fresh = reloading.read_again(self.config, self.config_path, text)
            kept = reloading.renew_certificate(parts.certificates, fresh.config, self.config, pem)
        except Exception as problem:
            if not isinstance(problem, ConfigError):
                self.log.failure("the configuration could not be read again")
            if self._channel is not None:
                self._channel.say("reloaded", problem=str(problem))
            else:
                self.telemetry.record_event("reload-failed", {"path": self.config_path, "problem": str(problem)})
            return str(problem)
        parts.reconfigure(fresh.config)
        self.config = fresh.config
        if self._channel is not None:
            self._channel.say("reloaded", problem="")
        else:
            self.telemetry.record_event("reloaded", fresh.describe(self.config_path, kept))
        return ""
