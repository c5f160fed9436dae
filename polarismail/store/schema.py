# SPDX-License-Identifier: MIT
"""Every table that polarismail keeps: `main` (the spool, the directory, later the ledger) and `counters` (the greylist, clients
that need not wait at the gate).

Two databases, because a commit in `main` is a promise (synchronous=FULL) and one in `counters` is a memory (NORMAL), and
because WAL commits across attached files are not atomic. The migrations under `store/migrations` produce exactly this
(a test proves it); a change here comes with a revision there.

Times are seconds since 1970 as a double. Addresses are stored unquoted, `local@domain`, split at the last `@`: no domain
holds one. The null reverse-path is the empty string.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    text,
)

_NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}
main = MetaData(naming_convention=_NAMES)
counters = MetaData(naming_convention=_NAMES)

# SQLite's rowid must be spelled INTEGER, and is 64 bits wide there.
_Number = BigInteger().with_variant(Integer(), "sqlite")


def _text(name: str) -> Column[str]:
    return Column(name, Text, nullable=False, server_default="")


def _number(name: str) -> Column[int]:
    return Column(name, _Number, nullable=False, server_default=text("0"))


def _moment(name: str) -> Column[float]:
    return Column(name, Double, nullable=False, server_default=text("0"))


nodes = Table(
    "nodes",
    main,
    # Counted up at each start of a process and never reused: queue ids and ownership rest on it.
    Column("incarnation", _Number, primary_key=True, autoincrement=True),
    _text("hostname"),
    Column("pid", Integer, nullable=False),
    Column("started", Double, nullable=False),
    # By the database's clock, on PostgreSQL alone: on one machine a file lock tells who lives (store/nodes.py).
    _moment("lease_until"),
    Column("ended", Boolean, nullable=False, server_default=text("false")),
    sqlite_autoincrement=True,
)

messages = Table(
    "messages",
    main,
    Column("id", _Number, primary_key=True, autoincrement=False),  # the number behind the queue id
    _text("reverse_path"),
    Column("account_id", _Number),  # who submitted it
    _text("facts"),  # SessionFacts as a JSON object
    Column("created", Double, nullable=False),
    Column("size", _Number, nullable=False),  # octets of trace and content
    Column("ret", Text),
    Column("envid", Text),
    Column("body", Text),
    Column("smtputf8", Boolean, nullable=False, server_default=text("false")),
    Column("flags", Integer, nullable=False, server_default=text("0")),
    Column("priority", SmallInteger, nullable=False, server_default=text("0")),
    Column("campaign", Text),
    _moment("hold_until"),
    _moment("deliver_by"),
    Column("recipient_count", Integer, nullable=False),
    Column("storage", SmallInteger, nullable=False),  # content.INLINE, FILE, CHUNKS or MAILDIR
    # All octets where storage is INLINE, else the trace fields (behind two sizes for MAILDIR: content.parse_maildir_head).
    # Last, so that reading the others skips its overflow pages.
    Column("head", LargeBinary, nullable=False),
)

recipients = Table(
    "recipients",
    main,
    Column("message_id", _Number, nullable=False),
    Column("number", Integer, nullable=False),
    Column("forward_path", Text, nullable=False),
    _text("original"),  # empty where it is the forward-path
    Column("account_id", _Number),
    Column("orcpt", Text),
    Column("notify", Text),
    Column("next_hop", Text, nullable=False),
    _text("site"),
    _text("egress_source"),
    Column("state", SmallInteger, nullable=False, server_default=text("0")),  # envelope.RecipientState
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("next_attempt", Double, nullable=False),
    Column("expires", Double, nullable=False),
    _text("last_reply"),
    _text("remote"),
    Column("warned", Boolean, nullable=False, server_default=text("false")),
    _number("owner"),  # an incarnation; 0: nobody
    _number("epoch"),  # the fencing token: goes up with each change of owner
    _moment("lease_until"),  # 0: as long as the owner lives
    PrimaryKeyConstraint("message_id", "number"),
    sqlite_with_rowid=False,
)
# Partial: an accepted recipient belongs to its process at once, so that accepting and delivering never touch the index.
Index(
    "ix_recipients_due",
    recipients.c.next_attempt,
    sqlite_where=text("state = 0 AND owner = 0"),
    postgresql_where=text("state = 0 AND owner = 0"),
)

chunks = Table(
    "chunks",
    main,
    Column("message_id", _Number, nullable=False),
    Column("number", Integer, nullable=False),
    Column("octets", LargeBinary, nullable=False),
    PrimaryKeyConstraint("message_id", "number"),
)

domains = Table(
    "domains",
    main,
    Column("id", _Number, primary_key=True, autoincrement=True),
    Column("name", Text, nullable=False),  # lower case, A-labels
    Column("active", Boolean, nullable=False, server_default=text("true")),
    UniqueConstraint("name"),
    sqlite_autoincrement=True,
)

accounts = Table(
    "accounts",
    main,
    Column("id", _Number, primary_key=True, autoincrement=True),
    Column("domain_id", _Number, ForeignKey("domains.id"), nullable=False),
    Column("local_part", Text, nullable=False),
    Column("maildir", Text, nullable=False),
    Column("uid", _Number),
    Column("gid", _Number),
    _text("password_hash"),
    Column("active", Boolean, nullable=False, server_default=text("true")),
    Column("created", Double, nullable=False),
    UniqueConstraint("domain_id", "local_part"),
    sqlite_autoincrement=True,
)

aliases = Table(
    "aliases",
    main,
    Column("id", _Number, primary_key=True, autoincrement=True),
    Column("domain_id", _Number, ForeignKey("domains.id"), nullable=False),
    _text("local_part"),  # empty: the catch-all of the domain
    Column("targets", Text, nullable=False),  # addresses, one a line
    UniqueConstraint("domain_id", "local_part"),
    sqlite_autoincrement=True,
)

generations = Table(
    "generations",
    main,
    Column("name", Text, primary_key=True),
    Column("value", _Number, nullable=False),
)

greylist = Table(
    "greylist",
    counters,
    Column("network", Text, nullable=False),
    Column("reverse_path", Text, nullable=False),
    Column("forward_path", Text, nullable=False),
    Column("first_seen", Double, nullable=False),
    Column("last_seen", Double, nullable=False),
    Column("passed", Boolean, nullable=False, server_default=text("false")),
    Column("passes", Integer, nullable=False, server_default=text("0")),
    PrimaryKeyConstraint("network", "reverse_path", "forward_path"),
    Index("ix_greylist_last_seen", "last_seen"),
    sqlite_with_rowid=False,
)

greylist_clients = Table(
    "greylist_clients",
    counters,
    Column("network", Text, primary_key=True),
    Column("passes", Integer, nullable=False, server_default=text("0")),
    Column("last_seen", Double, nullable=False),
    Index("ix_greylist_clients_last_seen", "last_seen"),
    sqlite_with_rowid=False,
)

known_clients = Table(
    "known_clients",
    counters,
    Column("network", Text, primary_key=True),
    Column("last_seen", Double, nullable=False),
    Index("ix_known_clients_last_seen", "last_seen"),
    sqlite_with_rowid=False,
)
