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
