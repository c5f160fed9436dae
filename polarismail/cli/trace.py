# SPDX-License-Identifier: MIT
"""`polarismail trace QUEUE-ID`: everything that the event log says about one message, rotated files included."""

from __future__ import annotations

import glob
import gzip
import json
import os
import re
from collections.abc import Iterator
from typing import IO, Any, cast

import click

from polarismail.cli.invocation import Invocation, common
from polarismail.cli.output import console, progress, table
from polarismail.telemetry_text import safe
from polarismail.values.envelope import parse_queue_id
from polarismail.values.errors import ControlError

_PIECE_OCTETS = 1 << 20
_MAX_LINE_OCTETS = 1 << 20
_MAX_EVENTS = 100_000


@click.command()
@click.argument("queue_id", metavar="QUEUE-ID")
@common
def trace(invocation: Invocation, queue_id: str) -> None:
    """Show every event of one message, from the event log and its rotated files."""
    try:
        parse_queue_id(queue_id)
    except ValueError as problem:
        raise ControlError(str(problem)) from problem
    path = invocation.load().log.file
    if path in ("", "-"):
        raise ControlError("the event log goes to standard output (log.file): ask what collects it, e.g. journalctl")
    files = log_files(path)
    events = find_events(files, queue_id.lower())
    if not events:
        raise ControlError(f"no event of {queue_id} in {path} and its rotated files ({len(files)} files)")
    if invocation.as_json:
        click.echo(json.dumps(events))
        return
    rows = [{"time": event.get("time"), "event": event.get("event"), "what": _describe(event)} for event in events]
    console().print(table(rows, (("time", "time"), ("event", "event"), ("what", "what"))))


def log_files(path: str) -> list[str]:
    """The event log and what rotation made of it (`.1`, `.2.gz`, `-20261122`...), oldest first."""
    rotated = [name for name in glob.glob(glob.escape(path) + "[.-]*") if re.search(r"[.-]\d+(\.gz)?$", name)]
    return sorted((name for name in (*rotated, path) if os.path.isfile(name)), key=os.path.getmtime)


def find_events(files: list[str], queue_id: str) -> list[dict[str, Any]]:
    """The events that name the message, in the order of the files. Raises PermissionError, ControlError."""
    wanted = queue_id.encode("ascii")
    found: list[dict[str, Any]] = []
    with progress() as bar:
        task = bar.add_task("reading", total=sum(os.path.getsize(name) for name in files))
        for name in files:
            for line in _lines(name):
                if wanted in line:
                    event = _parse(line, queue_id)
                    if event is not None:
                        found.append(event)
                if len(found) > _MAX_EVENTS:
                    raise ControlError(f"{queue_id} has more than {_MAX_EVENTS} events: read the log itself")
            bar.advance(task, os.path.getsize(name))
    return found


def _lines(name: str) -> Iterator[bytes]:
    opened = gzip.open(name, "rb") if name.endswith(".gz") else open(name, "rb")
    with cast(IO[bytes], opened) as file:
        while line := file.readline(_MAX_LINE_OCTETS):
            yield line


def _parse(line: bytes, queue_id: str) -> dict[str, Any] | None:
    text = line.decode("utf-8", "replace").rstrip("\n")
    if not text.startswith("{"):
        # The text form: "Nov 22 05:25:00 host polarismail/smtp[7]: QUEUE-ID: ..."
        stamp, _, rest = text.partition(f" {queue_id}: ")
        return {"time": stamp[:15], "event": "text", "queue_id": queue_id, "text": rest} if rest else None
    try:
        event = json.loads(text)
    except ValueError:
        return None  # a line that a full disk cut short
    return event if queue_id in (event.get("queue_id"), event.get("report")) else None


def _describe(event: dict[str, Any]) -> str:
    """The fields in the order in which people ask: who, whither, what was said; then whatever else there is."""
    rest = {key: value for key, value in event.items() if key not in ("time", "event", "queue_id")}
    if event.get("event") == "text":
        return safe(rest.get("text"))
    parts = []
    if "recipient" in rest:
        parts.append(f"to {safe(rest.pop('recipient'))}")
    if rest.get("relay"):
        parts.append(f"through {safe(rest.pop('relay'))}")
    if rest.get("reply"):
        parts.append(f"({safe(rest.pop('reply'))})")
    return " ".join([*parts, *(f"{safe(key)}={safe(value)}" for key, value in rest.items() if value not in (None, ""))])
