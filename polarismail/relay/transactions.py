# SPDX-License-Identifier: MIT
"""What a transaction says: MAIL and RCPT for a stored message and what its next hop offers. Pure functions.

RFC 1870 §5 and §6 (SIZE), RFC 6152 (8BITMIME: content is never converted, so 8-bit content fails with 5.6.3 where the next
hop cannot take it), RFC 6531 (an address beyond ASCII fails with 5.6.7).

Guarantees: no path that is rendered here can end a line or hold an octet beyond ASCII.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from attrs import frozen

from polarismail.store.interfaces import QueuedMessage, QueuedRecipient
from polarismail.values.address import Mailbox
from polarismail.values.errors import BadAddress
from polarismail.values.reply import Reply

CONTENT_UNREADABLE = Reply(451, (4, 3, 0), "The message cannot be read from the spool now")
INTERNAL_PROBLEM = Reply(451, (4, 3, 0), "Internal problem of the sending system")
TOO_BIG_THERE = "The message has {size} octets; the remote server takes {limit}"
NEEDS_8BITMIME = Reply(554, (5, 6, 3), "The message has 8-bit content, which the remote server does not take")
NEEDS_SMTPUTF8 = Reply(553, (5, 6, 7), "The address is not ASCII, and the remote server does not take such addresses")

_UNSAFE = re.compile(r"[^\x20-\x7e]")


@frozen
class RecipientPath:
    """The argument of one RCPT; `number` is the recipient's place in what was asked."""

    number: int
    octets: bytes


def too_big(message: QueuedMessage, extensions: Mapping[str, str]) -> Reply | None:
    """The refusal that the next hop's SIZE announces for this message (RFC 1870 §6.1), without troubling it."""
    limit = extensions.get("SIZE", "")
    if limit.isascii() and limit.isdigit() and 0 < int(limit[:20]) < message.size:
        return Reply(552, (5, 3, 4), TOO_BIG_THERE.format(size=message.size, limit=int(limit[:20])))
    return None


def plan_sender(message: QueuedMessage, extensions: Mapping[str, str], is_ascii: bool | None) -> bytes | Reply:
    """The argument of MAIL, or the reply that every recipient gets instead.

    `is_ascii`: whether all octets of the content are; None where nobody has looked, which is only allowed with 8BITMIME.
    """
    if "8BITMIME" not in extensions and not is_ascii:
        return NEEDS_8BITMIME
    path = b"<>"
    if message.reverse_path is not None:
        rendered = _render_path(message.reverse_path)
        if rendered is None:
            return NEEDS_SMTPUTF8
        path = rendered
    if "SIZE" in extensions:
        path += b" SIZE=%d" % message.size
    # Declared where it is not known to be needless: BODY=8BITMIME covers 7-bit content as well.
    if "8BITMIME" in extensions and (is_ascii is False or (is_ascii is None and message.body != "7BIT")):
        path += b" BODY=8BITMIME"
    return path


def plan_recipients(recipients: Sequence[QueuedRecipient], verdicts: list[Reply | None]) -> list[RecipientPath]:
    """The argument of RCPT for each recipient; one that cannot be said gets its verdict at once."""
    paths = []
    for number, recipient in enumerate(recipients):
        rendered = _render_path(recipient.forward_path)
        if rendered is None:
            verdicts[number] = NEEDS_SMTPUTF8
        else:
            paths.append(RecipientPath(number, rendered))
    return paths


def _render_path(mailbox: Mailbox) -> bytes | None:
    """`<local@domain>` with the domain in A-labels; None where the local part cannot be said in ASCII."""
    try:
        domain = mailbox.domain_ascii
    except BadAddress:
        return None
    text = str(mailbox if mailbox.domain.isascii() else Mailbox(mailbox.local, domain))
    return None if _UNSAFE.search(text) else f"<{text}>".encode("ascii")
