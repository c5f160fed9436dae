# SPDX-License-Identifier: MIT
"""`polarismail alias`: addresses that lead to others, ours or foreign; `@domain` is the catch-all of a domain."""

from __future__ import annotations

import click

from polarismail.cli.invocation import Invocation, common
from polarismail.cli.output import show, show_rows


@click.group()
def alias() -> None:
    """Addresses that lead to others."""


@alias.command()
@click.argument("address")
@click.argument("targets", nargs=-1, required=True)
@common
def add(invocation: Invocation, address: str, targets: tuple[str, ...]) -> None:
    """Mail for ADDRESS (or @DOMAIN: whatever has no account there) goes to TARGETS."""
    added = invocation.run(lambda call: call("alias_add", address=address, targets=list(targets)))
    show(invocation, added, f"alias {added['address']} leads to {', '.join(added['targets'])}")


@alias.command("list")
@click.argument("domain", required=False)
@common
def show_list(invocation: Invocation, domain: str | None) -> None:
    """All aliases, or those of DOMAIN."""
    rows = invocation.run(lambda call: call("alias_list", domain=domain))
    show_rows(invocation, rows, (("address", "address"), ("targets", "leads to")), "no alias yet")


@alias.command()
@click.argument("address")
@common
def remove(invocation: Invocation, address: str) -> None:
    """Forget the alias ADDRESS."""
    removed = invocation.run(lambda call: call("alias_remove", address=address))
    show(invocation, removed, f"alias {removed['address']} removed")
