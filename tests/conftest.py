# SPDX-License-Identifier: MIT
"""How tests of all folders run: which of them start processes as people do, and in which order they go."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.server import Server

# How processes start is part of what these are about. What is measured, and who has workers, is executed by its test.
_EXECUTED = {"tests.e2e.test_operations", "tests.e2e.test_service"}


@pytest.fixture(autouse=True, scope="module")
def how_processes_start(request: pytest.FixtureRequest) -> Iterator[None]:
    """End-to-end tests fork what they start, but for those above; other folders execute."""
    name = request.module.__name__
    Server.forks = name.startswith(("tests.e2e.", "tests.interop.")) and name not in _EXECUTED
    yield
    Server.forks = False


# Most of a minute each, of which little is CPU: begun last, one of them would keep one process busy while the other has nothing
# left to do.
_LONG = ("tests/e2e/test_workers.py", "tests/e2e/test_promises.py", "tests/crash/", "tests/e2e/test_operations.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first in each half: pytest-xdist gives the halves to two processes, and moves what is left at their ends."""
    long = [item for item in items if item.nodeid.startswith(_LONG)]
    others = [item for item in items if not item.nodeid.startswith(_LONG)]
    half = (len(others) + len(long)) // 2 - len(long[::2])
    items[:] = [*long[::2], *others[:half], *long[1::2], *others[half:]]
