# SPDX-License-Identifier: MIT
"""Migrations make exactly the schema that the code is written against, on both databases."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text

from polarismail.store import migrations, schema
from polarismail.store.dialects import make_engine
from polarismail.values.errors import ConfigError
from tests.databases import KINDS, database_url

BRANCHES = ("main", "counters")


def engine_for(kind: str, directory: Path, name: str) -> Engine:
    return make_engine(database_url(kind, directory, name), durable=True, writes=True)


def describe(connection: Connection) -> list[Any]:
    """Everything that the database says of its tables, but for the order of making them."""
    if connection.dialect.name == "sqlite":
        rows = connection.execute(text("SELECT type, name, tbl_name, sql FROM sqlite_master")).all()
        return sorted(
            (kind, name, table, _clauses(sql or ""))
            for kind, name, table, sql in rows
            if "alembic" not in table and table != "sqlite_sequence"
        )
    columns = connection.execute(
        text(
            "SELECT table_name, ordinal_position, column_name, data_type, is_nullable, column_default "
            "FROM information_schema.columns WHERE table_schema = 'public' AND table_name NOT LIKE 'alembic%'"
        )
    ).all()
    indexes = connection.execute(
        text("SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'")
    ).all()
    constraints = connection.execute(
        text(
            "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint "
            "WHERE conrelid <> 0 AND connamespace = 'public'::regnamespace"
        )
    ).all()
    return sorted(map(str, (row for row in (*columns, *indexes, *constraints) if "alembic" not in str(row))))


def _clauses(sql: str) -> list[str]:
    """Columns in their order; table constraints in any, for it means nothing."""
    columns, *constraints = re.split(r",?\s*(?=CONSTRAINT )", " ".join(sql.split()).replace(" )", ")"))
    *others, last = [columns, *constraints]
    last, end = re.fullmatch(r"(.*\))(\).*)", last).groups() if constraints else (last, "")  # type: ignore[union-attr]
    return [*others[:1], *sorted([*others[1:], last]), end] if constraints else [last]


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_migrations_make_exactly_the_schema(kind: str, branch: str, tmp_path: Path) -> None:
    migrated, made = engine_for(kind, tmp_path, "migrated"), engine_for(kind, tmp_path, "made")
    with migrated.begin() as one, made.begin() as other:
        assert migrations.migrate(one, branch)
        migrations.METADATA[branch].create_all(other)
        assert describe(one) == describe(other)
        context = MigrationContext.configure(
            one,
            opts={"version_table": f"alembic_version_{branch}", "compare_type": True},
        )
        assert compare_metadata(context, migrations.METADATA[branch]) == []
    migrated.dispose()
    made.dispose()


@pytest.mark.parametrize("branch", BRANCHES)
def test_heads_are_the_newest_files(branch: str) -> None:
    script = ScriptDirectory.from_config(migrations.configuration(branch))
    assert script.get_heads() == [migrations.HEADS[branch]]


@pytest.mark.parametrize("kind", KINDS)
def test_both_lines_live_in_one_database(kind: str, tmp_path: Path) -> None:
    engine = engine_for(kind, tmp_path, "both")
    with engine.begin() as connection:
        for branch in BRANCHES:
            assert migrations.migrate(connection, branch)
        for branch in BRANCHES:
            assert not migrations.migrate(connection, branch)
            assert migrations.current(connection, branch) == migrations.HEADS[branch]
    engine.dispose()


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_migration_leaves_nothing(kind: str, tmp_path: Path) -> None:
    engine = engine_for(kind, tmp_path, "half")
    with pytest.raises(RuntimeError), engine.begin() as connection:
        migrations.migrate(connection, "main")
        raise RuntimeError("power cut")
    with engine.begin() as connection:
        assert migrations.current(connection, "main") is None
        assert describe(connection) == []
    engine.dispose()


@pytest.mark.parametrize("kind", KINDS)
def test_a_newer_database_is_refused(kind: str, tmp_path: Path) -> None:
    engine = engine_for(kind, tmp_path, "newer")
    with engine.begin() as connection:
        migrations.migrate(connection, "main")
        connection.execute(text("UPDATE alembic_version_main SET version_num = 'main9999'"))
        with pytest.raises(ConfigError, match="main"):
            migrations.migrate(connection, "main")
    engine.dispose()


def test_the_schema_carries_what_comes_later() -> None:
    assert {"ret", "envid", "flags", "priority", "campaign", "hold_until", "deliver_by"} <= set(
        schema.messages.c.keys()
    )
    assert {"orcpt", "notify", "site", "egress_source", "owner", "epoch", "lease_until"} <= set(
        schema.recipients.c.keys()
    )
