# SPDX-License-Identifier: MIT
"""`polarismail queue`: look at accepted mail that is not delivered yet, and push, hold, release or delete it.

Changes of many messages go in steps of a page, with a bar, so that the server carries mail meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import click

from polarismail.cli.invocation import Call, Invocation, common
from polarismail.cli.output import console, progress, show, show_cell, table
from polarismail.telemetry_text import safe
from polarismail.values.errors import ControlError

_COLUMNS = (
    ("queue_id", "queue id"),
    ("state", "state"),
    ("created", "arrived"),
    ("size", "size"),
    ("reverse_path", "from"),
    ("recipient", "to"),
    ("attempts", "tries"),
    ("next_attempt", "next try"),
    ("last_reply", "last reply"),
)


def filters(function: Callable[..., Any]) -> Callable[..., Any]:
    """`QUEUE-ID...`, `--sender`, `--to`, `--domain`, `--next-hop`: what of the queue is meant; all must hold."""
    for words, metavar, text in (
        (("--next-hop",), "DOMAIN", "Those that routing starts from DOMAIN; local for our own maildrops."),
        (("--domain",), "DOMAIN", "Recipients in DOMAIN."),
        (("--to", "recipient"), "ADDRESS", "This recipient."),
        (("--sender",), "ADDRESS", "From this reverse-path, or @DOMAIN; <> for reports."),
    ):
        function = click.option(*words, metavar=metavar, help=text)(function)
    return click.argument("queue_ids", nargs=-1, metavar="[QUEUE-ID]...")(function)


def chosen(
    queue_ids: tuple[str, ...], sender: str | None, recipient: str | None, domain: str | None, next_hop: str | None
) -> dict[str, Any]:
    """The filter as arguments of an operation."""
    if recipient and domain:
        raise click.UsageError("--to names one recipient, --domain many: use one")
    return {
        "queue_ids": list(queue_ids) or None,
        "sender": sender,
        "recipient": recipient or (f"@{domain.removeprefix('@')}" if domain else None),
        "next_hop": next_hop,
    }


@click.group()
def queue() -> None:
    """Accepted mail that is not delivered yet."""


@queue.command("list")
@filters
@click.option("--state", type=click.Choice(["queued", "held"]), help="Only these.")
@click.option("--limit", type=click.IntRange(1), help="At most so many recipients.")
@common
def show_list(invocation: Invocation, state: str | None, limit: int | None, **words: Any) -> None:
    """The queue, a row for each recipient, oldest first."""
    arguments = {**chosen(**words), "state": state}

    async def collect(call: Call) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        async for page in _pages(call, arguments):
            rows += page
            if limit and len(rows) >= limit:
                return rows[:limit]
        return rows

    rows = invocation.run(collect)
    if invocation.as_json:
        click.echo(json.dumps(rows))
    elif not rows:
        click.echo("nothing in the queue" + ("" if not any(arguments.values()) else " is like that"))
    else:
        console().print(table(rows, _COLUMNS))
        messages = len({row["queue_id"] for row in rows})
        click.echo(f"{len(rows)} recipients of {messages} messages")


@queue.command("show")
@click.argument("queue_id", metavar="QUEUE-ID")
@common
def show_one(invocation: Invocation, queue_id: str) -> None:
    """One message with all its recipients."""
    entry = invocation.run(lambda call: call("queue_show", queue_id=queue_id))
    if invocation.as_json:
        click.echo(json.dumps(entry))
        return
    click.echo(f"queue id   {safe(entry['queue_id'])}")
    click.echo(f"from       <{safe(entry['reverse_path'])}>")
    click.echo(f"arrived    {show_cell('created', entry['created'])}, {show_cell('size', entry['size'])}")
    if entry["hold_until"]:
        click.echo(f"held until {show_cell('hold_until', entry['hold_until'])}")
    if entry["priority"]:
        click.echo(f"priority   {entry['priority']}")
    for name, value in entry["session"].items():
        click.echo(f"{name:10} {safe(value)}")
    columns = [column for column in _COLUMNS if column[0] not in ("queue_id", "created", "size", "reverse_path")]
    console().print(table(entry["recipients"], [*columns, ("expires", "given up"), ("remote", "last tried at")]))


def _change(operation: str, done: str, text: str) -> click.Command:
    """The command for one kind of change; they differ in a word."""

    @click.command(operation.removeprefix("queue_"), help=text)
    @filters
    @click.option("--all", "everything", is_flag=True, help="The whole queue.")
    @common
    def change(invocation: Invocation, everything: bool, **words: Any) -> None:
        arguments = chosen(**words)
        if not everything and not any(arguments.values()):
            raise click.UsageError("say which: queue ids, --sender, --to, --domain, --next-hop, or --all")
        changed = invocation.run(lambda call: _in_steps(call, operation, arguments))
        show(invocation, {"changed": changed}, f"{changed} recipients {done}")
        if words["queue_ids"] and not changed:
            raise ControlError("nothing of that is in the queue in a state that this changes")

    return change


async def _in_steps(call: Call, operation: str, arguments: dict[str, Any]) -> int:
    # Page by page: one answer never takes long, and the bar tells how far it is.
    changed = 0
    total = (await call("status"))["queue"]["messages"]
    with progress() as bar:
        task = bar.add_task("messages", total=total)
        async for page in _pages(call, arguments):
            ids = list(dict.fromkeys(row["queue_id"] for row in page))
            changed += (await call(operation, **{**arguments, "queue_ids": ids}))["changed"]
            bar.advance(task, len(ids))
    return changed


async def _pages(call: Call, arguments: dict[str, Any]) -> AsyncIterator[list[dict[str, Any]]]:
    after = ""
    while True:
        page = await call("queue_list", **arguments, after=after)
        if page["rows"]:
            yield page["rows"]
        after = page["after"]
        if not after:
            return


queue.add_command(_change("queue_retry", "will be tried now", "Try now what waits."))
queue.add_command(_change("queue_hold", "held", "Keep what waits from being tried, until it is released."))
queue.add_command(_change("queue_release", "released", "Let go what is held; it is tried now."))
queue.add_command(_change("queue_delete", "deleted", "Drop recipients; nobody is told."))
