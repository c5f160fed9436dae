# SPDX-License-Identifier: MIT
"""Servers for the tests of this folder: one that most tests share, and makers for those that need their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server import Helper, Server


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """A maker of servers that are killed at the end of the test; what they printed is shown when it fails."""
    made: list[Server] = []

    def make(name: str = "server", **settings: Any) -> Server:
        server = Server(tmp_path / name, **settings)
        made.append(server)
        return server

    yield make
    for server in made:
        server.kill()
        print(f"--- {server.directory.name}\n{server.twistd_log()[-3000:]}")


@pytest.fixture
def make_helper(tmp_path: Path) -> Iterator[Callable[..., Helper]]:
    """A maker of DNS servers ("dns") and SMTP sinks ("sink") on loopback."""
    made: list[Helper] = []

    def make(what: str, data: dict[str, Any] | None = None) -> Helper:
        made.append(Helper(tmp_path, what, data))
        return made[-1]

    yield make
    for helper in made:
        helper.stop()


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One running server for the tests of a module that do not disturb one another."""
    # A dozen refusals in one session are what some tests are about: they need not wait a second for each.
    server = Server(tmp_path_factory.mktemp("shared") / "server", extra="[session]\nsoft_error_delay_seconds = 0.01\n")
    try:
        yield server.start()
    finally:
        server.kill()
        print(server.twistd_log()[-3000:])
