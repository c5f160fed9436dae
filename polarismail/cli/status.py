# SPDX-License-Identifier: MIT
"""`polarismail status`: how full the queue is and what greylisting does, at a glance."""

from __future__ import annotations

import json
from typing import Any

import click

from polarismail.cli.invocation import Invocation, common
from polarismail.cli.output import console, table


@click.command()
@common
def status(invocation: Invocation) -> None:
    """Counts of the queue, of greylisting and of the caches."""
    found = invocation.run(lambda call: call("status"))
    if invocation.as_json:
        click.echo(json.dumps(found))
        return
    console().print(table([{"what": name, "value": value} for name, value in _flat(found)], _COLUMNS))


_COLUMNS = (("what", "what"), ("value", "value"))


def _flat(values: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, list):
            value = {str(at): each for at, each in enumerate(value)}
        rows += _flat(value, f"{before}{name}.") if isinstance(value, dict) else [(before + name, value)]
    return rows
