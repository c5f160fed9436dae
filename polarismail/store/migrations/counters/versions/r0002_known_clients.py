# SPDX-License-Identifier: MIT
"""Clients that have passed the gate."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "counters0002"
down_revision = "counters0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "known_clients",
        sa.Column("network", sa.Text(), nullable=False),
        sa.Column("last_seen", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("network", name=op.f("pk_known_clients")),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_known_clients_last_seen", "known_clients", ["last_seen"], unique=False)
