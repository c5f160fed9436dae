# SPDX-License-Identifier: MIT
"""What a transaction says: MAIL and RCPT for a stored message and what its next hop offers. Pure functions.

RFC 1870 §5 and §6 (SIZE); RFC 6152 (8BITMIME: content is never converted, so 8-bit content fails with 5.6.3 where the next
hop cannot take it); RFC 3461 §5.2.1 and §5.2.2 (DSN parameters go on verbatim to who offers DSN, and to nobody else);
RFC 6710 §4.2 (MT-PRIORITY); RFC 6531 §3.4 and §3.5 (an address beyond ASCII fails with 5.6.7 where the next hop has no
SMTPUTF8, a header section with 5.6.9; a domain alone goes as A-labels).

Guarantees: no path that is rendered here can end a line; no octet beyond ASCII is in one without SMTPUTF8.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence

from attrs import frozen

from polarismail.store.interfaces import QueuedMessage, QueuedRecipient
from polarismail.values.address import Mailbox
from polarismail.values.envelope import NO_DSN_REQUEST, NO_OPTIONS
from polarismail.values.errors import BadAddress
from polarismail.values.reply import Reply
from polarismail.values.xtext import orcpt_in_ascii, orcpt_of

CONTENT_UNREADABLE = Reply(451, (4, 3, 0), "The message cannot be read from the spool now")
INTERNAL_PROBLEM = Reply(451, (4, 3, 0), "Internal problem of the sending system")
TOO_BIG_THERE = "The message has {size} octets; the remote server takes {limit}"
NEEDS_8BITMIME = Reply(554, (5, 6, 3), "The message has 8-bit content, which the remote server does not take")
NEEDS_SMTPUTF8 = Reply(553, (5, 6, 7), "The address is not ASCII, and the remote server does not take such addresses")
HEADER_NEEDS_SMTPUTF8 = Reply(
    554, (5, 6, 9), "The header of the message is not ASCII, and the remote server does not take such messages"
)

_UNSAFE = re.compile(r"[^\x20-\x7e]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@frozen
class RecipientPath:
    """The argument of one RCPT; `number` is the recipient's place in what was asked."""

    number: int
    octets: bytes
    domain: str = ""


def too_big(message: QueuedMessage, extensions: Mapping[str, str]) -> Reply | None:
    """The refusal that the next hop's SIZE announces for this message (RFC 1870 §6.1), without troubling it."""
    limit = extensions.get("SIZE", "")
    if limit.isascii() and limit.isdigit() and 0 < int(limit[:20]) < message.size:
        return Reply(552, (5, 3, 4), TOO_BIG_THERE.format(size=message.size, limit=int(limit[:20])))
    return None


def needs_smtputf8(message: QueuedMessage, recipients: Sequence[QueuedRecipient]) -> bool:
    """Whether the transaction is to be one with SMTPUTF8: its sender said so, or an alias of ours led beyond ASCII."""
    return message.smtputf8 or not all(recipient.forward_path.local.isascii() for recipient in recipients)


def plan_sender(
    message: QueuedMessage, extensions: Container[str], is_ascii: bool | None, *, utf8: bool = False
) -> bytes | Reply:
    """The argument of MAIL, or the reply that every recipient gets instead.

    `is_ascii`: whether all octets of the content are; None where nobody has looked, which is only allowed with 8BITMIME.
    `utf8`: this transaction has SMTPUTF8, which the next hop offers.
    """
    if "8BITMIME" not in extensions and not is_ascii:
        return NEEDS_8BITMIME
    path = b"<>"
    if message.reverse_path is not None:
        rendered = _render_path(message.reverse_path, utf8)
        if rendered is None:
            return NEEDS_SMTPUTF8
        path = rendered
    if "SIZE" in extensions:
        path += b" SIZE=%d" % message.size
    # Declared where it is not known to be needless: BODY=8BITMIME covers 7-bit content as well.
    if "8BITMIME" in extensions and (is_ascii is False or (is_ascii is None and message.body != "7BIT")):
        path += b" BODY=8BITMIME"
    if utf8:
        path += b" SMTPUTF8"
    if (message.ret or message.envid) and "DSN" in extensions:
        path += f" RET={message.ret}".encode("ascii") if message.ret else b""
        path += f" ENVID={message.envid}".encode("ascii") if message.envid else b""
    if message.options is not NO_OPTIONS and message.options.priority and "MT-PRIORITY" in extensions:
        path += b" MT-PRIORITY=%d" % message.options.priority
    return path


def plan_recipients(
    recipients: Sequence[QueuedRecipient],
    verdicts: list[Reply | None],
    extensions: Container[str] = (),
    *,
    utf8: bool = False,
) -> list[RecipientPath]:
    """The argument of RCPT for each recipient; one that cannot be said gets its verdict at once."""
    has_dsn = "DSN" in extensions
    paths = []
    for number, recipient in enumerate(recipients):
        rendered = _render_path(recipient.forward_path, utf8)
        if rendered is None:
            verdicts[number] = NEEDS_SMTPUTF8
            continue
        if has_dsn:
            rendered += _dsn_words(recipient, utf8)
        paths.append(RecipientPath(number, rendered, recipient.forward_path.domain))
    return paths


def split_off(
    waiting: Sequence[RecipientPath], max_recipients: int, max_domains: int | None
) -> tuple[list[RecipientPath], list[RecipientPath]]:
    """Those of the next transaction, and the others: RCPTMAX and RCPTDOMAINMAX (RFC 9422 §4)."""
    if max_domains is None:
        return list(waiting[:max_recipients]), list(waiting[max_recipients:])
    first: list[RecipientPath] = []
    others: list[RecipientPath] = []
    domains: set[str] = set()
    for path in waiting:
        fits = path.domain in domains or len(domains) < max_domains
        if fits and len(first) < max_recipients:
            domains.add(path.domain)
            first.append(path)
        else:
            others.append(path)
    return first, others


def _dsn_words(recipient: QueuedRecipient, utf8: bool) -> bytes:
    """NOTIFY and ORCPT as they came; behind an alias of ours the sender's own word for the recipient, if it gave none."""
    dsn, words = recipient.dsn, ""
    if dsn is not NO_DSN_REQUEST:
        words = f" NOTIFY={dsn.notify}" if dsn.notify else ""
        if dsn.orcpt:
            return f"{words} ORCPT={dsn.orcpt if utf8 else orcpt_in_ascii(dsn.orcpt)}".encode()
    original = recipient.original
    if original is not recipient.forward_path and original != recipient.forward_path and original.domain:
        words += f" ORCPT={orcpt_of(original)}"
    return words.encode("ascii")


def _render_path(mailbox: Mailbox, utf8: bool) -> bytes | None:
    """`<local@domain>`; without SMTPUTF8 with the domain in A-labels, and None where the local part is not ASCII."""
    if utf8:
        text = str(mailbox)
        return None if _CONTROL.search(text) else f"<{text}>".encode()
    try:
        text = str(mailbox.in_ascii)
    except BadAddress:
        return None
    return None if _UNSAFE.search(text) else f"<{text}>".encode("ascii")
