# SPDX-License-Identifier: MIT
"""The composition root: chooses every part of the server, starts them in order, and stops them so that nothing is lost.

`makeService` opens nothing. Sockets are bound and the certificate is read while the process may still be root; databases,
spool and log are opened after privileges were dropped; clients are served when all of it is open. At the end listeners go
first, sessions finish or are told 421, then relay and store.
"""

from __future__ import annotations

import importlib
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

from attrs import evolve
from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList, ensureDeferred, maybeDeferred
from twisted.internet.task import deferLater
from twisted.logger import Logger, globalLogPublisher

from polarismail import __version__, memory
from polarismail.config import Config, load
from polarismail.net import listeners
from polarismail.net.polling import poll_plainly
from polarismail.net.tls import CertificateStore
from polarismail.options import Options
from polarismail.parts import Parts
from polarismail.privileges import check_dropped, forbid_new_privileges, make_directory
from polarismail.telemetry import EventLog
from polarismail.values.errors import ConfigError, PolarisError

_IMPORTED_LATE = (
    "alembic.command",
    "alembic.runtime.migration",
    "argon2.low_level",
    "idna",
    "polarismail.serve.smtp",
    "sqlalchemy.dialects.sqlite.pysqlite",
    "twisted.protocols.tls",
)
_LOOK_AGAIN_SECONDS = 0.1
_NEED_RESTART = (
    "hostname",
    "listeners",
    "paths",
    "database",
    "log",
    "control",
    "auth",
    "directory",
    "spool",
    "local",
    "dns",
)
"""Tables and keys that are read at the start alone; of `[pop3]` it is how maildrops are read."""


def makeService(options: Options) -> MailService:
    """What `twistd polarismail` runs. Opens nothing and binds nothing."""
    parent: Any = getattr(options, "parent", None) or {}
    return MailService(
        options.configuration,
        options["config"],
        clock_offset_seconds=options["clock-offset"],
        uid=parent.get("uid"),
        gid=parent.get("gid"),
    )


class MailService(Service):
    """A complete mail server on one reactor."""

    log = Logger()
    name = "polarismail"

    def __init__(
        self,
        config: Config,
        config_path: str,
        *,
        reactor: Any = None,
        clock_offset_seconds: float = 0.0,
        uid: int | None = None,
        gid: int | None = None,
    ) -> None:
        self.config, self.config_path = config, config_path
        self._given_reactor = reactor
        self._uid, self._gid = uid, gid
        self.now: Callable[[], float] = lambda: time.time() + clock_offset_seconds
        self._bound: dict[str, list[socket.socket]] = {}
        self._ports: list[Any] = []
        self._starting = self._stopping = False
        self.parts: Parts | None = None
        self.certificates: CertificateStore | None = None

    @property
    def reactor(self) -> Any:
        """The reactor: the given one, or the global one, imported only now."""
        if self._given_reactor is None:
            from twisted.internet import reactor

            self._given_reactor = reactor
        return self._given_reactor

    # -- start -------------------------------------------------------------------------------------------------------

    def privilegedStartService(self) -> None:
        """Bind sockets, read the certificate, make missing directories. Raises SystemExit with the fault on stderr."""
        try:
            self._prepare()
        except ConfigError as problem:
            for bound in self._bound.values():
                for each in bound:
                    each.close()
            raise SystemExit(f"polarismail: {problem}") from problem
        super().privilegedStartService()

    def _prepare(self) -> None:
        config = self.config
        for path in (config.paths.state, config.paths.spool, config.paths.mail):
            make_directory(path, self._uid, self._gid)
        for path in (config.log.file, config.paths.control_socket):
            if os.path.dirname(path):
                make_directory(os.path.dirname(path), self._uid, self._gid, 0o755)
        if any(listener.tls != "none" for listener in config.listeners):
            self.certificates = CertificateStore(config.tls.certificate, config.tls.key)
        for listener in config.listeners:
            self._bound[listener.name] = listeners.bind(listener)
        if os.geteuid() == 0 and self._uid:
            # Python itself may lie where the later user cannot read: what is imported on first use is imported now.
            for name in _IMPORTED_LATE:
                importlib.import_module(name)

    def startService(self) -> None:
        """Open everything as the user that the service is now, then serve. A failure ends the process with status 1."""
        if not self._bound:
            self.privilegedStartService()  # `twist` knows no privileged start
        super().startService()
        self.telemetry = EventLog(
            self.config.log.file,
            reactor=self.reactor,
            style=self.config.log.format,
            hostname=self.config.hostname,
            now=self.now,
        )
        self._starting, self._stopping = True, False
        self._install_signals()
        ensureDeferred(self._start()).addErrback(self._failed_to_start).addBoth(self._start_ended)

    async def _start(self) -> None:
        check_dropped(self._uid, self._gid)
        forbid_new_privileges()
        self.telemetry.open()
        globalLogPublisher.addObserver(self.telemetry)
        if os.geteuid() == 0:
            self.log.warn(
                "running as root: give twistd --uid and --gid, so that sockets are bound first and root goes after"
            )
        self.parts = Parts(
            self.config,
            reactor=self.reactor,
            now=self.now,
            telemetry=self.telemetry,
            certificates=self.certificates,
            random=random.Random(),
        )
        await self.parts.start()
        if self._stopping:
            return  # told to stop meanwhile: nobody is served, and `_stop`, which waits for this, closes everything
        for listener in self.config.listeners:
            self._ports += listeners.serve(self.reactor, self._bound.pop(listener.name), self.parts.factory(listener))
        poll_plainly(self.reactor)
        memory.settle()
        self.telemetry.record_event(
            "started", {"version": __version__, "pid": os.getpid(), "hostname": self.config.hostname}
        )

    def _failed_to_start(self, failure: Any) -> None:
        if failure.check(PolarisError, OSError) is not None:
            self.log.critical("polarismail cannot start: {problem}", problem=failure.getErrorMessage())
        else:
            self.log.failure("polarismail cannot start", failure)
        self.telemetry.flush()
        if self._stopping:
            return
        # twistd has no way to say "failed" once the reactor runs; systemd and people look at the status.
        self.reactor.addSystemEventTrigger("after", "shutdown", os._exit, 1)
        self.reactor.callLater(0, self.reactor.stop)

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
        for bound in self._bound.values():
            for each in bound:
                each.close()
        parts = self.parts
        if parts is not None:
            try:
                parts.shut_down_sessions()
                await self._wait_while(lambda: parts.sessions, self.config.transport.drain_seconds)
                parts.drop_sessions()
                await self._wait_while(lambda: parts.sessions, 1.0)
            except Exception:
                self.log.failure("sessions did not end as they should")
            await parts.stop()
        self.telemetry.record_event("stopped", {"pid": os.getpid()})
        globalLogPublisher.removeObserver(self.telemetry)
        self.telemetry.close()

    async def _wait_while(self, condition: Callable[[], Any], seconds: float) -> None:
        until = time.monotonic() + seconds
        while condition() and time.monotonic() < until:
            await deferLater(self.reactor, _LOOK_AGAIN_SECONDS)

    # -- reload ------------------------------------------------------------------------------------------------------

    def _install_signals(self) -> None:
        try:
            signal.signal(signal.SIGHUP, lambda *_: self.reactor.callFromThread(self.reload))
            signal.signal(signal.SIGUSR1, lambda *_: self.reactor.callFromThread(self.telemetry.reopen))
        except ValueError:
            self.log.debug("not on the main thread: no signals; call reload() instead")

    def reload(self) -> str:
        """SIGHUP: reopen the log, read configuration and certificate again. Returns "" or what kept the old ones in force:
        either everything that can change does, or nothing.

        What was read applies to new connections and new attempts. What needs a restart stays as it was, and the log says
        where the file differs.
        """
        self.telemetry.reopen()
        parts = self.parts
        try:
            if parts is None or self._starting:
                raise ConfigError(f"{self.config_path}: not read: the server is still starting")
            read = load(self.config_path)
            needs_restart = [key for key in _NEED_RESTART if getattr(read, key) != getattr(self.config, key)]
            config = evolve(
                read,
                pop3=evolve(read.pop3, maildrop=self.config.pop3.maildrop, door=self.config.pop3.door),
                **{key: getattr(self.config, key) for key in _NEED_RESTART},
            )
            if config.pop3 != read.pop3:
                needs_restart.append("pop3")
            kept = self._reload_certificate(config)
        except Exception as problem:
            if not isinstance(problem, ConfigError):
                self.log.failure("the configuration could not be read again")
            self.telemetry.record_event("reload-failed", {"path": self.config_path, "problem": str(problem)})
            return str(problem)
        parts.reconfigure(config)
        self.config = config
        fields = {"path": self.config_path, "needs_restart": ", ".join(needs_restart)}
        if kept:
            fields["certificate_kept"] = kept
        self.telemetry.record_event("reloaded", fields)
        return ""

    def _reload_certificate(self, config: Config) -> str:
        """Returns why the old one is kept: only root may read the same files, and root is gone. Raises ConfigError where
        they are bad, or others than before cannot be read."""
        if self.certificates is None:
            return ""
        try:
            self.certificates.reload(config.tls.certificate, config.tls.key)
        except ConfigError as problem:
            if not isinstance(problem.__cause__, PermissionError) or config.tls != self.config.tls:
                raise
            return f"{problem}; a renewed one is served after a restart, or once the server's user may read it"
        return ""
