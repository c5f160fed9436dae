# SPDX-License-Identifier: MIT
"""The event log: no field forges a line, nothing is lost in silence, and rotation loses nothing."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.logger import Logger, LogPublisher
from twisted.python.failure import Failure

from polarismail.telemetry import EVENTS, FLUSH_SECONDS, SECRETS, EventLog, render_json
from polarismail.telemetry_text import TextLines, safe
from tests.reactor import reactor, run

HOSTILE = '\x00\n\r\x1b[31m\x7f\x9b\u202e\u2066\ufeff%n{0}\ud800"\\'


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(tmp_path: Path, clock: Clock) -> Any:
    made = EventLog(str(tmp_path / "events.log"), reactor=clock, now=lambda: 1795315500.25)
    made.open()
    yield made
    made.close()


def read(log: EventLog) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(log.path).read_bytes().splitlines()]


@given(st.dictionaries(st.text(max_size=20), st.none() | st.booleans() | st.integers() | st.floats() | st.text()))
def test_any_fields_are_one_line_of_plain_json(fields: dict[str, Any]) -> None:
    fields = {key: value for key, value in fields.items() if key not in {"time", "event", *SECRETS}}
    line = render_json("received", fields, 1795315500.25)
    assert line.endswith("}\n") and line.count("\n") == 1
    assert re.fullmatch(r"[\x20-\x7e]*\n", line)
    read = json.loads(line)
    assert read["event"] == "received" and read["time"] == "2026-11-22T02:45:00.250000Z"
    for key, value in fields.items():
        if isinstance(value, (str, bool, int)) and len(str(value)) < 500 and len(key) <= 64:
            assert read[key] == value


@given(st.text())
def test_text_form_is_one_printable_line(text: str) -> None:
    for event in EVENTS:
        fields = {"queue_id": text, "recipient": text, "reply": text, "relay": text, "text": text, "helo": text}
        line = TextLines("mx.example.org", 7).render(event, fields, 0.0)
        assert line.count("\n") == 1 and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", line)


def test_hostile_field_is_escaped_in_both_forms() -> None:
    assert json.loads(render_json("received", {"helo": HOSTILE}, 0.0))["helo"] == HOSTILE
    assert safe(HOSTILE) == '\\x00\\x0a\\x0d\\x1b[31m\\x7f\\x9b\\u202e\\u2066\\ufeff%n{0}\\ud800"\\'


def test_fields_are_cut_and_secrets_hidden(log: EventLog) -> None:
    log.record_event("received", {"helo": "x" * 1_000_000, "password": "hunter2", "token": b"hunter2"})
    log.flush()
    (event,) = read(log)
    assert len(event["helo"]) == 512 and event["password"] == event["token"] == "***"


def test_text_reads_as_postfix_writes(tmp_path: Path, clock: Clock) -> None:
    lines = TextLines("mx.example.org", 7)
    fields = {
        "queue_id": "01jc9x3k5m7pq",
        "recipient": "b@example.net",
        "original": "list@example.org",
        "relay": "mx.example.net[192.0.2.1]:25",
        "delay_seconds": 1.25,
        "reply": "250 2.0.0 Queued",
    }
    assert lines.render("relayed", fields, 1795315500.25) == (
        "Nov 22 02:45:00 mx.example.org polarismail/smtp[7]: 01jc9x3k5m7pq: to=<b@example.net>, "
        "orig_to=<list@example.org>, relay=mx.example.net[192.0.2.1]:25, delay=1.2, dsn=2.0.0, "
        "status=sent (250 2.0.0 Queued)\n"
    )


def test_events_reach_the_file_within_the_tick(log: EventLog, clock: Clock) -> None:
    log.record_event("received", {"queue_id": "a"})
    assert read(log) == []
    clock.advance(FLUSH_SECONDS)
    assert [event["queue_id"] for event in read(log)] == ["a"]
    assert not clock.getDelayedCalls()


def test_close_writes_what_waits(log: EventLog, clock: Clock) -> None:
    log.record_event("received", {})
    log.close()
    assert len(read(log)) == 1 and not clock.getDelayedCalls()
    log.close()


def test_events_before_open_are_kept(tmp_path: Path, clock: Clock) -> None:
    log = EventLog(str(tmp_path / "early.log"), reactor=clock)
    log.record_event("started", {})
    assert not os.path.exists(log.path)
    log.open()
    clock.advance(FLUSH_SECONDS)
    assert [event["event"] for event in read(log)] == ["started"]
    log.close()


def test_reopen_after_rotation_loses_nothing(log: EventLog) -> None:
    log.record_event("received", {"queue_id": "a"})
    os.rename(log.path, log.path + ".1")
    log.reopen()
    log.record_event("received", {"queue_id": "b"})
    log.flush()
    assert json.loads(Path(log.path + ".1").read_text())["queue_id"] == "a"
    assert [event["queue_id"] for event in read(log)] == ["b"]


def test_reopen_that_fails_keeps_the_old_file(log: EventLog, tmp_path: Path) -> None:
    os.rename(log.path, tmp_path / "rotated")
    os.mkdir(log.path)
    log.reopen()
    log.record_event("received", {})
    log.flush()
    events = [json.loads(line)["event"] for line in (tmp_path / "rotated").read_text().splitlines()]
    assert events == ["reload-failed", "received"]


def test_a_full_disk_costs_lines_and_says_so(clock: Clock, tmp_path: Path) -> None:
    log = EventLog("/dev/full", reactor=clock)
    log.open()
    for _ in range(40):
        for _ in range(1000):
            log.record_event("received", {"helo": "x" * 500})
    assert sum(map(len, log._lines)) < 3_000_000
    lost = log.lost
    assert lost > 0
    log.path = str(tmp_path / "fresh.log")
    log.reopen()
    log.record_event("received", {})
    log.flush()
    events = read(log)
    assert events[-1]["event"] == "log-lines-lost" and events[-1]["count"] >= lost and log.lost == 0
    log.close()


def test_a_field_that_cannot_be_shown_costs_its_line_only(log: EventLog) -> None:
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError("no")

    log.record_event("received", {"x": Broken()})
    log.record_event("received", {"x": "y"})
    log.flush()
    assert [event["event"] for event in read(log)] == ["received", "log-lines-lost"]


def test_logger_events_land_in_the_same_file(log: EventLog) -> None:
    logger = Logger(namespace="polarismail.store", observer=LogPublisher(log))
    logger.info("{queue_id}: kept", queue_id="a", nothing=object())
    logger.failure("broke", Failure(ValueError("bad\nline")))
    log.flush()
    first, second = read(log)
    assert first["event"] == "log" and first["text"] == "a: kept" and first["queue_id"] == "a"
    assert first["level"] == "info" and first["namespace"] == "polarismail.store" and "nothing" not in first
    assert second["level"] == "critical" and "ValueError: bad" in second["traceback"]


def test_logger_events_of_other_threads_come_by_the_reactor(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path / "events.log"), reactor=reactor)
    run(log.open)
    Logger(observer=LogPublisher(log)).info("from a thread")
    run(lambda: None)
    run(log.close)
    assert [event["text"] for event in read(log)] == ["from a thread"]


def test_every_event_that_the_rooms_record_is_named_here() -> None:
    root = Path(__file__).parent.parent / "polarismail"
    names = set()
    for path in root.rglob("*.py"):
        names |= set(re.findall(r'record_event\(\s*"([^"]+)"', path.read_text()))
    assert names <= set(EVENTS)
