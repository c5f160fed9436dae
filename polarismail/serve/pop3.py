# SPDX-License-Identifier: MIT
"""Pop3Factory: the POP3 server (RFC 1939) as a factory on a `twisted.cred` portal.

Give it a portal whose avatars provide IMaildropAvatar and listen. It installs no reactor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.protocol import Factory

from polarismail.net.contracts import DEFAULT_SETTINGS, TransportSettings
from polarismail.net.factory import CountingFactory, no_tls
from polarismail.net.limits import ConnectionCounter
from polarismail.net.listeners import Listener
from polarismail.policy.limits import ClientLimits
from polarismail.serve.maildrop_door import MaildropDoor, MaildropDoors
from polarismail.serve.pop3_session import Pop3Context, Pop3Session, Pop3SessionSettings
from polarismail.values.events import RecordEvent, no_event
from polarismail.wire.pop3_events import SHUTTING_DOWN, TOO_BUSY, TOO_MANY_CONNECTIONS
from polarismail.wire.pop3_server import Pop3Server, Pop3Settings

__all__ = ["MaildropDoor", "MaildropDoors", "Pop3Factory", "Pop3SessionSettings", "Pop3Settings"]


class Pop3Factory(CountingFactory, Factory):
    """Builds one POP3 connection for each client.

    `portal` is asked for IMaildropAvatar at each login. `tls_options` returns the context factory for STLS, or None while
    there is none.
    """

    refusal, busy, goodbye = TOO_MANY_CONNECTIONS.octets, TOO_BUSY.octets, SHUTTING_DOWN.octets

    def __init__(
        self,
        portal: Any,
        *,
        listener: Listener,
        hostname: str,
        reactor: Any,
        tls_options: Callable[[], Any] = no_tls,
        record_event: RecordEvent = no_event,
        settings: Pop3Settings | None = None,
        session_settings: Pop3SessionSettings | None = None,
        transport_settings: TransportSettings = DEFAULT_SETTINGS,
        counter: ConnectionCounter | None = None,
        limits: ClientLimits | None = None,
    ) -> None:
        self.engine_settings = settings or Pop3Settings()
        self.context = Pop3Context(
            hostname=hostname,
            listener=listener,
            portal=portal,
            reactor=reactor,
            tls_options=tls_options,
            record_event=record_event,
            settings=session_settings or Pop3SessionSettings(),
            limits=limits,
        )
        self.count(counter, transport_settings)

    def make_session(self) -> tuple[Pop3Server, Pop3Session]:
        """See CountingFactory."""
        session = Pop3Session(self.context)
        engine = Pop3Server(
            self.engine_settings,
            tls_available=self.offers_tls,
            tls_active=self.context.listener.tls == "implicit",
            auth_mechanisms=session.auth_mechanisms,
        )
        return engine, session
