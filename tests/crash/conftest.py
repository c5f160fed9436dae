# SPDX-License-Identifier: MIT
"""What the crash tests share: one theatre for each module, on an event loop that stays; visible skips without root."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator

import pytest

from tests.crash import disk
from tests.crash.points import Stage, Theatre

why_not = functools.cache(disk.why_not)


@pytest.fixture(scope="session")
def power() -> None:
    """Skips where no power can be cut."""
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def runner(power: None) -> Iterator[asyncio.Runner]:
    """The event loop of a module's tests."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def theatre(runner: asyncio.Runner) -> Iterator[Theatre]:
    """Stages for servers."""
    theatre = runner.run(Theatre().open())
    yield theatre
    runner.run(theatre.close())


@pytest.fixture(scope="module")
def stage(theatre: Theatre) -> Stage:
    """A server on an ext4 of its own."""
    return theatre.stage()
