# SPDX-License-Identifier: MIT
"""A reactor's delays do not follow the wall clock. With a server whose clock jumps: tests/crash/test_used_up.py."""

from __future__ import annotations

import time

from twisted.internet.epollreactor import EPollReactor
from twisted.internet.task import Clock

from polarismail.net.clock import count_monotonic


def test_delays_are_those_of_the_monotonic_clock() -> None:
    reactor = EPollReactor()  # one that is not installed, and never runs
    fired: list[str] = []
    early = reactor.callLater(0.05, fired.append, "early")
    count_monotonic(reactor)
    late = reactor.callLater(50, fired.append, "late")
    assert abs(reactor.seconds() - time.monotonic()) < 1
    assert abs(late.getTime() - time.monotonic() - 50) < 1
    assert abs(early.getTime() - time.monotonic()) < 1
    count_monotonic(reactor)  # once is enough
    assert abs(early.getTime() - time.monotonic()) < 1
    time.sleep(0.06)
    reactor.runUntilCurrent()
    assert fired == ["early"]
    early = reactor.callLater(1, fired.append, "reset")
    early.reset(0.0)
    reactor.runUntilCurrent()
    assert fired == ["early", "reset"]
    late.cancel()


def test_a_clock_of_a_test_is_left_alone() -> None:
    clock = Clock()
    count_monotonic(clock)
    clock.advance(5)
    assert clock.seconds() == 5
