# SPDX-License-Identifier: MIT
"""When to try again and when to give up: pure functions of the cause, the attempts so far, and the time.

RFC 5321 §4.5.4.1: the interval may vary with the cause, the give-up time is at least 4-5 days. Numbers: NUMBERS.md.

How long a recipient lives in the queue is decided when it is accepted (`expires`).

    first wait by cause, then times `growth` for each attempt, never more than `longest_wait_seconds`;
    one more attempt at the very end of the life, then EXPIRED.
"""

from __future__ import annotations

from attrs import frozen

from polarismail.relay.classify import Cause

_SHORTEST_SECONDS = 1.0
_FIRST_WAIT = {
    Cause.GREYLISTED: "greylisted_seconds",
    Cause.BUSY: "busy_seconds",
    Cause.CONNECT: "connect_seconds",
    Cause.BLOCKED: "blocked_seconds",
    Cause.DNS: "dns_seconds",
    Cause.CROWDED: "greylisted_seconds",
    Cause.OTHER: "other_seconds",
}


@frozen
class ScheduleSettings:
    """Waits by cause and how they grow. Seconds."""

    greylisted_seconds: float = 300.0
    busy_seconds: float = 900.0
    connect_seconds: float = 600.0
    blocked_seconds: float = 7_200.0
    dns_seconds: float = 300.0
    other_seconds: float = 900.0
    growth: float = 1.6
    longest_wait_seconds: float = 14_400.0
    jitter: float = 0.1
    """Each wait is made longer by up to this part of itself, so that what failed together does not return together.
    Longer, never shorter: a greylist that wants 300 s must not be asked after 290."""
    warn_after_seconds: float = 14_400.0
    """A sender hears of the delay after this; 0: never."""


def wait_seconds(cause: Cause, attempts: int, luck: float, settings: ScheduleSettings) -> float:
    """How long to wait after a deferral. `attempts`: finished before this one; `luck`: random in [0, 1)."""
    first: float = getattr(settings, _FIRST_WAIT[cause])
    # The exponent is bounded: growth ** 10,000 overflows a float, and the longest wait is reached long before.
    grown = first * settings.growth ** min(max(attempts, 0), 64)
    return max(_SHORTEST_SECONDS, min(grown * (1.0 + settings.jitter * luck), settings.longest_wait_seconds))


def next_attempt(
    cause: Cause, attempts: int, *, now: float, expires: float, luck: float, settings: ScheduleSettings
) -> float | None:
    """When to try again, in seconds since 1970; None: the life is over, give up.

    The last attempt is at `expires`, so that the sender hears of the failure when it is due and not hours later.
    """
    if now >= expires:
        return None
    due = now + wait_seconds(cause, attempts, luck, settings)
    return max(min(due, expires), now + _SHORTEST_SECONDS)


def should_warn(created: float, now: float, *, warned: bool, settings: ScheduleSettings) -> bool:
    """Whether a deferral at `now` is the moment to tell the sender of the delay (once)."""
    return not warned and 0 < settings.warn_after_seconds <= now - created
