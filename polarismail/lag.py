# SPDX-License-Identifier: MIT
"""How late the reactor's thread is: whatever blocks it makes every session wait, and shows here and in the log.

A timer that is due every 50 ms says how late it came; a quarter of a second while the thread has nothing to do, so that an
idle server costs four wake-ups a second. A stall that begins between two dues is seen shortened by at most that interval.
Times are seconds. What is late by both clocks counts: the reactor's timers follow the wall clock, which may be set.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from polarismail.values.events import RecordEvent

STALL_SECONDS = 0.1
_BUSY_INTERVAL_SECONDS = 0.05
_IDLE_INTERVAL_SECONDS = 0.25
# A thread that used less CPU than this part of an interval is idle.
_BUSY_PART = 0.02
_REPORT_SECONDS = 1.0


class Lag:
    """What was seen since the start: `longest_seconds`, and `stalls` of more than STALL_SECONDS. Pure."""

    def __init__(self) -> None:
        self.longest_seconds = 0.0
        self.stalls = 0
        self._untold = 0
        self._longest_untold = 0.0
        self._told = float("-inf")

    def record(self, late_seconds: float, now: float) -> dict[str, Any] | None:
        """One measurement. Returns the fields of a `stall` event when one is due: at most once a second, and none is lost."""
        if late_seconds > self.longest_seconds:
            self.longest_seconds = late_seconds
        if late_seconds > STALL_SECONDS:
            self.stalls += 1
            self._untold += 1
            self._longest_untold = max(self._longest_untold, late_seconds)
        if not self._untold or now - self._told < _REPORT_SECONDS:
            return None
        fields = {"stalls": self._untold, "longest_seconds": round(self._longest_untold, 3)}
        self._untold, self._longest_untold, self._told = 0, 0.0, now
        return fields

    def statistics(self) -> dict[str, Any]:
        """For `polarismail status`."""
        return {"longest_seconds": round(self.longest_seconds, 4), "stalls": self.stalls}


class LagGauge:
    """The timer around a Lag. Used on the reactor's thread only."""

    def __init__(
        self,
        reactor: Any,
        record_event: RecordEvent,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        cpu: Callable[[], float] = time.thread_time,
    ) -> None:
        """`cpu`: seconds of CPU that the calling thread has used."""
        self.lag = Lag()
        self._reactor, self._record_event = reactor, record_event
        self._monotonic, self._cpu = monotonic, cpu
        self._call: Any = None
        self._interval = _BUSY_INTERVAL_SECONDS
        self._begun, self._begun_by_reactor, self._cpu_used = 0.0, 0.0, 0.0

    def start(self) -> None:
        """Begin to measure."""
        self._cpu_used = self._cpu()
        self._schedule(_BUSY_INTERVAL_SECONDS)

    def stop(self) -> None:
        """End. Idempotent."""
        call, self._call = self._call, None
        if call is not None:
            call.cancel()

    def statistics(self) -> dict[str, Any]:
        """For `polarismail status`."""
        return self.lag.statistics()

    def _schedule(self, interval: float) -> None:
        self._interval = interval
        self._begun, self._begun_by_reactor = self._monotonic(), self._reactor.seconds()
        self._call = self._reactor.callLater(interval, self._on_due)

    def _on_due(self) -> None:
        now = self._monotonic()
        late = min(now - self._begun, self._reactor.seconds() - self._begun_by_reactor) - self._interval
        fields = self.lag.record(max(0.0, late), now)
        cpu = self._cpu()
        busy = late > _BUSY_INTERVAL_SECONDS or cpu - self._cpu_used > _BUSY_PART * (now - self._begun)
        self._cpu_used = cpu
        self._schedule(_BUSY_INTERVAL_SECONDS if busy else _IDLE_INTERVAL_SECONDS)
        if fields is not None:
            self._record_event("stall", fields)
