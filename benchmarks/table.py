# SPDX-License-Identifier: MIT
"""Results as people and programs read them: a table on the terminal, CSV for the documentation, JSON."""

from __future__ import annotations

import csv
import datetime
import io
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from attrs import frozen

from benchmarks.bench import Bar
from benchmarks.peers import ROOT


@frozen
class _Column:
    title: str
    width: int


_FIGURES = (
    _Column("work", 56),
    _Column("polarismail", 12),
    _Column("Postfix", 10),
    _Column("unit", 13),
    _Column("ratio", 7),
    _Column("asked", 6),
    _Column("aim", 6),
    _Column("met", 4),
)
_GAUGES = (
    _Column("row", 20),
    _Column("CPU us", 8),
    _Column("Postfix's", 10),
    _Column("lag ms", 8),
    _Column("lock p99", 9),
    _Column("max ms", 8),
    _Column("answer p99", 11),
    _Column("max ms", 8),
    _Column("group", 6),
    _Column("messages by worker", 19),
)


def write_results(
    path: Path, lines: list[dict[str, Any]], *, workers: int | None, rounds: int, update: bool = False
) -> None:
    """The figures as JSON, each line with when it was measured and what was. `update`: other rows of the file stay."""
    about = {
        "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "workers": workers,
        "rounds": rounds,
        "machine": f"{os.cpu_count()} cores, {platform.release()}, Python {platform.python_version()}",
    }
    kept: list[dict[str, Any]] = []
    if update and path.exists():
        rows = {line["row"] for line in lines}
        kept = [line for line in read_results(path) if line["row"] not in rows]
    found = kept + [{**line, "about": about} for line in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"lines": found}, indent=2) + "\n")


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results, in the order of the table."""
    from benchmarks.rows import ROWS

    order = list(ROWS)
    found: list[dict[str, Any]] = json.loads(path.read_text())["lines"]
    return sorted(found, key=lambda line: order.index(line["row"]) if line["row"] in order else len(order))


def render_table(lines: list[dict[str, Any]]) -> str:
    """For a terminal: the figures, notes, and what the gauges say."""
    notes = [f"{line['work']}: {line['note']}" for line in lines if line["note"]]
    gauged = [_gauges(line) for line in lines if "polarismail" in line["details"]]
    text = [*_aligned(_FIGURES, [_figures(line) for line in lines]), "", *notes]
    if gauged:
        text += ["", *_aligned(_GAUGES, gauged), "", _LEGEND]
    return "\n".join(text)


_LEGEND = (
    "CPU us: microseconds of CPU for each message, all processes of the server. lag: the longest time that a process of ours\n"
    "answered nobody. lock: how long commits waited for the writers' lock. answer: from a message's end to its 250, as the\n"
    "committer sees it. group: jobs of a commit, median. All gauges are of the whole row, its start included."
)


def _aligned(columns: tuple[_Column, ...], rows: list[list[str]]) -> list[str]:
    return [
        "".join(cell.rjust(column.width) if at else cell.ljust(column.width) for at, (cell, column) in enumerate(pairs))
        for pairs in (list(zip(row, columns, strict=True)) for row in [[c.title for c in columns], *rows])
    ]


def render_csv(lines: list[dict[str, Any]], gauges: bool = False) -> str:
    """For csv-table."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([column.title for column in (_GAUGES if gauges else _FIGURES)])
    if gauges:
        writer.writerows(_gauges(line) for line in lines if "polarismail" in line["details"])
    else:
        writer.writerows(_figures(line) for line in lines)
    return out.getvalue()


def _figures(line: dict[str, Any]) -> list[str]:
    bar = Bar(**line["bar"]) if line["bar"] else None
    return [
        line["work"],
        _figure(line["polarismail"]),
        _figure(line["postfix"]),
        line["unit"],
        _ratio(line["ratio"]) if line["ratio"] is not None else "",
        bar.render(bar.asked) if bar else "",
        bar.render(bar.aim) if bar else "",
        {True: "yes", False: "NO", None: ""}[line["met"]],
    ]


def _gauges(line: dict[str, Any]) -> list[str]:
    details, gauges = line["details"], line["details"].get("gauges", {})
    cpu = [details.get(name, {}).get("cpu_microseconds") for name in ("polarismail", "postfix")]
    return [
        line["row"],
        *("" if value is None else f"{value:,.0f}" for value in cpu),
        _milliseconds(gauges.get("lag_seconds")),
        _milliseconds(gauges.get("lock_wait_p99_seconds")),
        _milliseconds(gauges.get("lock_wait_max_seconds")),
        _milliseconds(gauges.get("answer_p99_seconds")),
        _milliseconds(gauges.get("answer_max_seconds")),
        f"{gauges.get('group_jobs_p50', '')}",
        _shares(gauges.get("worker_messages", [])),
    ]


def _ratio(value: float) -> str:
    return f"{value:.2f}x" if value >= 0.1 else f"{value:.3f}x"


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:.1f}"


def _shares(messages: list[int]) -> str:
    total = sum(messages)
    return "/".join(f"{each * 100 / total:.0f}%" for each in messages) if total and len(messages) > 1 else ""


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()
