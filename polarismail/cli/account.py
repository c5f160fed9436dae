# SPDX-License-Identifier: MIT
"""`polarismail account`: mailboxes. A password comes by prompt, standard input or option, and is never shown."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from polarismail.cli.invocation import Invocation, common
from polarismail.cli.output import show, show_rows


def read_password(given: str | None, from_stdin: bool, *, confirm: bool) -> str:
    """The password: the option's, the first line of standard input, or what is typed at a prompt.

    Raises UsageError where nobody can be asked.
    """
    if given is not None and from_stdin:
        raise click.UsageError("--password and --password-stdin are two ways to say one thing: use one")
    if given is not None:
        return given
    if from_stdin:
        return sys.stdin.readline().rstrip("\r\n")
    if not sys.stdin.isatty():
        raise click.UsageError("no terminal to ask for a password: use --password-stdin or --password")
    typed: str = click.prompt("Password", hide_input=True, confirmation_prompt=confirm)
    return typed


def password_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--password` and `--password-stdin`."""
    function = click.option("--password-stdin", is_flag=True, help="Read it from the first line of standard input.")(
        function
    )
    return click.option("--password", metavar="TEXT", help="The password (other users may see it in ps).")(function)


@click.group()
def account() -> None:
    """Mailboxes: an address, a password, a maildir."""


@account.command()
@click.argument("address")
@password_options
@click.option("--maildir", help="An existing Maildir, absolute or below paths.mail; a new one by default.")
@click.option("--uid", type=int, help="The numeric owner of the maildir.")
@click.option("--gid", type=int, help="Its numeric group.")
@common
def add(
    invocation: Invocation,
    address: str,
    password: str | None,
    password_stdin: bool,
    maildir: str | None,
    uid: int | None,
    gid: int | None,
) -> None:
    """Make a mailbox for ADDRESS, whose domain is ours."""
    secret = read_password(password, password_stdin, confirm=True)
    added = invocation.run(
        lambda call: call("account_add", address=address, password=secret, maildir=maildir, uid=uid, gid=gid)
    )
    show(invocation, added, f"account {added['address']} added")


@account.command()
@click.argument("address")
@password_options
@common
def passwd(invocation: Invocation, address: str, password: str | None, password_stdin: bool) -> None:
    """Change the password of ADDRESS; sessions that are open stay open."""
    secret = read_password(password, password_stdin, confirm=True)
    changed = invocation.run(lambda call: call("account_passwd", address=address, password=secret))
    show(invocation, changed, f"password of {changed['address']} changed")


@account.command("list")
@click.argument("domain", required=False)
@common
def show_list(invocation: Invocation, domain: str | None) -> None:
    """All accounts, or those of DOMAIN."""
    rows = invocation.run(lambda call: call("account_list", domain=domain))
    columns = (("address", "address"), ("active", "active"), ("maildir", "maildir"), ("uid", "uid"), ("gid", "gid"))
    show_rows(invocation, rows, columns, "no account yet: polarismail account add ADDRESS")


@account.command()
@click.argument("address")
@common
def remove(invocation: Invocation, address: str) -> None:
    """Forget ADDRESS; its maildir stays on disk."""
    removed = invocation.run(lambda call: call("account_remove", address=address))
    show(invocation, removed, f"account {removed['address']} removed; its mail is still in {removed['maildir']}")
