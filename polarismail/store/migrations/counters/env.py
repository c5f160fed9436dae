# SPDX-License-Identifier: MIT
"""Runs the revisions of the `counters` database on the connection that `store.migrations.migrate` hands over."""

from __future__ import annotations

from alembic import context

from polarismail.store import schema


def run() -> None:
    """Migrate inside the caller's transaction: all revisions, or none."""
    context.configure(
        connection=context.config.attributes["connection"],
        target_metadata=schema.counters,
        version_table="alembic_version_counters",
        transactional_ddl=True,
    )
    with context.begin_transaction():
        context.run_migrations()


# Alembic loads this file under this name; importing it by its real name does nothing.
if __name__ == "env_py":
    run()
