# SPDX-License-Identifier: MIT
"""What a message is granted beyond its delivery: a priority, a release in the future. Strangers get neither.

RFC 6710 §4.1 (nobody unknown raises the priority; a lowered one is told by 2.3.6), RFC 4865 (future release), RFC 2852 and
RFC 8689 (kept; they are refused by the grammar for as long as they are not offered).
"""

from __future__ import annotations

from attrs import field, frozen

from polarismail.values.envelope import MailOptions
from polarismail.values.reply import BAD_HOLD, NEED_LOGIN_TO_HOLD, SENDER_OK, Reply
from polarismail.wire.smtp_events import Wishes

_LOWEST, _HIGHEST = -9, 9


def _check_priority(_: object, __: object, priority: int) -> None:
    if not _LOWEST <= priority <= _HIGHEST:
        raise ValueError(f"max_priority: expected {_LOWEST} to {_HIGHEST}, found {priority}")


def _check_hold(_: object, __: object, seconds: int) -> None:
    if not 1 <= seconds <= 999_999_999:
        raise ValueError(f"max_hold_seconds: expected 1 to 999999999, found {seconds}")


@frozen
class WishSettings:
    """How much may be wished for by who has logged in."""

    max_priority: int = field(default=4, validator=_check_priority)
    max_hold_seconds: int = field(default=604_800, validator=_check_hold)


def grant(wishes: Wishes, *, is_known: bool, now: float, settings: WishSettings) -> tuple[Reply, MailOptions | None]:
    """The reply to MAIL, and what is granted (None with a refusal). `is_known`: somebody has logged in."""
    hold_until = 0.0
    if wishes.hold_seconds is not None or wishes.hold_until is not None:
        if not is_known:
            return NEED_LOGIN_TO_HOLD, None
        hold_until = now + wishes.hold_seconds if wishes.hold_seconds is not None else wishes.hold_until or 0.0
        # HOLDFOR=0 is at once; a date that has passed is a mistake, and one beyond the bound was announced as such.
        if not now <= hold_until <= now + settings.max_hold_seconds:
            return BAD_HOLD, None
    wished = wishes.priority or 0
    priority = min(wished, settings.max_priority if is_known else 0)
    reply = SENDER_OK
    if priority != wished:
        reply = Reply(250, (2, 3, 6), f"{priority} is the priority of this message, not {wished}")
    return reply, MailOptions(
        priority,
        hold_until,
        now + wishes.by_seconds if wishes.by_seconds is not None else 0.0,
        wishes.by_return,
        wishes.by_trace,
        wishes.require_tls,
    )
