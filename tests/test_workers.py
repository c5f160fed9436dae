# SPDX-License-Identifier: MIT
"""The supervisor's judgement: who hangs is killed, who dies again and again is started more slowly; and what it hands on."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from twisted.internet.task import Clock

from polarismail import workers
from polarismail.config import Config
from polarismail.inheritance import Inheritance, Place
from polarismail.net.shares import Shares, make_memory
from polarismail.net.slices import Slices
from polarismail.workers import Supervisor, Worker


class Channel:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []
        self.closed = False

    def say(self, word: str, /, **arguments: Any) -> None:
        self.said.append({"say": word, **arguments})

    def close(self) -> None:
        self.closed = True


class Log:
    """Keeps the names of events."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def record_event(self, name: str, fields: dict[str, Any]) -> None:
        self.events.append(name)


@pytest.fixture
def supervisor(monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    """One of two workers, both ready; `started` are the numbers of those that it starts anew."""
    made: Any = Supervisor(Config(workers=2), "polarismail.toml", "", reactor=Clock())
    made.telemetry, made._shares, made._slices = Log(), Shares(make_memory(2), 2), Slices({"relay.connections": 10}, 2)
    made._has_served, made.started = True, []
    made._start = made.started.append
    for number in (0, 1):
        made.workers[number] = Worker(number, Channel(), 0.0, pid=1000 + number, incarnation=7 + number)  # type: ignore[arg-type]
    return made


def test_who_gives_no_sign_of_life_is_killed(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number)))
    monkeypatch.setattr(
        supervisor._shares, "silent_seconds", lambda number: (0.0, workers.SILENT_SECONDS + 1)[number], raising=False
    )
    supervisor._look()
    assert killed == [(1001, signal.SIGKILL)]


def test_a_death_is_told_to_the_others_and_made_good(supervisor: Supervisor) -> None:
    clock: Any = supervisor.reactor
    clock.advance(60)
    dead: Any = supervisor.workers[1].channel
    supervisor._ended(1, 9)
    assert dead.closed
    said: Any = supervisor.workers[0].channel
    assert [words["say"] for words in said.said] == ["members", "dead"]
    assert said.said[0]["members"] == {"0": 7}
    clock.advance(0.1)
    assert supervisor.started == [1]  # type: ignore[attr-defined]


def test_who_dies_again_and_again_is_started_more_slowly(supervisor: Supervisor) -> None:
    clock: Any = supervisor.reactor
    waits = []
    for _ in range(12):
        supervisor.workers[1] = Worker(1, Channel(), clock.seconds(), pid=5, incarnation=9)  # type: ignore[arg-type]
        supervisor._ended(1, 9)
        before = clock.seconds()
        while not supervisor.started:  # type: ignore[attr-defined]
            clock.advance(0.05)
        supervisor.started.clear()  # type: ignore[attr-defined]
        waits.append(round(clock.seconds() - before))
    assert waits == sorted(waits)
    assert waits[0] == 0 and waits[-1] == 30


def test_what_is_handed_on_comes_out_as_it_was() -> None:
    given = Inheritance(
        Place(1, 2, 4711, grants={"relay.connections": 5}), "/etc/p.toml", 'hostname = "ü"', None, 1.5, 99, None,
        {"mx": [3, 4]}, (b"chain", b"key"),
    )  # fmt: skip
    assert Inheritance.parse(given.render()) == given
    there = given.on([10, 11, 12, 13, 14])
    assert (there.place.channel, there.place.shares, there.place.control) == (10, 11, 12)
    assert there.sockets == {"mx": [13, 14]}
    assert "key" not in repr(given)
