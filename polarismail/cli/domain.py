# SPDX-License-Identifier: MIT
"""`polarismail domain`: the domains that mail is taken for."""

from __future__ import annotations

import click

from polarismail.cli.invocation import Invocation, common
from polarismail.cli.output import show, show_rows


@click.group()
def domain() -> None:
    """The domains that mail is taken for."""


@domain.command()
@click.argument("name")
@common
def add(invocation: Invocation, name: str) -> None:
    """Take mail for NAME from now on."""
    added = invocation.run(lambda call: call("domain_add", name=name))
    show(invocation, added, f"domain {added['domain']} added")


@domain.command("list")
@common
def show_list(invocation: Invocation) -> None:
    """All domains."""
    rows = invocation.run(lambda call: call("domain_list"))
    columns = (("domain", "domain"), ("active", "active"), ("accounts", "accounts"), ("aliases", "aliases"))
    show_rows(invocation, rows, columns, "no domain yet: polarismail domain add NAME")


@domain.command()
@click.argument("name")
@click.option("--everything", is_flag=True, help="With its accounts and aliases (maildirs stay on disk).")
@common
def remove(invocation: Invocation, name: str, everything: bool) -> None:
    """Take no more mail for NAME."""
    invocation.run(lambda call: call("domain_remove", name=name, everything=everything))
    show(invocation, {"domain": name}, f"domain {name} removed")
