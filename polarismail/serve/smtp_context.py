# SPDX-License-Identifier: MIT
"""What the SMTP sessions of one listener share: their time-outs and budgets, the portal, the words that are always the same.

Frozen, so that a reload is another value for the sessions from then on (NUMBERS, HOSTILE 0).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import Factory, evolve, field, frozen

from polarismail.net.contracts import Hurry
from polarismail.net.listeners import Listener
from polarismail.policy.limits import ClientLimits
from polarismail.values.events import RecordEvent
from polarismail.values.reply import Reply


@frozen
class SessionSettings:
    """Time-outs and budgets of one SMTP session (NUMBERS, HOSTILE 0)."""

    command_seconds: float = 300.0
    content_seconds: float = 300.0
    min_octets_per_second: int = 500
    max_content_seconds: float = 7200.0
    soft_errors: int = 10
    soft_error_delay_seconds: float = 1.0
    hard_errors: int = 20
    max_junk_commands: int = 100
    soft_unknown_recipients: int = 3
    max_unknown_recipients: int = 10
    max_auth_failures: int = 3

    def hurried(self, hurry: Hurry) -> SessionSettings:
        """The same under stress."""
        return evolve(
            self,
            command_seconds=min(self.command_seconds, hurry.command_seconds),
            content_seconds=min(self.content_seconds, hurry.command_seconds),
            hard_errors=min(self.hard_errors, hurry.hard_errors),
            max_junk_commands=min(self.max_junk_commands, hurry.max_junk_commands),
        )


@frozen
class SmtpContext:
    """What all sessions of one listener share."""

    hostname: str
    listener: Listener
    portal: Any  # twisted.cred.portal.Portal
    reactor: Any
    tls_options: Callable[[], Any]  # the server's current TLS options, or None where TLS is not to be had
    record_event: RecordEvent
    settings: SessionSettings = field(factory=SessionSettings)
    calm_settings: SessionSettings = field(default=Factory(lambda self: self.settings, takes_self=True))
    """What they are when there is no stress, and for who has logged in."""
    limits: ClientLimits | None = None
    banner: Reply = field(init=False)
    helo_reply: Reply = field(init=False)

    @banner.default
    def _make_banner(self) -> Reply:
        return Reply(220, None, f"{self.hostname} {'LMTP' if self.listener.role == 'lmtp' else 'ESMTP'} polarismail")

    @helo_reply.default
    def _make_helo_reply(self) -> Reply:
        return Reply(250, None, self.hostname)
