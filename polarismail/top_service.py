# SPDX-License-Identifier: MIT
"""What a server in one process and the supervisor of several do alike: prepare, open the log, end with a status that tells.

Sockets are bound and the certificate is read in `privilegedStartService`, while the process may still be root; the log is
opened after.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from twisted.application.service import Service
from twisted.logger import Logger, globalLogPublisher

from polarismail.config import Config
from polarismail.inheritance import Prepared, prepare
from polarismail.net.clock import count_monotonic
from polarismail.privileges import check_dropped, forbid_new_privileges
from polarismail.telemetry import EventLog
from polarismail.values.errors import ConfigError


class TopService(Service):
    """`config` as it was read from `config_path`; `uid` and `gid` are what twistd becomes after the sockets are bound."""

    log = Logger()
    name = "polarismail"
    telemetry: EventLog

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
        self._offset, self._uid, self._gid = clock_offset_seconds, uid, gid
        self._prepared: Prepared | None = None
        self._stopping = False

    @property
    def reactor(self) -> Any:
        """The reactor: the given one, or the global one, imported only now."""
        if self._given_reactor is None:
            from twisted.internet import reactor

            count_monotonic(reactor)
            self._given_reactor = reactor
        return self._given_reactor

    def now(self) -> float:
        """The wall clock, seconds since 1970."""
        return time.time() + self._offset

    def privilegedStartService(self) -> None:
        """Bind sockets, read the certificate, make missing directories. Raises SystemExit with the fault on stderr."""
        try:
            self._prepared = self._prepare()
        except ConfigError as problem:
            raise SystemExit(f"polarismail: {problem}") from problem
        super().privilegedStartService()

    def _prepare(self) -> Prepared:
        return prepare(self.config, self._uid, self._gid)

    def startService(self) -> None:
        """The log is made, not yet opened."""
        if self._prepared is None:
            self.privilegedStartService()  # `twist` knows no privileged start
        super().startService()
        self._stopping = False
        self.telemetry = EventLog(
            self.config.log.file,
            reactor=self.reactor,
            style=self.config.log.format,
            hostname=self.config.hostname,
            now=self.now,
        )

    def _open_log(self, *, warns: bool = True) -> None:
        """Make sure that privileges are gone for good, then open the log. Raises ConfigError, OSError."""
        check_dropped(self._uid, self._gid)
        forbid_new_privileges()
        self.telemetry.open()
        globalLogPublisher.addObserver(self.telemetry)
        if not warns:
            return
        if os.geteuid() == 0:
            self.log.warn(
                "running as root: give twistd --uid and --gid, so that sockets are bound first and root goes after"
            )
        certificates = self._prepared.certificates if self._prepared is not None else None
        if certificates is not None and certificates.problem:
            self.log.critical(
                "there is no TLS until a reload finds a certificate: {problem}",
                problem=certificates.problem,
                event="certificate_missing",
            )
        elif certificates is not None and certificates.expires < self.now():
            self.log.critical("the certificate has ended: clients that check it stay away", event="certificate_ended")

    def _close_log(self) -> None:
        """The last line, and nothing after it."""
        self.telemetry.record_event("stopped", {"pid": os.getpid()})
        globalLogPublisher.removeObserver(self.telemetry)
        self.telemetry.close()

    def _install_signals(self, reload: Callable[[], Any], reopen: Callable[[], Any]) -> None:
        """SIGHUP and SIGUSR1, on the reactor's thread."""
        try:
            signal.signal(signal.SIGHUP, lambda *_: self.reactor.callFromThread(reload))
            signal.signal(signal.SIGUSR1, lambda *_: self.reactor.callFromThread(reopen))
        except ValueError:
            self.log.debug("not on the main thread: no signals; call reload() instead")

    def _end_in_failure(self) -> None:
        """Stop the reactor, and have the process end with status 1."""
        self.telemetry.flush()
        if self._stopping:
            return
        # twistd has no way to say "failed" once the reactor runs; systemd and people look at the status.
        self.reactor.addSystemEventTrigger("after", "shutdown", os._exit, 1)
        self.reactor.callLater(0, self.reactor.stop)
