# SPDX-License-Identifier: MIT
"""Trace fields: what we say about how a message came here, whatever the client said about itself.

RFC 5321 §4.4 (Received, Return-Path), RFC 3848 (WITH). Delivered-To is what maildrops and loop guards look at.

Guarantees: no octet of a client's name can end a line, open a comment or hide another field: what may not stand is shown
as "?". No line is longer than 998 octets (RFC 5322 §2.1.1). The login's name is not told to the world.
"""

from __future__ import annotations

import re

from polarismail.message.headers import render_date
from polarismail.values.address import Mailbox
from polarismail.values.envelope import ReversePath, SessionFacts
from polarismail.values.network import LOCAL_CLIENT

_UNSAFE_NAME = re.compile(r"[^A-Za-z0-9._:\[\]+=/-]")
_UNSAFE_TEXT = re.compile(r"[^A-Za-z0-9._:+=/ -]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def received_field(
    facts: SessionFacts,
    hostname: str,
    queue_id: str,
    recipient: Mailbox | None,
    when: float,
    *,
    smtputf8: bool = False,
    priority: int = 0,
) -> bytes:
    """The Received field of a message that is accepted now, folded, with its CRLF.

    `recipient` is the argument of RCPT where there was just one (more would tell blind copies), `when` seconds since 1970.
    `smtputf8`: the transaction was one (RFC 6531 §4.3). `priority`: see RFC 6710 §7; 0 goes without saying.
    """
    # Mail that is made here (a DSN) has no client, and nothing was spoken.
    protocol = facts.protocol if not smtputf8 else "UTF8" + facts.protocol.removeprefix("E")
    spoken = f" with {protocol}" if facts.client_address else ""
    tls = f" ({_UNSAFE_TEXT.sub('?', facts.tls[:100])})" if facts.tls else ""
    urgency = f"\r\n\tPRIORITY {priority}" if priority else ""
    target = f"\r\n\tfor <{_safe_path(recipient)}>" if recipient is not None else ""
    return (
        f"Received: {_source(facts)}by {hostname}{spoken}{tls}\r\n\tid {queue_id}{target}{urgency};"
        f"\r\n\t{render_date(when)}\r\n"
    ).encode("utf-8", "replace")


def return_path_field(reverse_path: ReversePath) -> bytes:
    """The Return-Path field of final delivery (RFC 5321 §4.4), with its CRLF."""
    return f"Return-Path: <{_safe_path(reverse_path) if reverse_path is not None else ''}>\r\n".encode(
        "utf-8", "replace"
    )


def delivered_to_field(mailbox: Mailbox) -> bytes:
    """The Delivered-To field of final delivery, with its CRLF."""
    return f"Delivered-To: {_safe_path(mailbox)}\r\n".encode("utf-8", "replace")


def delivery_fields(reverse_path: ReversePath, forward_path: Mailbox) -> bytes:
    """What final delivery puts in front (RFC 5321 §4.4): Return-Path, Delivered-To."""
    return return_path_field(reverse_path) + delivered_to_field(forward_path)


def _source(facts: SessionFacts) -> str:
    if not facts.client_address:
        return ""
    helo = _safe_name(facts.helo) or "unknown"
    if facts.client_address == LOCAL_CLIENT:
        return f"from {helo} (local)\r\n\t"
    kind = "IPv6:" if ":" in facts.client_address else ""
    return f"from {helo} ({_safe_name(facts.client_name) or 'unknown'} [{kind}{facts.client_address}])\r\n\t"


def _safe_name(name: str) -> str:
    return _UNSAFE_NAME.sub("?", name[:255])


def _safe_path(mailbox: Mailbox) -> str:
    # A parsed Mailbox holds no control character; one that was made by hand must not break the header section either.
    return _CONTROL.sub("?", str(mailbox))
