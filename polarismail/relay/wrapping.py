# SPDX-License-Identifier: MIT
"""Queued recipients as octets, for another worker of the same server, with the contents that are at hand.

`length header contents`: 4 octets, a JSON object, and the inline contents one behind the other. Pure; both ends are the
same version of the same program, so that nothing is checked but the form.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from polarismail.store.interfaces import QueuedMessage, QueuedRecipient
from polarismail.store.statements import parse_stored_mailbox, parse_stored_path, render_path
from polarismail.values.envelope import NO_DSN_REQUEST, NO_OPTIONS, DsnRequest, MailOptions, stored_options

_MOST_CONTENT_OCTETS = 8 * 1024 * 1024
"""Of one frame; what is beyond is read from the spool."""


def wrap(recipients: Sequence[QueuedRecipient], hops: int) -> bytes:
    """`hops`: how often these have been handed over."""
    messages: dict[str, list[object]] = {}
    contents: list[bytes] = []
    octets = 0
    rows = []
    for each in recipients:
        message = each.message
        if message.queue_id not in messages:
            inline = message.inline
            if inline is not None and octets + len(inline) > _MOST_CONTENT_OCTETS:
                inline = None
            if inline is not None:
                contents.append(inline)
                octets += len(inline)
            messages[message.queue_id] = [
                message.queue_id, render_path(message.reverse_path), message.created, message.size, message.account_id,
                message.ret, message.envid, message.body, message.smtputf8, None if inline is None else len(inline),
                message.recipient_count, message.storage, _wrap_options(message.options),
            ]  # fmt: skip
        rows.append(
            [
                message.queue_id, each.number, render_path(each.forward_path), render_path(each.original), each.next_hop,
                each.account_id, each.attempts, each.next_attempt, each.expires, each.epoch, each.dsn.notify,
                each.dsn.orcpt, each.last_reply, each.warned,
            ]
        )  # fmt: skip
    header = json.dumps({"hops": hops, "messages": list(messages.values()), "recipients": rows}).encode("ascii")
    return b"".join((len(header).to_bytes(4, "big"), header, *contents))


def unwrap(octets: bytes) -> tuple[list[QueuedRecipient], int]:
    """What `wrap` wrote: the recipients, and the hops."""
    at = 4 + int.from_bytes(octets[:4], "big")
    header = json.loads(octets[4:at])
    messages: dict[str, QueuedMessage] = {}
    for row in header["messages"]:
        queue_id, path, created, size, account, ret, envid, body, smtputf8, length, count, storage, kept = row
        inline = None
        if length is not None:
            inline = octets[at : at + length]
            at += length
        reverse_path = parse_stored_path(path)
        messages[queue_id] = QueuedMessage(
            queue_id, reverse_path, created, size, account, ret, envid, body, smtputf8, inline, count, storage,
            stored_options(*kept) if kept else NO_OPTIONS,
        )  # fmt: skip
    found = []
    for row in header["recipients"]:
        (
            queue_id,
            number,
            path,
            original,
            next_hop,
            account,
            attempts,
            due,
            expires,
            epoch,
            notify,
            orcpt,
            reply,
            warned,
        ) = row
        dsn = DsnRequest(notify, orcpt) if notify or orcpt else NO_DSN_REQUEST
        forward_path = parse_stored_mailbox(path)
        found.append(
            QueuedRecipient(
                messages[queue_id], number, forward_path, forward_path if original == path else parse_stored_mailbox(original),
                next_hop, account, attempts, due, expires, epoch, dsn, reply, warned,
            )
        )  # fmt: skip
    return found, header["hops"]


def _wrap_options(options: MailOptions) -> list[float] | None:
    if options is NO_OPTIONS:
        return None
    return [options.flags, options.priority, options.hold_until, options.deliver_by]
