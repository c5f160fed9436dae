# SPDX-License-Identifier: MIT
"""The lag gauge sees what blocks the reactor's thread, says so at most once a second, and rests when nothing happens."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock

from polarismail.lag import Lag, LagGauge


class Machine:
    """A gauge on a clock; a second of `block` passes in one step, as when something holds the thread."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.cpu = 0.0
        self.wall_jump = 0.0
        self.gauge = LagGauge(
            self.clock,
            lambda name, fields: self.events.append((name, fields)),
            monotonic=lambda: self.clock.rightNow - self.wall_jump,
            cpu=lambda: self.cpu,
        )
        self.gauge.start()

    def work(self, seconds: float, busy: bool) -> int:
        """Time passes in milliseconds; how often the gauge woke up."""
        wakes, due = 0, list(self.clock.getDelayedCalls())
        for _ in range(round(seconds * 1000)):
            self.cpu += 0.0005 if busy else 0.0
            self.clock.advance(0.001)
            wakes += self.clock.getDelayedCalls() != due
            due = list(self.clock.getDelayedCalls())
        return wakes


def test_a_stall_is_measured_and_told() -> None:
    machine = Machine()
    machine.work(1.0, busy=True)
    assert machine.events == [] and machine.gauge.statistics()["stalls"] == 0
    machine.clock.advance(0.5)
    found = machine.gauge.statistics()
    assert found["stalls"] == 1 and 0.44 < found["longest_seconds"] <= 0.5
    assert [name for name, _ in machine.events] == ["stall"]


def test_an_idle_server_is_woken_four_times_a_second() -> None:
    machine = Machine()
    machine.work(1.0, busy=False)
    assert 38 <= machine.work(10.0, busy=False) <= 41
    machine.work(1.0, busy=True)
    assert 180 <= machine.work(10.0, busy=True) <= 201


def test_a_clock_that_is_set_is_no_stall() -> None:
    machine = Machine()
    machine.wall_jump = 3600.0
    machine.clock.advance(3600.0)
    assert machine.gauge.statistics()["stalls"] == 0 and machine.events == []


def test_many_stalls_are_told_once_a_second_and_all_counted() -> None:
    lag = Lag()
    told = [fields for at in range(40) if (fields := lag.record(0.2 if at < 30 else 0.0, at / 10))]
    assert len(told) == 4
    assert sum(fields["stalls"] for fields in told) == lag.stalls == 30


def test_a_stopped_gauge_leaves_no_timer() -> None:
    machine = Machine()
    machine.gauge.stop()
    machine.gauge.stop()
    assert machine.clock.getDelayedCalls() == []
