# SPDX-License-Identifier: MIT
"""Takes due recipients for one process, and gives them back: each recipient has one owner at a time.

On a server two processes that claim at once skip each other's rows instead of waiting for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, exists, func, select, tuple_, update

from polarismail.store import schema
from polarismail.store.interfaces import QueuedMessage, QueuedRecipient
from polarismail.store.statements import (
    IS_QUEUED,
    IS_UNOWNED,
    Driver,
    Statements,
    parse_stored_mailbox,
    parse_stored_path,
)
from polarismail.values.envelope import NO_DSN_REQUEST, DsnRequest, render_queue_id, stored_options

_messages, _recipients = schema.messages.c, schema.recipients.c
_AT_ONCE = 500  # bound parameters of one IN
CLAMPED_AT_ONCE = 2000

# Of messages, all that travels with a recipient: not the head, which may be large.
_MESSAGE_COLUMNS = (
    _messages.id, _messages.reverse_path, _messages.created, _messages.size, _messages.account_id, _messages.ret,
    _messages.envid, _messages.body, _messages.smtputf8, _messages.recipient_count, _messages.storage,
    _messages.flags, _messages.priority, _messages.hold_until, _messages.deliver_by,
)  # fmt: skip


def claim(connection: Connection, owner: int, now: float, limit: int) -> list[QueuedRecipient]:
    """Make up to `limit` due recipients ours; the ones that have been due longest first."""
    due = (
        select(_recipients.message_id, _recipients.number)
        .where(IS_QUEUED, IS_UNOWNED, _recipients.next_attempt <= now)
        .order_by(_recipients.next_attempt)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    taken = connection.execute(
        update(schema.recipients)
        .where(tuple_(_recipients.message_id, _recipients.number).in_(due))
        .values(owner=owner, epoch=_recipients.epoch + 1)
        .returning(*schema.recipients.c)
    ).all()
    messages = read_messages(connection, {row.message_id for row in taken})
    claimed = [read_recipient(messages[row.message_id], row) for row in taken]
    claimed.sort(key=lambda recipient: (recipient.next_attempt, recipient.message.queue_id, recipient.number))
    return claimed


def clamp(connection: Connection, now: float, longest_wait_seconds: float) -> bool:
    """Make due at once what would wait longer than anybody waits: its time is of a clock that was ahead (HOSTILE E5).
    What is held for the future (RFC 4865) has its time from its sender, and keeps it.

    Some thousand at a time, so that no transaction is long; returns whether there may be more.
    """
    is_held = exists().where(_messages.id == _recipients.message_id, _messages.hold_until >= _recipients.next_attempt)
    beyond = (
        select(_recipients.message_id, _recipients.number)
        .where(IS_QUEUED, IS_UNOWNED, _recipients.next_attempt > now + longest_wait_seconds, ~is_held)
        .order_by(_recipients.next_attempt)
        .limit(CLAMPED_AT_ONCE)
        .with_for_update(skip_locked=True)
    )
    changed = connection.execute(
        update(schema.recipients)
        .where(tuple_(_recipients.message_id, _recipients.number).in_(beyond))
        .values(next_attempt=now)
    )
    return changed.rowcount == CLAMPED_AT_ONCE


def release(
    connection: Connection, statements: Statements, owner: int, recipients: Sequence[tuple[int, int, int]]
) -> None:
    """Give back (message, number, epoch); those that are not ours any more stay as they are."""
    driver = Driver(connection)
    try:
        driver.run_many(statements.release, [(message, number, owner, epoch) for message, number, epoch in recipients])
    finally:
        driver.close()


def hand_over(
    connection: Connection, statements: Statements, owner: int, to: int, recipients: Sequence[tuple[int, int, int]]
) -> list[bool]:
    """Make (message, number, epoch) another process's; whether each was still ours. Their epochs have gone up by one."""
    driver = Driver(connection)
    try:
        rows = [(message, to, number, owner, epoch) for message, number, epoch in recipients]
        if driver.run_rows(statements.hand_over, rows) == len(rows):
            return [True] * len(rows)
        # Some were not ours any more: which ones, their owners and epochs tell.
        found = [driver.first(statements.find_owner, (message, number)) for message, number, _ in recipients]
        return [
            row is not None and tuple(row) == (to, epoch + 1)
            for row, (_, _, epoch) in zip(found, recipients, strict=True)
        ]
    finally:
        driver.close()


def owned(connection: Connection, owner: int, limit: int) -> list[tuple[int, int, int]]:
    """Recipients (message, number, epoch) that are queued and owned by this process. Reads the whole table."""
    columns = (_recipients.message_id, _recipients.number, _recipients.epoch)
    query = select(*columns).where(IS_QUEUED, _recipients.owner == owner).limit(limit)
    return [(row.message_id, row.number, row.epoch) for row in connection.execute(query)]


def release_messages(connection: Connection, numbers: Sequence[int], owner: int) -> None:
    """Give back every recipient of these messages that this process owns, known to it or not."""
    for some in _pieces(numbers):
        connection.execute(
            update(schema.recipients)
            .where(_recipients.message_id.in_(some), _recipients.owner == owner)
            .values(owner=0, epoch=_recipients.epoch + 1)
        )


def next_due(connection: Connection) -> float | None:
    """When the next unowned recipient is due; None where none waits."""
    found = connection.execute(select(func.min(_recipients.next_attempt)).where(IS_QUEUED, IS_UNOWNED)).scalar()
    return None if found is None else float(found)


def read_messages(connection: Connection, numbers: Iterable[int]) -> dict[int, QueuedMessage]:
    """Messages by number, without their octets."""
    found: dict[int, QueuedMessage] = {}
    for some in _pieces(list(numbers)):
        for row in connection.execute(select(*_MESSAGE_COLUMNS).where(_messages.id.in_(some))):
            found[row.id] = QueuedMessage(
                queue_id=render_queue_id(row.id),
                reverse_path=parse_stored_path(row.reverse_path),
                created=row.created,
                size=row.size,
                account_id=row.account_id,
                ret=row.ret,
                envid=row.envid,
                body=row.body,
                smtputf8=row.smtputf8,
                recipient_count=row.recipient_count,
                storage=row.storage,
                options=stored_options(row.flags, row.priority, row.hold_until, row.deliver_by),
            )
    return found


def read_recipient(message: QueuedMessage, row: Any) -> QueuedRecipient:
    """A recipient from its row."""
    forward_path = parse_stored_mailbox(row.forward_path)
    return QueuedRecipient(
        message=message,
        number=row.number,
        forward_path=forward_path,
        original=parse_stored_mailbox(row.original) if row.original else forward_path,
        next_hop=row.next_hop,
        account_id=row.account_id,
        attempts=row.attempts,
        next_attempt=row.next_attempt,
        expires=row.expires,
        epoch=row.epoch,
        dsn=DsnRequest(row.notify, row.orcpt) if row.notify or row.orcpt else NO_DSN_REQUEST,
        last_reply=row.last_reply,
        warned=row.warned,
    )


def _pieces(numbers: Sequence[int]) -> list[Sequence[int]]:
    return [numbers[at : at + _AT_ONCE] for at in range(0, len(numbers), _AT_ONCE)]
