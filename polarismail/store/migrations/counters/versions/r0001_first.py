# SPDX-License-Identifier: MIT
"""The first schema of `counters`."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "counters0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make every table."""
    op.create_table(
        "greylist",
        sa.Column("network", sa.Text(), nullable=False),
        sa.Column("reverse_path", sa.Text(), nullable=False),
        sa.Column("forward_path", sa.Text(), nullable=False),
        sa.Column("first_seen", sa.Double(), nullable=False),
        sa.Column("last_seen", sa.Double(), nullable=False),
        sa.Column("passed", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("passes", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("network", "reverse_path", "forward_path", name=op.f("pk_greylist")),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_greylist_last_seen", "greylist", ["last_seen"], unique=False)
    op.create_table(
        "greylist_clients",
        sa.Column("network", sa.Text(), nullable=False),
        sa.Column("passes", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("last_seen", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("network", name=op.f("pk_greylist_clients")),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_greylist_clients_last_seen", "greylist_clients", ["last_seen"], unique=False)
