# SPDX-License-Identifier: MIT
"""What the SMTP sessions of one listener share: their time-outs and budgets, the portal, the words that are always the same.

Frozen, so that a reload is another value for the sessions from then on (NUMBERS, HOSTILE 0).
"""

from __future__ import annotations

from attrs import Factory, evolve, field, frozen

from polarismail.net.contracts import Hurry
from polarismail.serve.context import ListenerContext
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
class SmtpContext(ListenerContext):
    """What all sessions of one listener share."""

    settings: SessionSettings = field(factory=SessionSettings)
    calm_settings: SessionSettings = field(default=Factory(lambda self: self.settings, takes_self=True))
    """What they are when there is no stress, and for who has logged in."""
    banner: Reply = field(init=False)
    helo_reply: Reply = field(init=False)

    @banner.default
    def _make_banner(self) -> Reply:
        return Reply(220, None, f"{self.hostname} {'LMTP' if self.listener.role == 'lmtp' else 'ESMTP'} polarismail")

    @helo_reply.default
    def _make_helo_reply(self) -> Reply:
        return Reply(250, None, self.hostname)
