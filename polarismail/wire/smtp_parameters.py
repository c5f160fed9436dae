# SPDX-License-Identifier: MIT
"""The parameters of MAIL that few messages have, and which extension each belongs to; and which extensions are offered where.

Guarantees: a parameter of an extension that is not offered is unknown (RFC 5321 §4.1.1.11), whatever its value; nothing here
reads a clock or grants anything.

RFC 2852 §4 (BY), RFC 4865 (HOLDFOR, HOLDUNTIL), RFC 6710 §7 (MT-PRIORITY), RFC 8689 §2 (REQUIRETLS), RFC 9422 §3 (LIMITS),
RFC 3339 §5.6 (times).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

from polarismail.values.reply import BAD_SYNTAX, UNKNOWN_PARAMETER, Reply
from polarismail.wire.smtp_events import Wishes

OFFERABLE = ("PIPELINING", "CHUNKING", "DSN", "SMTPUTF8", "LIMITS", "FUTURERELEASE", "MT-PRIORITY")
"""What a listener may be told to offer, in the order of the EHLO reply."""
_ALWAYS = frozenset({"SIZE", "8BITMIME", "ENHANCEDSTATUSCODES", "HELP", "STARTTLS", "AUTH"})
_NOT_YET = frozenset({"REQUIRETLS", "DELIVERBY"})
_EVERYWHERE = ("PIPELINING", "CHUNKING", "DSN", "SMTPUTF8", "LIMITS")
DEFAULT_OFFERS = {
    "mx": _EVERYWHERE,
    "submission": (*_EVERYWHERE, "FUTURERELEASE", "MT-PRIORITY"),
    "lmtp": _EVERYWHERE,
}
"""By the role of the listener."""

_PRIORITY = re.compile(r"0|-?[1-9]")
_HOLD_FOR = re.compile(r"[0-9]{1,9}")
_MOMENT = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(?:Z|([+-])(\d\d):(\d\d))", re.ASCII | re.IGNORECASE
)
_BY = re.compile(r"([+-]?[0-9]{1,9});([NR])(T?)", re.IGNORECASE)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def check_offers(keywords: Iterable[str]) -> None:
    """Raise ValueError, for people, where one of these cannot be chosen."""
    for keyword in keywords:
        if keyword in OFFERABLE:
            continue
        why = ""
        if keyword in _ALWAYS:
            why = " (which is offered wherever it can be)"
        elif keyword in _NOT_YET:
            why = " (which is not honoured yet)"
        raise ValueError(f'offers: expected some of {", ".join(OFFERABLE)}, found "{keyword}"{why}')


def offered(offers: Container[str], max_recipients: int, max_hold_seconds: int, now: float) -> list[str]:
    """The lines of EHLO's reply for what was chosen, but PIPELINING; `now` is seconds since 1970."""
    lines = [keyword for keyword in ("CHUNKING", "DSN", "SMTPUTF8", "MT-PRIORITY") if keyword in offers]
    if "LIMITS" in offers:
        lines.append(f"LIMITS RCPTMAX={max_recipients}")
    if "FUTURERELEASE" in offers:
        # To the hour before: so the reply stays the same for a while.
        lines.append(f"FUTURERELEASE {max_hold_seconds} {render_moment((now + max_hold_seconds) // 3600 * 3600)}")
    return lines


def read_wish(name: str, value: str | None, extensions: Container[str], wishes: dict[str, Any]) -> Reply | None:
    """Put one parameter into `wishes`, which become the attributes of Wishes; returns the refusal where it is none."""
    known = _WISHES.get(name)
    if known is None or known[0] not in extensions:
        return UNKNOWN_PARAMETER
    read = known[1](value)
    if read is None:
        return BAD_SYNTAX
    wishes.update(read)
    return None


def make_wishes(wishes: dict[str, Any]) -> Wishes | Reply:
    """All of them; the refusal where they contradict each other."""
    made = Wishes(**wishes)
    if made.hold_seconds is not None and made.hold_until is not None:
        return BAD_SYNTAX  # RFC 4865: one of the two
    return made


def parse_moment(text: str) -> float | None:
    """RFC 3339's date-time as seconds since 1970; None for what is none. A leap second is the one before it."""
    found = _MOMENT.fullmatch(text)
    if found is None:
        return None
    year, month, day, hour, minute, second = (int(found[at]) for at in range(1, 7))
    try:
        zone = UTC
        if found[8]:
            if int(found[9]) > 23 or int(found[10]) > 59:
                return None
            offset = timedelta(hours=int(found[9]), minutes=int(found[10]))
            zone = timezone(-offset if found[8] == "-" else offset)
        at = datetime(year, month, day, hour, minute, 59 if second == 60 else second, tzinfo=zone)
    except ValueError:
        return None
    # Not timestamp(): that of the year 1 in a zone east of here is an overflow.
    return (at - _EPOCH) / timedelta(seconds=1) + (float(f"0.{found[7]}") if found[7] else 0.0)


def render_moment(when: float) -> str:
    """Whole seconds since 1970 as RFC 3339's date-time in UTC."""
    return (_EPOCH + timedelta(seconds=int(when))).strftime("%Y-%m-%dT%H:%M:%SZ")


def _priority(value: str | None) -> dict[str, Any] | None:
    return {"priority": int(value)} if value is not None and _PRIORITY.fullmatch(value) else None


def _hold_for(value: str | None) -> dict[str, Any] | None:
    return {"hold_seconds": int(value)} if value is not None and _HOLD_FOR.fullmatch(value) else None


def _hold_until(value: str | None) -> dict[str, Any] | None:
    moment = parse_moment(value) if value is not None else None
    return {"hold_until": moment} if moment is not None else None


def _by(value: str | None) -> dict[str, Any] | None:
    found = _BY.fullmatch(value) if value is not None else None
    if found is None:
        return None
    seconds, returns = int(found[1]), found[2].upper() == "R"
    if returns and seconds <= 0:
        return None  # RFC 2852 §4: only a report may be due already
    return {"by_seconds": seconds, "by_return": returns, "by_trace": bool(found[3])}


def _require_tls(value: str | None) -> dict[str, Any] | None:
    return {"require_tls": True} if value is None else None


_WISHES: dict[str, tuple[str, Callable[[str | None], dict[str, Any] | None]]] = {
    "MT-PRIORITY": ("MT-PRIORITY", _priority),
    "HOLDFOR": ("FUTURERELEASE", _hold_for),
    "HOLDUNTIL": ("FUTURERELEASE", _hold_until),
    "BY": ("DELIVERBY", _by),
    "REQUIRETLS": ("REQUIRETLS", _require_tls),
}
