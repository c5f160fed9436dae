# SPDX-License-Identifier: MIT
"""What an operator may do, written once: for the command, for the control socket, and for what comes after them.

Every operation is an `async` method named noun_verb whose arguments and result are plain JSON values. It raises
ControlError with a text for people when it cannot be done, and Unavailable when it may be tried again. `OPERATIONS` is
the table of what can be asked for by name; `do_operation` checks arguments against the method's annotations first.

Changes are on stable storage when an operation returns, and the running server acts on them already.
"""

from __future__ import annotations

import inspect
import time
import types
import typing
from collections.abc import Callable
from typing import Any

import attrs

from polarismail.auth.passwords import Passwords
from polarismail.config import Config
from polarismail.store import directory_admin
from polarismail.store.interfaces import Account
from polarismail.values.errors import ControlError

MAX_ROWS = 1000
"""Recipients in one answer of queue_list, and in one step of queue_retry, _hold, _release and _delete."""


@attrs.define(kw_only=True)
class Control:
    """The operations on one server, or on its databases where none runs (then `manager` and `greylist` are None)."""

    database: Any
    spool: Any
    directory: Any
    passwords: Passwords
    config: Config
    telemetry: Any = None
    greylist: Any = None
    manager: Any = None
    now: Callable[[], float] = time.time

    # -- domains ---------------------------------------------------------------------------------------------------------

    async def domain_add(self, name: str) -> dict[str, Any]:
        """Take mail for `name`."""
        return {"domain": await self.directory.change(lambda c: directory_admin.add_domain(c, name))}

    async def domain_list(self) -> list[dict[str, Any]]:
        """All domains: domain, active, accounts, aliases."""
        rows = await self.database.read(directory_admin.list_domains)
        return [
            {"domain": row.name, "active": row.active, "accounts": row.accounts, "aliases": row.aliases} for row in rows
        ]

    async def domain_remove(self, name: str, everything: bool = False) -> None:
        """Forget a domain; one that has accounts or aliases only with `everything`."""
        await self.directory.change(lambda c: directory_admin.remove_domain(c, name, everything=everything))

    # -- accounts --------------------------------------------------------------------------------------------------------

    async def account_add(
        self, address: str, password: str, maildir: str | None = None, uid: int | None = None, gid: int | None = None
    ) -> dict[str, Any]:
        """A new mailbox."""
        hashed = await self.passwords.hash(password)
        now = self.now()
        return _account(
            await self.directory.change(
                lambda c: directory_admin.add_account(c, address, hashed, now=now, maildir=maildir, uid=uid, gid=gid)
            )
        )

    async def account_passwd(self, address: str, password: str) -> dict[str, Any]:
        """A new password; the old one is worth nothing from now on."""
        hashed = await self.passwords.hash(password)
        return _account(await self.directory.change(lambda c: directory_admin.set_password_hash(c, address, hashed)))

    async def account_list(self, domain: str | None = None) -> list[dict[str, Any]]:
        """All accounts, or those of one domain: address, maildir, uid, gid, active."""
        return [_account(row) for row in await self.database.read(lambda c: directory_admin.list_accounts(c, domain))]

    async def account_remove(self, address: str) -> dict[str, Any]:
        """Forget an account; its maildir stays on disk, and the answer says where."""
        return _account(await self.directory.change(lambda c: directory_admin.remove_account(c, address)))

    # -- aliases ---------------------------------------------------------------------------------------------------------

    async def alias_add(self, address: str, targets: list[str]) -> dict[str, Any]:
        """Mail for `address`, or with `@domain` for what has no account there, goes to `targets`."""
        return _alias(await self.directory.change(lambda c: directory_admin.add_alias(c, address, targets)))

    async def alias_list(self, domain: str | None = None) -> list[dict[str, Any]]:
        """All aliases, or those of one domain: address, targets."""
        return [_alias(row) for row in await self.database.read(lambda c: directory_admin.list_aliases(c, domain))]

    async def alias_remove(self, address: str) -> dict[str, Any]:
        """Forget an alias."""
        return _alias(await self.directory.change(lambda c: directory_admin.remove_alias(c, address)))


def _account(account: Account) -> dict[str, Any]:
    return {
        "address": str(account.address),
        "maildir": account.maildir,
        "uid": account.uid,
        "gid": account.gid,
        "active": account.active,
    }


def _alias(row: directory_admin.AliasRow) -> dict[str, Any]:
    return {"address": row.address, "targets": list(row.targets)}


# The whole of what a name from outside can mean.
OPERATIONS: dict[str, Callable[..., Any]] = {
    "domain_add": Control.domain_add,
    "domain_list": Control.domain_list,
    "domain_remove": Control.domain_remove,
    "account_add": Control.account_add,
    "account_passwd": Control.account_passwd,
    "account_list": Control.account_list,
    "account_remove": Control.account_remove,
    "alias_add": Control.alias_add,
    "alias_list": Control.alias_list,
    "alias_remove": Control.alias_remove,
}


async def do_operation(control: Control, name: str, arguments: dict[str, Any]) -> Any:
    """Run one operation by name. Raises ControlError, also for an unknown name and for arguments that do not fit."""
    operation = OPERATIONS.get(name)
    if operation is None:
        raise ControlError(f"there is no operation {name[:60]!r}")
    hints = typing.get_type_hints(operation)
    try:
        inspect.signature(operation).bind(control, **arguments)
    except TypeError as problem:
        raise ControlError(f"{name}: {problem}") from problem
    for key, value in arguments.items():
        if not _fits(value, hints[key]):
            raise ControlError(f"{name}: {key} is of the wrong type")
    return await operation(control, **arguments)


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, inner) for inner in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    if hint is types.NoneType:
        return value is None
    return type(value) is hint
