# SPDX-License-Identifier: MIT
"""ESMTPFactory: the ESMTP server as Twisted users expect it, a factory on a `twisted.cred` portal.

It is a `twisted.mail.smtp.SMTPFactory` by contract: give it a portal whose avatars provide IMessageDelivery (or our own,
richer IReception) and listen. The protocol that it builds is ours.

This is the one module that may install a reactor on import: `twisted.mail.smtp` imports the global one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import evolve
from twisted.internet import reactor as global_reactor
from twisted.mail.smtp import SMTPFactory

from polarismail.net.contracts import DEFAULT_SETTINGS, TransportSettings
from polarismail.net.factory import CountingFactory, no_tls
from polarismail.net.limits import ConnectionCounter
from polarismail.net.listeners import Listener
from polarismail.policy.limits import ClientLimits
from polarismail.serve.smtp_context import SessionSettings, SmtpContext
from polarismail.serve.smtp_lmtp import LmtpSession
from polarismail.serve.smtp_session import SmtpSession
from polarismail.values.events import RecordEvent, no_event
from polarismail.values.reply import SHUTTING_DOWN, TOO_BUSY, TOO_MANY_CONNECTIONS
from polarismail.wire.smtp_server import SmtpServer
from polarismail.wire.smtp_states import ServerSettings


class ESMTPFactory(CountingFactory, SMTPFactory):
    """Builds one ESMTP connection for each client.

    `portal` is asked for IReception or IMessageDelivery: with Anonymous credentials before the first MAIL, with
    PlainCredentials at AUTH. `tls_options` returns the context factory for STARTTLS, or None while there is none.
    """

    refusal, busy, goodbye = TOO_MANY_CONNECTIONS.octets, TOO_BUSY.octets, SHUTTING_DOWN.octets

    def __init__(
        self,
        portal: Any,
        *,
        listener: Listener | None = None,
        hostname: str = "localhost",
        reactor: Any = None,
        tls_options: Callable[[], Any] = no_tls,
        record_event: RecordEvent = no_event,
        settings: ServerSettings | None = None,
        session_settings: SessionSettings | None = None,
        transport_settings: TransportSettings = DEFAULT_SETTINGS,
        counter: ConnectionCounter | None = None,
        limits: ClientLimits | None = None,
    ) -> None:
        SMTPFactory.__init__(self, portal)
        listener = listener or Listener("smtp", 25, "mx")
        self.domain = hostname  # type: ignore[assignment]  # Twisted uses both text and octets
        self.engine_settings = evolve(
            settings or ServerSettings(hostname=hostname), hostname=hostname, lmtp=listener.role == "lmtp"
        )
        self.context = SmtpContext(
            hostname=hostname,
            listener=listener,
            portal=portal,
            reactor=reactor if reactor is not None else global_reactor,
            tls_options=tls_options,
            record_event=record_event,
            settings=session_settings or SessionSettings(),
            limits=limits,
        )
        self.count(counter, transport_settings)

    def make_session(self) -> tuple[SmtpServer, SmtpSession]:
        """See CountingFactory."""
        kind = LmtpSession if self.context.listener.role == "lmtp" else SmtpSession
        session = kind(self.context)
        engine = SmtpServer(
            self.engine_settings,
            tls_available=self.offers_tls,
            tls_active=self.context.listener.tls == "implicit",
            auth_mechanisms=session.auth_mechanisms,
        )
        return engine, session
