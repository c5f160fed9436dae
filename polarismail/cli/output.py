# SPDX-License-Identifier: MIT
"""What people and programs read: tables that no field can deface, JSON that is one value, times and sizes in words."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from polarismail.cli.invocation import Invocation
from polarismail.telemetry_text import safe

_PIPE_WIDTH = 250  # what goes to a file or a pipe is not folded at 80 columns


def console() -> Console:
    """Standard output: colours and the terminal's width where it is one, plain and wide where it is not."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False, soft_wrap=False)


def show(invocation: Invocation, value: Any, text: str) -> None:
    """The outcome of a change: JSON for programs, one sentence for people."""
    click.echo(json.dumps(value) if invocation.as_json else safe(text))


def show_rows(
    invocation: Invocation, rows: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str]], empty: str
) -> None:
    """Rows as a JSON list, or as a table with `columns` of (key, heading); `empty` is said where there is none."""
    if invocation.as_json:
        click.echo(json.dumps(list(rows)))
    elif not rows:
        click.echo(empty)
    else:
        console().print(table(rows, columns))


def table(rows: Iterable[dict[str, Any]], columns: Sequence[tuple[str, str]]) -> Table:
    """A table; every cell is plain text, so that neither markup nor an escape sequence in it means anything."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for _, heading in columns:
        made.add_column(heading, overflow="fold", no_wrap=heading in ("queue id", "size"))
    for row in rows:
        made.add_row(*(Text(show_cell(key, row.get(key))) for key, _ in columns))
    return made


def show_cell(key: str, value: Any) -> str:
    """One value for people: times and sizes by the name of their key."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key in ("created", "next_attempt", "expires", "hold_until") and isinstance(value, (int, float)):
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
    if key == "size":
        return show_size(int(value))
    if isinstance(value, (list, tuple)):
        return ", ".join(safe(item) for item in value)
    return safe(value)


def show_size(octets: int) -> str:
    """`512`, `4.1K`, `50M`."""
    number = float(octets)
    for unit in ("", "K", "M", "G"):
        if number < 1000 or unit == "G":
            return f"{number:.0f}{unit}" if number >= 10 or not unit else f"{number:.1f}{unit}"
        number /= 1024
    return str(octets)


def progress() -> Progress:
    """A bar on standard error; shows nothing where that is no terminal."""
    error = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=error,
        transient=True,
        disable=not error.is_terminal,
    )
