# SPDX-License-Identifier: MIT
"""Brings a database to the present schema, in one transaction: two lines of revisions, `main` and `counters`.

Alembic is imported only when there is something to do: a command that opens an up-to-date database does not pay for it.
"""

from __future__ import annotations

import os
from typing import Any

from sqlalchemy import Connection, MetaData, create_engine, inspect, text

from polarismail.store import schema
from polarismail.store.dialects import lock_migrations
from polarismail.values.errors import ConfigError

# The newest revision of each line; a test compares them with the files.
HEADS = {"main": "main0001", "counters": "counters0002"}
METADATA: dict[str, MetaData] = {"main": schema.main, "counters": schema.counters}


def current(connection: Connection, branch: str) -> str | None:
    """The revision that the database is at; None for an empty one."""
    table = f"alembic_version_{branch}"
    if not inspect(connection).has_table(table):
        return None
    # The name is one of two of ours, never somebody else's text.
    return connection.execute(text(f"SELECT version_num FROM {table}")).scalar()


def migrate(connection: Connection, branch: str) -> bool:
    """Run what is missing; returns whether anything was. The caller commits.

    Raises ConfigError where the database is newer than this program.
    """
    if branch not in HEADS:
        raise ConfigError(f"{branch!r} is no line of migrations")
    if current(connection, branch) == HEADS[branch]:
        return False
    lock_migrations(connection)
    from alembic import command
    from alembic.util.exc import CommandError

    try:
        command.upgrade(configuration(branch, connection), "head")
    except CommandError as problem:
        raise ConfigError(f"the database {branch!r} cannot be migrated: {problem}") from problem
    return True


def rehearse() -> None:
    """Run every migration on databases in memory, so that all that they import is loaded: for a process that is about to
    become another user, who may not be allowed to read where Python is installed."""
    for branch in HEADS:
        engine = create_engine("sqlite://")
        with engine.begin() as connection:
            migrate(connection, branch)
        engine.dispose()


def configuration(branch: str, connection: Connection | None = None) -> Any:
    """Alembic's Config of one line."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", os.path.join(os.path.dirname(__file__), branch).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
