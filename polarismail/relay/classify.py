# SPDX-License-Identifier: MIT
"""What a next hop's "not now" means: the cause decides how long we wait, and whether a 5yz is really final.

A table from enhanced status and words of the text to a cause (NUMBERS.md, "Ours (default)"). Looks at the first
characters of the text only: a peer wrote it.

RFC 5321 §4.2.1, §4.5.3.1.10 (too many recipients); RFC 3463 (enhanced status).
"""

from __future__ import annotations

import enum
import re

from polarismail.values.reply import Reply

_LOOKED_AT = 512


class Cause(enum.Enum):
    """Why an attempt brought no verdict for ever."""

    GREYLISTED = "greylisted"
    BUSY = "busy"  # the mailbox: locked, full, receiving too fast
    CONNECT = "connect"  # nobody there, or the connection broke
    BLOCKED = "blocked"  # our address or our behaviour is not welcome now
    DNS = "dns"  # we could not find out where to go
    CROWDED = "crowded"  # more recipients than one transaction may have
    OTHER = "other"


_GREY = re.compile(
    r"gr[ae]y[- ]?list|postgrey|try(?:ing)? (?:it )?again (?:later|in \d)|come back later|retry later", re.I
)
_BLOCK = re.compile(
    r"black ?list|block ?list|\bblocked\b|\brbl\b|dnsbl|spamhaus|spamcop|barracuda|reputation|rate.?limit|throttl"
    r"|too many (?:messages|connections)|suspicious|unsolicited|\bTSS\d\d|\bpolicy\b",
    re.I,
)
_FULL = re.compile(r"mailbox (?:is )?(?:full|busy|locked)|over ?quota|quota exceeded|insufficient storage", re.I)
_CROWD = re.compile(r"too many recipients", re.I)


def classify(reply: Reply) -> Cause:
    """The cause behind a reply that is no success. The first rule that fits decides."""
    text, status = reply.text[:_LOOKED_AT], reply.status or (reply.code // 100, 0, 0)
    _, subject, detail = status
    if is_crowded(reply):
        return Cause.CROWDED
    if (subject, detail) == (4, 3):
        return Cause.DNS
    if (subject, detail) in ((4, 1), (4, 2), (4, 4), (4, 5)) or (reply.code == 421 and not _BLOCK.search(text)):
        return Cause.CONNECT
    if subject == 2 and detail in (1, 2):
        # "4.2.0 Greylisted" is not here on purpose; 4.2.1 is the mailbox, whatever the text.
        return Cause.GREYLISTED if "list" in text.lower() and _GREY.search(text) else Cause.BUSY
    if _FULL.search(text):
        return Cause.BUSY
    # Words before numbers: 4.7.1 is used for everything, "greylisted, not blocked" says what it is.
    if _BLOCK.search(text) and not re.search(r"gr[ae]y[- ]?list", text, re.I):
        return Cause.BLOCKED
    if _GREY.search(text) or (subject, detail) == (7, 1):
        return Cause.GREYLISTED
    if subject == 7:
        return Cause.BLOCKED
    return Cause.BUSY if reply.code == 450 and reply.status is None else Cause.OTHER


def is_crowded(reply: Reply) -> bool:
    """Too many recipients in this transaction: 452, and the 552 of old (RFC 5321 §4.5.3.1.10)."""
    if reply.code not in (452, 552):
        return False
    if reply.status is not None and reply.status[1:] == (5, 3):
        return True
    return bool(_CROWD.search(reply.text[:_LOOKED_AT]))


def is_failure(reply: Reply, *, explicit_route: bool = False) -> bool:
    """Whether the reply is final for the recipient.

    Not every 5yz is: too many recipients asks for another transaction, and a smarthost that does not know our login
    (530, 534, 535, 538) speaks of our configuration, not of the message: it waits until the operator has repaired that.
    """
    if not reply.is_permanent or is_crowded(reply):
        return False
    return not (explicit_route and reply.code in (530, 534, 535, 538))
