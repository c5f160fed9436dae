# SPDX-License-Identifier: MIT
"""Prints what one event costs through the event log, beside Twisted's stock JSON observer, in one run."""

from __future__ import annotations

import tempfile
import time
from typing import Any

from twisted.internet.task import Clock
from twisted.logger import Logger, LogPublisher, jsonFileLogObserver

from polarismail.telemetry import EventLog

FIELDS = {
    "queue_id": "01jc9x3k5m7pq",
    "reverse_path": "sender@example.org",
    "size": 4096,
    "recipients": 1,
    "listener": "mx",
    "protocol": "ESMTPS",
    "client": "192.0.2.10",
    "helo": "mail.example.org",
}


def measure(work: Any, count: int) -> float:
    """Microseconds of CPU for each call of `work`, the best of five rounds."""
    best = float("inf")
    for _ in range(5):
        before = time.process_time()
        for _ in range(count):
            work()
        best = min(best, time.process_time() - before)
    return best / count * 1e6


def main(count: int = 20000) -> None:
    """Both observers write the same event to a file."""
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        for style in ("json", "text"):
            log = EventLog(f"{directory}/{style}.log", reactor=Clock(), style=style)
            log.open()
            results[f"record_event, {style}"] = measure(lambda log=log: log.record_event("received", FIELDS), count)
            log.close()
        log = EventLog(f"{directory}/observed.log", reactor=Clock())
        log.open()
        ours = Logger(namespace="polarismail", observer=LogPublisher(log))
        results["Logger to EventLog.observe"] = measure(
            lambda: ours.info("{queue_id}: received", event="received", **FIELDS), count
        )
        log.close()
        with open(f"{directory}/stock.log", "w") as file:
            stock = Logger(namespace="polarismail", observer=LogPublisher(jsonFileLogObserver(file)))
            results["Logger to jsonFileLogObserver"] = measure(
                lambda: stock.info("{queue_id}: received", event="received", **FIELDS), count
            )
    for name, microseconds in results.items():
        print(f"{name:32} {microseconds:6.2f} us an event")
    print(f"ratio stock / ours: {results['Logger to jsonFileLogObserver'] / results['record_event, json']:.1f}")


if __name__ == "__main__":
    main()
