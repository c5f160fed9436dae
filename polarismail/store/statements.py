# SPDX-License-Identifier: MIT
"""The statements of the spool's hot path: compiled once by SQLAlchemy, run for whole groups by the driver.

Compiling and wrapping cost ten times what SQLite needs for a row, so the committer hands tuples, in the order that is
written here, to the driver itself: many rows to one statement where it can be written so, else to `executemany`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection, Dialect, Table, bindparam, delete, exists, insert, literal_column, select, update

from polarismail.store import schema
from polarismail.values.address import Mailbox
from polarismail.values.envelope import RecipientState, ReversePath, SessionFacts

_messages, _recipients = schema.messages.c, schema.recipients.c

# Literals, not parameters: the planner must see that the partial index of due recipients applies.
IS_QUEUED = _recipients.state == literal_column(str(int(RecipientState.QUEUED)))
IS_UNOWNED = _recipients.owner == literal_column("0")
IS_OPEN = _recipients.state < literal_column(str(int(RecipientState.DELIVERED)))

_MESSAGE_COLUMNS = (
    "id", "reverse_path", "account_id", "facts", "created", "size", "ret", "envid", "body", "smtputf8",
    "recipient_count", "storage", "head",
)  # fmt: skip
_RECIPIENT_COLUMNS = (
    "message_id", "number", "forward_path", "original", "account_id", "orcpt", "notify", "next_hop", "next_attempt",
    "expires", "owner",
)  # fmt: skip
# 13 parameters a message: far below what SQLite and PostgreSQL take, and few enough texts for the driver's cache.
_MOST_ROWS = 32
_FENCE = ("fenced_id", "fenced_number", "fenced_owner", "fenced_epoch")


class Statement:
    """One statement as the driver takes it."""

    __slots__ = ("text",)

    def __init__(self, clause: Any, dialect: Dialect, order: Sequence[str], column_keys: Sequence[str] | None = None):
        """Raises ValueError where the compiled order of parameters is not `order`: rows would go into wrong columns."""
        compiled = clause.compile(dialect=dialect, column_keys=column_keys)
        if list(compiled.positiontup or ()) != list(order):
            raise ValueError(f"{clause}: parameters are {compiled.positiontup}, expected {order}")
        self.text = str(compiled)


class RowsStatement:
    """One statement for several rows at once, for each number of rows that is a power of two.

    The driver lets go of the interpreter for each step of SQLite; beside a busy reactor, getting it back costs more than
    the row. So a group of rows is one step wherever its statement can be written that way.
    """

    __slots__ = ("_texts", "fixed", "leading")

    def __init__(
        self, make: Callable[[int], tuple[Any, Sequence[str]]], dialect: Dialect, fixed: int = 0, leading: int = 0
    ):
        """`make(rows)` returns the clause and the order of its parameters: those of each row, and `fixed` more, `leading` of
        them in front and the others behind. Raises ValueError where the compiled order is another."""
        self.fixed, self.leading = fixed, leading
        self._texts: dict[int, str] = {}
        for power in range(_MOST_ROWS.bit_length()):
            clause, order = make(1 << power)
            self._texts[1 << power] = Statement(clause, dialect, order).text

    def pieces(self, rows: Sequence[tuple[Any, ...]]) -> Iterator[tuple[str, Sequence[tuple[Any, ...]]]]:
        """The rows in as few statements as there are texts for."""
        at = 0
        while at < len(rows):
            size = min(_MOST_ROWS, 1 << ((len(rows) - at).bit_length() - 1))
            yield self._texts[size], rows[at : at + size]
            at += size


def _insert_rows(table: Table, columns: Sequence[str]) -> Callable[[int], tuple[Any, Sequence[str]]]:
    def make(rows: int) -> tuple[Any, Sequence[str]]:
        names = [[f"{column}_m{at}" for column in columns] for at in range(rows)]
        values: list[dict[str, Any]] = [dict(zip(columns, map(bindparam, row), strict=True)) for row in names]
        return insert(table).inline().values(values), [name for row in names for name in row]

    return make


def _delete_rows(column: Any, *fixed: tuple[Any, str]) -> Callable[[int], tuple[Any, Sequence[str]]]:
    def make(rows: int) -> tuple[Any, Sequence[str]]:
        keys = [f"key_{at}" for at in range(rows)]
        clause = delete(column.table).where(
            column.in_([bindparam(key) for key in keys]), *(other == bindparam(name) for other, name in fixed)
        )
        return clause, [*keys, *(name for _, name in fixed)]

    return make


def _update_rows(
    column: Any, values: dict[str, Any], leading: Sequence[str], *fixed: tuple[Any, str]
) -> Callable[[int], tuple[Any, Sequence[str]]]:
    def make(rows: int) -> tuple[Any, Sequence[str]]:
        keys = [f"key_{at}" for at in range(rows)]
        conditions = (
            column.in_([bindparam(key) for key in keys]),
            *(other == bindparam(name) for other, name in fixed),
        )
        return update(column.table).where(*conditions).values(**values), [*leading, *keys, *(name for _, name in fixed)]

    return make


class Statements:
    """Every hot statement, for one dialect."""

    def __init__(self, dialect: Dialect) -> None:
        messages, recipients = schema.messages, schema.recipients
        fence = (
            _recipients.message_id == bindparam("fenced_id"),
            _recipients.number == bindparam("fenced_number"),
            _recipients.owner == bindparam("fenced_owner"),
            _recipients.epoch == bindparam("fenced_epoch"),
        )
        given_back = {"owner": literal_column("0"), "epoch": _recipients.epoch + literal_column("1")}
        tried = {
            "attempts": _recipients.attempts + literal_column("1"),
            "last_reply": bindparam("new_reply"),
            "remote": bindparam("new_remote"),
            **given_back,
        }
        self.insert_message = RowsStatement(_insert_rows(messages, _MESSAGE_COLUMNS), dialect)
        self.insert_recipient = RowsStatement(_insert_rows(recipients, _RECIPIENT_COLUMNS), dialect)
        self.set_options = Statement(
            update(messages)
            .where(_messages.id == bindparam("key"))
            .values(
                flags=bindparam("new_flags"),
                priority=bindparam("new_priority"),
                hold_until=bindparam("new_hold_until"),
                deliver_by=bindparam("new_deliver_by"),
            ),
            dialect,
            ("new_flags", "new_priority", "new_hold_until", "new_deliver_by", "key"),
        )
        # The last recipient of its message, or all of them in one group: row by row, fenced, then the message.
        self.delete_recipient = RowsStatement(
            _delete_rows(
                _recipients.message_id,
                (_recipients.number, "fenced_number"),
                (_recipients.owner, "fenced_owner"),
                (_recipients.epoch, "fenced_epoch"),
            ),
            dialect,
            fixed=3,
        )
        self.delete_message = RowsStatement(_delete_rows(_messages.id), dialect)
        self.delete_chunks = Statement(
            delete(schema.chunks).where(schema.chunks.c.message_id == bindparam("key")), dialect, ("key",)
        )
        # One of several: the row stays, for the operator to see, until its message leaves.
        self.finish = Statement(
            update(recipients).where(*fence).values(state=bindparam("new_state"), **tried),
            dialect,
            ("new_state", "new_reply", "new_remote", *_FENCE),
        )
        self.defer = Statement(
            update(recipients)
            .where(*fence)
            .values(next_attempt=bindparam("new_attempt"), warned=bindparam("new_warned"), **tried),
            dialect,
            ("new_attempt", "new_reply", "new_remote", "new_warned", *_FENCE),
        )
        self.release = Statement(update(recipients).where(*fence).values(**given_back), dialect, _FENCE)
        # Rows that differ in nothing but their message go together, as they were accepted together.
        self.hand_over = RowsStatement(
            _update_rows(
                _recipients.message_id,
                {"owner": bindparam("new_owner"), "epoch": _recipients.epoch + literal_column("1")},
                ("new_owner",),
                (_recipients.number, "fenced_number"),
                (_recipients.owner, "fenced_owner"),
                (_recipients.epoch, "fenced_epoch"),
            ),
            dialect,
            fixed=4,
            leading=1,
        )
        self.find_owner = Statement(
            select(_recipients.owner, _recipients.epoch).where(
                _recipients.message_id == bindparam("key"), _recipients.number == bindparam("fenced_number")
            ),
            dialect,
            ("key", "fenced_number"),
        )
        still_open = exists().where(_recipients.message_id == _messages.id, IS_OPEN)
        self.delete_finished_message = Statement(
            delete(messages).where(_messages.id == bindparam("key"), ~still_open), dialect, ("key",)
        )
        self.delete_recipients = Statement(
            delete(recipients).where(_recipients.message_id == bindparam("key")), dialect, ("key",)
        )


class Driver:
    """The driver's cursor under a SQLAlchemy connection, for one group."""

    __slots__ = ("_cursor",)

    def __init__(self, connection: Connection) -> None:
        self._cursor: Any = connection.connection.cursor()

    def run(self, statement: Statement, row: tuple[Any, ...]) -> int:
        """How many rows changed."""
        self._cursor.execute(statement.text, row)
        return int(self._cursor.rowcount)

    def run_many(self, statement: Statement, rows: Sequence[tuple[Any, ...]]) -> int:
        """How many rows changed, in all."""
        if not rows:
            return 0
        if len(rows) == 1:
            return self.run(statement, rows[0])
        self._cursor.executemany(statement.text, rows)
        return int(self._cursor.rowcount)

    def run_rows(self, statement: RowsStatement, rows: Sequence[tuple[Any, ...]]) -> int:
        """How many rows changed, in all. Rows that end alike in the statement's fixed parameters go together."""
        changed, fixed, leading = 0, statement.fixed, statement.leading
        if fixed:
            alike: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
            for row in rows:
                alike.setdefault(row[-fixed:], []).append(row[:-fixed])
        else:
            alike = {(): list(rows)} if rows else {}
        for ending, group in alike.items():
            for text, piece in statement.pieces(group):
                self._cursor.execute(text, [*ending[:leading], *chain.from_iterable(piece), *ending[leading:]])
                changed += int(self._cursor.rowcount)
        return changed

    def first(self, statement: Statement, row: tuple[Any, ...]) -> Any:
        """The first row that it finds; None where there is none."""
        self._cursor.execute(statement.text, row)
        return self._cursor.fetchone()

    def close(self) -> None:
        self._cursor.close()


_TO_BASE_32 = str.maketrans("abcdefghjkmnpqrstvwxyz", "abcdefghijklmnopqrstuv")


def number_of(queue_id: str) -> int:
    """The number behind a queue id of ours: `parse_queue_id` without its checks, five times as fast."""
    return int(queue_id.translate(_TO_BASE_32), 32)


def render_path(path: ReversePath) -> str:
    """As the database keeps it: unquoted, "" for the null reverse-path."""
    return "" if path is None else f"{path.local}@{path.domain}"


def parse_stored_path(text: str) -> ReversePath:
    """What `render_path` wrote."""
    return parse_stored_mailbox(text) if text else None


@lru_cache(4096)
def parse_stored_mailbox(text: str) -> Mailbox:
    """What `render_path` wrote of an address."""
    local, _, domain = text.rpartition("@")
    return Mailbox(local, domain)


_FACTS = tuple(field.name for field in SessionFacts.__attrs_attrs__)
_facts_of = attrgetter(*_FACTS)
_render_json = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode


def render_facts(facts: SessionFacts) -> str:
    """A JSON object without the empty ones."""
    return _render_json({name: value for name, value in zip(_FACTS, _facts_of(facts), strict=True) if value})


def parse_facts(text: str) -> SessionFacts:
    """What `render_facts` wrote; fields that this version does not know are ignored."""
    known = {field.name for field in SessionFacts.__attrs_attrs__}
    return SessionFacts(**{name: value for name, value in json.loads(text or "{}").items() if name in known})
