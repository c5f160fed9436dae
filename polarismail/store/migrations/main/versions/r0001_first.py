# SPDX-License-Identifier: MIT
"""The first schema of `main`."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "main0001"
down_revision = None
branch_labels = None
depends_on = None

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Make every table."""
    op.create_table(
        "chunks",
        sa.Column("message_id", NUMBER, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("octets", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("message_id", "number", name=op.f("pk_chunks")),
    )
    op.create_table(
        "domains",
        sa.Column("id", NUMBER, autoincrement=True, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("active", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_domains")),
        sa.UniqueConstraint("name", name=op.f("uq_domains_name")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "generations",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", NUMBER, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_generations")),
    )
    op.create_table(
        "messages",
        sa.Column("id", NUMBER, autoincrement=False, nullable=False),
        sa.Column("reverse_path", sa.Text(), server_default="", nullable=False),
        sa.Column("account_id", NUMBER, nullable=True),
        sa.Column("facts", sa.Text(), server_default="", nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.Column("size", NUMBER, nullable=False),
        sa.Column("ret", sa.Text(), nullable=True),
        sa.Column("envid", sa.Text(), nullable=True),
        sa.Column("body", sa.Text(), nullable=True),
        sa.Column("smtputf8", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("flags", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("priority", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("campaign", sa.Text(), nullable=True),
        sa.Column("hold_until", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("deliver_by", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("recipient_count", sa.Integer(), nullable=False),
        sa.Column("storage", sa.SmallInteger(), nullable=False),
        sa.Column("head", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_messages")),
    )
    op.create_table(
        "nodes",
        sa.Column("incarnation", NUMBER, autoincrement=True, nullable=False),
        sa.Column("hostname", sa.Text(), server_default="", nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("started", sa.Double(), nullable=False),
        sa.Column("lease_until", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("ended", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.PrimaryKeyConstraint("incarnation", name=op.f("pk_nodes")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "recipients",
        sa.Column("message_id", NUMBER, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("forward_path", sa.Text(), nullable=False),
        sa.Column("original", sa.Text(), server_default="", nullable=False),
        sa.Column("account_id", NUMBER, nullable=True),
        sa.Column("orcpt", sa.Text(), nullable=True),
        sa.Column("notify", sa.Text(), nullable=True),
        sa.Column("next_hop", sa.Text(), nullable=False),
        sa.Column("site", sa.Text(), server_default="", nullable=False),
        sa.Column("egress_source", sa.Text(), server_default="", nullable=False),
        sa.Column("state", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("next_attempt", sa.Double(), nullable=False),
        sa.Column("expires", sa.Double(), nullable=False),
        sa.Column("last_reply", sa.Text(), server_default="", nullable=False),
        sa.Column("remote", sa.Text(), server_default="", nullable=False),
        sa.Column("warned", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("owner", NUMBER, server_default=sa.text("0"), nullable=False),
        sa.Column("epoch", NUMBER, server_default=sa.text("0"), nullable=False),
        sa.Column("lease_until", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("message_id", "number", name=op.f("pk_recipients")),
        sqlite_with_rowid=False,
    )
    op.create_index(
        "ix_recipients_due",
        "recipients",
        ["next_attempt"],
        unique=False,
        sqlite_where=sa.text("state = 0 AND owner = 0"),
        postgresql_where=sa.text("state = 0 AND owner = 0"),
    )
    op.create_table(
        "accounts",
        sa.Column("id", NUMBER, autoincrement=True, nullable=False),
        sa.Column("domain_id", NUMBER, nullable=False),
        sa.Column("local_part", sa.Text(), nullable=False),
        sa.Column("maildir", sa.Text(), nullable=False),
        sa.Column("uid", NUMBER, nullable=True),
        sa.Column("gid", NUMBER, nullable=True),
        sa.Column("password_hash", sa.Text(), server_default="", nullable=False),
        sa.Column("active", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("created", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["domain_id"], ["domains.id"], name=op.f("fk_accounts_domain_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_accounts")),
        sa.UniqueConstraint("domain_id", "local_part", name=op.f("uq_accounts_domain_id_local_part")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "aliases",
        sa.Column("id", NUMBER, autoincrement=True, nullable=False),
        sa.Column("domain_id", NUMBER, nullable=False),
        sa.Column("local_part", sa.Text(), server_default="", nullable=False),
        sa.Column("targets", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["domain_id"], ["domains.id"], name=op.f("fk_aliases_domain_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_aliases")),
        sa.UniqueConstraint("domain_id", "local_part", name=op.f("uq_aliases_domain_id_local_part")),
        sqlite_autoincrement=True,
    )
