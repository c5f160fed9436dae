# SPDX-License-Identifier: MIT
"""What an operator does to the queue: look, retry, hold, let go, delete; in pieces, so that mail keeps flowing meanwhile.

No transaction looks at more than some thousand recipients, whatever waits: a filter that meets few of a million is applied
range by range, on a reader's thread, and the writers' lock is held only for what is found. `counts` alone looks at all.

A recipient that is being tried keeps its owner: a hold lets that attempt finish and count; a retry leaves it alone; a
delete takes the row from under it, and its outcome changes nothing. Whoever works on recipients hears of each change by
`on_operator_change`, and gives back what it had in line but had not begun.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import monotonic
from typing import Any

from attrs import frozen
from sqlalchemy import ColumnElement, Connection, Select, and_, case, delete, func, or_, select, tuple_, update
from twisted.internet.defer import Deferred, succeed

from polarismail.store import claims, schema
from polarismail.store.content import CHUNKS, delete_chunks
from polarismail.store.database import Database
from polarismail.store.interfaces import QueuedMessage, QueuedRecipient
from polarismail.store.statements import IS_OPEN, IS_UNOWNED, parse_facts
from polarismail.values.envelope import RecipientState, SessionFacts, parse_queue_id, render_queue_id

_messages, _recipients = schema.messages.c, schema.recipients.c
_KEY = tuple_(_recipients.message_id, _recipients.number)
_PIECE = 500  # recipients changed by one transaction
_SCANNED = 5000  # recipients looked at by one
_START, _LAST = (-1, -1), 1 << 30
# What was counted is told again for so many times as long as counting took: who asks often must not read all the time.
_COUNTED_TIMES = 10.0
_MANY = 50_000  # messages

Key = tuple[int, int]  # message, number of the recipient
OperatorCallback = Callable[[str, list[tuple[str, int]]], None]


@frozen
class QueueFilter:
    """Which open recipients: all conditions that are given hold together. An empty filter means every one."""

    queue_ids: tuple[str, ...] = ()
    reverse_path: str | None = None  # an address, "" or "<>" for the null one, or "@domain"
    forward_path: str | None = None  # an address, or "@domain"
    next_hop: str | None = None
    states: tuple[RecipientState, ...] = ()  # QUEUED, HELD
    account_id: int | None = None  # who submitted it


@frozen
class QueueRecipient:
    """One recipient as the operator sees it."""

    recipient: QueuedRecipient
    state: RecipientState
    owned: bool  # somebody has it in hand now
    remote: str  # where the last attempt went


@frozen
class QueueEntry:
    """One message as the operator sees it. In a list, `recipients` are those that the filter met; shown alone, all."""

    message: QueuedMessage
    facts: SessionFacts
    recipients: tuple[QueueRecipient, ...]


@frozen
class QueueCounts:
    """How much waits."""

    messages: int = 0
    queued: int = 0
    held: int = 0
    owned: int = 0  # of those queued, the ones that somebody has in hand


class QueueOperations:
    """The operator's side of the spool. Deferreds fail with Unavailable; a broken queue id raises ValueError at once."""

    def __init__(self, database: Database, now: Callable[[], float]) -> None:
        self._database, self._now = database, now
        self._callbacks: list[OperatorCallback] = []
        self._counted: tuple[float, QueueCounts] | None = None

    def on_operator_change(self, callback: OperatorCallback) -> None:
        """Call `callback(action, [(queue_id, number), ...])` after each committed change, on the reactor's thread.

        Actions: "retry", "hold", "unhold", "delete"; and "released", with an empty list, when a dead process's recipients
        have become claimable.
        """
        self._callbacks.append(callback)

    # -- looking

    def counts(self) -> Deferred[QueueCounts]:
        """How much waits; with a million in the queue, up to some seconds ago."""
        if self._counted is not None and monotonic() < self._counted[0]:
            return succeed(self._counted[1])
        self._counted = None
        began = monotonic()

        def remember(counts: QueueCounts) -> QueueCounts:
            if counts.messages >= _MANY:
                self._counted = monotonic() + _COUNTED_TIMES * (monotonic() - began), counts
            return counts

        return self._database.read(_count).addCallback(remember)

    def select(
        self, chosen: QueueFilter | None = None, limit: int = 100, after: str = ""
    ) -> Deferred[list[QueueEntry]]:
        """Messages, oldest first, at most `limit`, those behind the queue id `after`."""
        chosen = chosen or QueueFilter()
        return Deferred.fromCoroutine(self._select(chosen, limit, (parse_queue_id(after), _LAST) if after else _START))

    async def _select(self, chosen: QueueFilter, limit: int, last: Key) -> list[QueueEntry]:
        found: list[QueueEntry] = []
        conditions = _conditions(chosen)
        while True:
            job = partial(_read_page, conditions=conditions, limit=limit - len(found), last=last, chosen=chosen)
            entries, end = await self._database.read(job)
            found += entries
            if end is None or len(found) >= limit:
                return found
            last = end

    def show(self, queue_id: str) -> Deferred[QueueEntry | None]:
        """One message with all its recipients; None where it is not in the spool."""
        number = parse_queue_id(queue_id)

        def read(connection: Connection) -> QueueEntry | None:
            entries = _read_entries(connection, [number], [])
            return entries[0] if entries else None

        return self._database.read(read)

    # -- changing; each fires with the number of recipients that changed

    def retry(self, chosen: QueueFilter) -> Deferred[int]:
        """Make what is queued due now; what somebody has in hand is being tried already, and what is held for the future is
        not to be delivered sooner."""
        now = self._now()
        conditions = [_recipients.state == RecipientState.QUEUED, _recipients.owner == 0, _messages.hold_until <= now]
        return self._changing("retry", chosen, conditions, {"next_attempt": now})

    def hold(self, chosen: QueueFilter) -> Deferred[int]:
        """Keep what is queued from being tried again, until `unhold`."""
        return self._changing(
            "hold", chosen, [_recipients.state == RecipientState.QUEUED], {"state": int(RecipientState.HELD)}
        )

    def unhold(self, chosen: QueueFilter) -> Deferred[int]:
        """Queue again what is on hold, due now, or when its sender wants it to be released."""
        now = self._now()
        release = select(_messages.hold_until).where(_messages.id == _recipients.message_id).scalar_subquery()
        due = case((release > now, release), else_=now)
        values = {"state": int(RecipientState.QUEUED), "next_attempt": due}
        return self._changing("unhold", chosen, [_recipients.state == RecipientState.HELD], values)

    def delete(self, chosen: QueueFilter) -> Deferred[int]:
        """Drop recipients, without a DSN; a message leaves with its last one."""
        return self._changing("delete", chosen, [], None)

    # -- inside

    def _removed(self, messages: Sequence[tuple[str, int]]) -> None:
        """Messages (queue id, storage) have left: what else there is of them may go."""

    def _changed(self, action: str, recipients: list[tuple[str, int]]) -> None:
        for callback in self._callbacks:
            callback(action, recipients)

    def _changing(self, *arguments: Any) -> Deferred[int]:
        return Deferred.fromCoroutine(self._change(*arguments))

    async def _change(
        self, action: str, chosen: QueueFilter, conditions: list[ColumnElement[bool]], values: dict[str, Any] | None
    ) -> int:
        conditions = [*_conditions(chosen), *conditions]
        last: Key | None = _START
        count = 0
        while last is not None:
            job = partial(_find_keys, conditions=conditions, last=last, chosen=chosen)
            keys, last = await self._database.read(job)
            if not keys:
                continue
            keys, left = await self._database.write(partial(_change_piece, conditions, values, keys))
            count += len(keys)
            if left:
                self._removed(left)
            if keys:
                self._changed(action, [(render_queue_id(number), at) for number, at in keys])
        return count


def _within(connection: Connection, last: Key, chosen: QueueFilter) -> tuple[list[ColumnElement[bool]], Key | None]:
    """The conditions for the next recipients behind `last`, so many as one transaction may look at; and the last of them,
    or None where there are no more. Named messages are few, and found by their key: then it is all at once."""
    behind = tuple_(*last) < _KEY
    if chosen.queue_ids:
        return [behind], None
    query = select(_recipients.message_id, _recipients.number).where(behind)
    query = query.order_by(_recipients.message_id, _recipients.number).limit(1).offset(_SCANNED - 1)
    row = connection.execute(query).first()
    return ([behind], None) if row is None else ([behind, tuple_(row[0], row[1]) >= _KEY], (row[0], row[1]))


def _read_page(
    connection: Connection, conditions: list[ColumnElement[bool]], limit: int, last: Key, chosen: QueueFilter
) -> tuple[list[QueueEntry], Key | None]:
    """Entries, and where to go on."""
    within, end = _within(connection, last, chosen)
    query = _joined(select(_recipients.message_id).distinct(), [*conditions, *within])
    numbers = list(connection.execute(query.order_by(_recipients.message_id).limit(limit)).scalars())
    if end is not None:
        # A message is shown with all its recipients that are met, not with those of one range.
        end = (numbers[-1], _LAST) if numbers and numbers[-1] == end[0] else end
    return _read_entries(connection, numbers, conditions), end


def _find_keys(
    connection: Connection, conditions: list[ColumnElement[bool]], last: Key, chosen: QueueFilter
) -> tuple[list[Key], Key | None]:
    """Keys of the next recipients to change, and where to go on."""
    within, end = _within(connection, last, chosen)
    query = _joined(select(_recipients.message_id, _recipients.number), [*conditions, *within])
    query = query.order_by(_recipients.message_id, _recipients.number).limit(_PIECE)
    keys = [(row[0], row[1]) for row in connection.execute(query)]
    return keys, keys[-1] if len(keys) == _PIECE else end


def _change_piece(
    conditions: list[ColumnElement[bool]], values: dict[str, Any] | None, found: Sequence[Key], connection: Connection
) -> tuple[list[Key], list[tuple[str, int]]]:
    """Change those of the recipients that are still like that; returns their keys, and the messages that left."""
    query = _joined(select(_recipients.message_id, _recipients.number), [*conditions, _KEY.in_(found)])
    query = query.order_by(_recipients.message_id, _recipients.number)
    keys = [(row[0], row[1]) for row in connection.execute(query.with_for_update(of=schema.recipients))]
    if not keys:
        return [], []
    these = _KEY.in_(keys)
    if values is not None:
        connection.execute(update(schema.recipients).where(these).values(**values))
        return keys, []
    connection.execute(
        update(schema.recipients)
        .where(these)
        .values(
            state=int(RecipientState.DELETED),
            last_reply="deleted by the operator",
            owner=0,
            epoch=_recipients.epoch + 1,
        )
    )
    numbers = sorted({number for number, _ in keys})
    still_open = select(_recipients.message_id).where(_recipients.message_id.in_(numbers), IS_OPEN)
    gone = connection.execute(
        delete(schema.messages)
        .where(_messages.id.in_(numbers), _messages.id.not_in(still_open))
        .returning(_messages.id, _messages.storage)
    ).all()
    left = [row.id for row in gone]
    connection.execute(delete(schema.recipients).where(_recipients.message_id.in_(left)))
    if any(row.storage == CHUNKS for row in gone):
        delete_chunks(connection, left)
    return keys, [(render_queue_id(row.id), row.storage) for row in gone]


def _conditions(chosen: QueueFilter) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = [IS_OPEN]
    if chosen.queue_ids:
        conditions.append(_recipients.message_id.in_([parse_queue_id(text) for text in chosen.queue_ids]))
    if chosen.reverse_path is not None:
        path = chosen.reverse_path.removeprefix("<").removesuffix(">")
        conditions.append(_matches(_messages.reverse_path, path))
    if chosen.forward_path is not None:
        conditions.append(_matches(_recipients.forward_path, chosen.forward_path))
    if chosen.next_hop is not None:
        conditions.append(_recipients.next_hop == chosen.next_hop.lower())
    if chosen.states:
        conditions.append(_recipients.state.in_([int(state) for state in chosen.states]))
    if chosen.account_id is not None:
        conditions.append(_messages.account_id == chosen.account_id)
    return conditions


def _matches(column: Any, text: str) -> ColumnElement[bool]:
    lowered = func.lower(column)
    if text[:1] == "@":
        return lowered.endswith(text.lower(), autoescape=True)
    return or_(column == text, lowered == text.lower())


def _joined(query: Select[Any], conditions: Sequence[ColumnElement[bool]]) -> Select[Any]:
    joined = query.select_from(schema.recipients.join(schema.messages, _messages.id == _recipients.message_id))
    return joined.where(and_(*conditions))


def _count(connection: Connection) -> QueueCounts:
    by_state: dict[tuple[int, bool], int] = {}
    messages = 0
    # Each message has its first recipient's row for as long as it is there: counting those is one pass instead of a sort.
    first = func.count().filter(_recipients.number == 0)
    query = select(_recipients.state, IS_UNOWNED, func.count(), first).group_by(_recipients.state, IS_UNOWNED)
    for state, unowned, count, firsts in connection.execute(query):
        by_state[state, not unowned] = count
        messages += firsts
    queued, held = int(RecipientState.QUEUED), int(RecipientState.HELD)
    in_hand = by_state.get((queued, True), 0)
    return QueueCounts(
        messages=messages,
        queued=by_state.get((queued, False), 0) + in_hand,
        held=by_state.get((held, False), 0) + by_state.get((held, True), 0),
        owned=in_hand,
    )


def _read_entries(
    connection: Connection, numbers: Sequence[int], conditions: Sequence[ColumnElement[bool]]
) -> list[QueueEntry]:
    messages = claims.read_messages(connection, numbers)
    facts = {
        row[0]: row[1]
        for some in _pieces(numbers)
        for row in connection.execute(select(_messages.id, _messages.facts).where(_messages.id.in_(some)))
    }
    recipients: dict[int, list[QueueRecipient]] = {}
    for some in _pieces(numbers):
        query = _joined(select(schema.recipients), [*conditions, _recipients.message_id.in_(some)])
        for row in connection.execute(query.order_by(_recipients.message_id, _recipients.number)):
            recipients.setdefault(row.message_id, []).append(
                QueueRecipient(
                    claims.read_recipient(messages[row.message_id], row),
                    RecipientState(row.state),
                    row.owner != 0,
                    row.remote,
                )
            )
    return [
        QueueEntry(messages[number], parse_facts(facts[number]), tuple(recipients.get(number, ())))
        for number in numbers
        if number in messages
    ]


def _pieces(numbers: Sequence[int]) -> Iterator[Sequence[int]]:
    for at in range(0, len(numbers), 500):
        yield numbers[at : at + 500]
