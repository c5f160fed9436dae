# SPDX-License-Identifier: MIT
"""Databases for tests of what stands on them: every such test runs against SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polarismail.store.database import Database
from tests.postgres import postgres_url
from tests.reactor import reactor, run

KINDS = ("sqlite", "postgresql")


def database_url(kind: str, directory: Path, branch: str) -> str:
    """A fresh database of this kind. Skips where there is no PostgreSQL."""
    return postgres_url() if kind == "postgresql" else f"sqlite:///{directory}/{branch}.db"


@contextmanager
def open_database(kind: str, directory: Path, branch: str = "main") -> Iterator[Database]:
    """A started database on the tests' reactor."""
    database = Database(database_url(kind, directory, branch), reactor=reactor, branch=branch, joins=False)
    run(database.start)
    try:
        yield database
    finally:
        run(database.stop)


class SwitchedDatabase:
    """The same database, which a test can make unavailable, slow or countable."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.problem: Callable[[], Any] | None = None
        self.reads = self.writes = 0

    def read(self, job: Callable[..., Any]) -> Any:
        self.reads += 1
        return self.problem() if self.problem else self._database.read(job)

    def write(self, job: Callable[..., Any]) -> Any:
        self.writes += 1
        return self.problem() if self.problem else self._database.write(job)
