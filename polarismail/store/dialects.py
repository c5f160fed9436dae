# SPDX-License-Identifier: MIT
"""The one place where SQLite and PostgreSQL differ: how to connect, upsert, tell the time, and read an error.

SQLite: WAL, `BEGIN IMMEDIATE`, synchronous=FULL for what is promised and NORMAL for what is only remembered.
PostgreSQL: psycopg 3, imported only when its URL is used; synchronous_commit likewise.
"""

from __future__ import annotations

import os
import sqlite3
from typing import Any

from sqlalchemy import Connection, Engine, Table, create_engine, event, func, insert
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.pool import NullPool

from polarismail.values.errors import ConfigError, SpoolUnhealthy, Unavailable

# Pages of a WAL before it is checkpointed into the database: 16 MB.
_CHECKPOINT_PAGES = 4000
_CACHE_KILOBYTES = 8192
_BUSY_SECONDS = 10.0
# SQLITE_IOERR, SQLITE_CORRUPT, SQLITE_NOTADB: what the disk holds is not what was written.
_FINAL_SQLITE_CODES = {10, 11, 26}


def make_engine(url: str, *, durable: bool, writes: bool) -> Engine:
    """An engine whose connections are made on use and closed on release; its thread keeps the one it wants.

    Raises ConfigError for a URL that cannot be used, or whose driver is not installed.
    """
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            if not parsed.database or parsed.database == ":memory:":
                raise ConfigError(f"{url}: expected sqlite:///PATH of a file")
            engine = create_engine(
                parsed, poolclass=NullPool, connect_args={"timeout": _BUSY_SECONDS, "check_same_thread": False}
            )
            _set_up_sqlite(engine, durable, writes)
            return engine
        if parsed.get_backend_name() != "postgresql":
            raise ConfigError(f"{url}: expected sqlite:///PATH or postgresql://...")
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        # Positional parameters, so that one tuple of values serves both drivers.
        engine = create_engine(parsed, poolclass=NullPool, paramstyle="format")
        _set_up_postgresql(engine, durable)
        return engine
    except (ArgumentError, NoSuchModuleError) as problem:
        raise ConfigError(f"the database URL cannot be used: {problem}") from problem
    except ModuleNotFoundError as problem:
        raise ConfigError(f"{problem.name} is not installed: pip install 'polarismail[postgresql]'") from problem


def sqlite_path(url: str) -> str | None:
    """The file behind a SQLite URL; None for a server. Raises ConfigError."""
    try:
        parsed = make_url(url)
    except ArgumentError as problem:
        raise ConfigError(f"the database URL cannot be used: {problem}") from problem
    return os.path.abspath(parsed.database) if parsed.get_backend_name() == "sqlite" and parsed.database else None


def _set_up_sqlite(engine: Engine, durable: bool, writes: bool) -> None:
    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves
        for pragma in (
            "journal_mode=WAL",
            f"synchronous={'FULL' if durable else 'NORMAL'}",
            f"wal_autocheckpoint={_CHECKPOINT_PAGES}",
            f"cache_size=-{_CACHE_KILOBYTES}",
            "foreign_keys=ON",
            # Debian builds it on: every delivered message would be overwritten with zeros, through the WAL.
            "secure_delete=OFF",
            "trusted_schema=OFF",
            *(() if writes else ("query_only=ON",)),
        ):
            connection.execute(f"PRAGMA {pragma}").close()

    statement = "BEGIN IMMEDIATE" if writes else "BEGIN"

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        driver: Any = connection.connection.driver_connection
        driver.execute(statement).close()


def _set_up_postgresql(engine: Engine, durable: bool) -> None:
    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _record: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET synchronous_commit = {'on' if durable else 'off'}")
            cursor.execute("SET TIME ZONE 'UTC'")
        connection.commit()


def upsert(connection: Connection, table: Table) -> Any:
    """An INSERT for this connection's dialect that has `.on_conflict_do_update(index_elements=..., set_=...)`,
    `.on_conflict_do_nothing()` and `.excluded`."""
    if connection.dialect.name == "sqlite":
        from sqlalchemy.dialects import sqlite

        return sqlite.insert(table)
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects import postgresql

        return postgresql.insert(table)
    return insert(table)


def has_clock(connection: Connection) -> bool:
    """Whether leases run on the database's clock: true for a server that several machines may share."""
    return connection.dialect.name != "sqlite"


def database_clock() -> Any:
    """Seconds since 1970 by the clock of a server (see `has_clock`), as an expression."""
    return func.extract("epoch", func.clock_timestamp())


def lock_migrations(connection: Connection) -> None:
    """Let one process at a time migrate; SQLite's writers' lock does it there."""
    if connection.dialect.name == "postgresql":
        connection.execute(func.pg_advisory_xact_lock(0x706F6C6172).select())


def is_database_error(error: BaseException) -> bool:
    """Whether the database or its driver raised this."""
    return isinstance(error, (DBAPIError, sqlite3.Error)) or _is_psycopg_error(error)


def is_final(error: BaseException) -> bool:
    """Whether the disk under the database has failed, so that nothing may be promised any more."""
    code = getattr(_driver_error(error), "sqlite_errorcode", None)
    return code is not None and code & 0xFF in _FINAL_SQLITE_CODES


def is_full(error: BaseException) -> bool:
    """Whether there is no room on the disk under the database."""
    driver_error = _driver_error(error)
    code = getattr(driver_error, "sqlite_errorcode", None)
    return (code is not None and code & 0xFF == 13) or getattr(driver_error, "sqlstate", None) == "53100"


def is_lost(error: BaseException) -> bool:
    """Whether the connection is of no use after this error, so that the whole group fails with it."""
    if is_final(error) or is_full(error):
        return True
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    driver_error = _driver_error(error)
    if isinstance(driver_error, sqlite3.Error):
        return False
    # Class 08 is the connection, 57P the server going down; without a state the driver lost the socket.
    state = getattr(driver_error, "sqlstate", None)
    return type(driver_error).__name__ in ("OperationalError", "InterfaceError") and (
        state is None or state[:2] == "08" or state[:3] == "57P"
    )


def as_polaris_error(error: BaseException) -> BaseException:
    """The database's errors as Unavailable or SpoolUnhealthy; anything else as it is."""
    if isinstance(error, OSError) or is_database_error(error):
        kind = SpoolUnhealthy if is_final(error) else Unavailable
        translated = kind(f"the database cannot answer: {type(_driver_error(error)).__name__}: {_driver_error(error)}")
        translated.__cause__ = error
        return translated
    return error


def _driver_error(error: BaseException) -> BaseException:
    return error.orig if isinstance(error, DBAPIError) and error.orig is not None else error


def _is_psycopg_error(error: BaseException) -> bool:
    return any(kind.__module__ == "psycopg" for kind in type(error).__mro__)
