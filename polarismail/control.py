# SPDX-License-Identifier: MIT
"""What an operator may do, written once: for the command, for the control socket, and for what comes after them.

Every operation is an `async` method named noun_verb whose arguments and result are plain JSON values. It raises
ControlError with a text for people when it cannot be done, and Unavailable when it may be tried again. `OPERATIONS` is
the table of what can be asked for by name; `do_operation` checks arguments against the method's annotations first.

Changes are on stable storage when an operation returns, and the running server acts on them already.
"""

from __future__ import annotations

import inspect
import os
import time
import types
import typing
from collections.abc import Callable
from typing import Any

import attrs
from twisted.internet.defer import maybeDeferred

from polarismail import __version__
from polarismail.auth.passwords import Passwords
from polarismail.config import Config
from polarismail.store import directory_admin
from polarismail.store.interfaces import Account
from polarismail.store.queue_operations import QueueEntry, QueueFilter, QueueRecipient
from polarismail.values.envelope import RecipientState
from polarismail.values.errors import ControlError

MAX_MESSAGES = 100
"""Messages in one page of queue_list."""
MAX_ROWS = 5000
"""Recipients in one page, unless one message alone has more."""


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
    fellows: Any = None
    lag: Any = None
    stress: Any = None
    space: Any = None
    headroom: Any = None
    describe_gate: Callable[[], dict[str, Any]] | None = None
    now: Callable[[], float] = time.time

    async def _change_directory(self, change: Callable[[Any], Any]) -> Any:
        changed = await self.directory.change(change)
        if self.fellows is not None:
            await self.fellows.refresh()
        return changed

    # -- domains ---------------------------------------------------------------------------------------------------------

    async def domain_add(self, name: str) -> dict[str, Any]:
        """Take mail for `name`."""
        return {"domain": await self._change_directory(lambda c: directory_admin.add_domain(c, name))}

    async def domain_list(self) -> list[dict[str, Any]]:
        """All domains: domain, active, accounts, aliases."""
        rows = await self.database.read(directory_admin.list_domains)
        return [
            {"domain": row.name, "active": row.active, "accounts": row.accounts, "aliases": row.aliases} for row in rows
        ]

    async def domain_remove(self, name: str, everything: bool = False) -> None:
        """Forget a domain; one that has accounts or aliases only with `everything`."""
        await self._change_directory(lambda c: directory_admin.remove_domain(c, name, everything=everything))

    # -- accounts --------------------------------------------------------------------------------------------------------

    async def account_add(
        self, address: str, password: str, maildir: str | None = None, uid: int | None = None, gid: int | None = None
    ) -> dict[str, Any]:
        """A new mailbox."""
        hashed = await self.passwords.hash(password)
        now = self.now()
        return _account(
            await self._change_directory(
                lambda c: directory_admin.add_account(c, address, hashed, now=now, maildir=maildir, uid=uid, gid=gid)
            )
        )

    async def account_passwd(self, address: str, password: str) -> dict[str, Any]:
        """A new password; the old one is worth nothing from now on."""
        hashed = await self.passwords.hash(password)
        return _account(await self._change_directory(lambda c: directory_admin.set_password_hash(c, address, hashed)))

    async def account_list(self, domain: str | None = None) -> list[dict[str, Any]]:
        """All accounts, or those of one domain: address, maildir, uid, gid, active."""
        return [_account(row) for row in await self.database.read(lambda c: directory_admin.list_accounts(c, domain))]

    async def account_remove(self, address: str) -> dict[str, Any]:
        """Forget an account; its maildir stays on disk, and the answer says where."""
        return _account(await self._change_directory(lambda c: directory_admin.remove_account(c, address)))

    # -- aliases ---------------------------------------------------------------------------------------------------------

    async def alias_add(self, address: str, targets: list[str]) -> dict[str, Any]:
        """Mail for `address`, or with `@domain` for what has no account there, goes to `targets`."""
        return _alias(await self._change_directory(lambda c: directory_admin.add_alias(c, address, targets)))

    async def alias_list(self, domain: str | None = None) -> list[dict[str, Any]]:
        """All aliases, or those of one domain: address, targets."""
        return [_alias(row) for row in await self.database.read(lambda c: directory_admin.list_aliases(c, domain))]

    async def alias_remove(self, address: str) -> dict[str, Any]:
        """Forget an alias."""
        return _alias(await self._change_directory(lambda c: directory_admin.remove_alias(c, address)))

    # -- queue -----------------------------------------------------------------------------------------------------------

    async def queue_list(
        self,
        queue_ids: list[str] | None = None,
        sender: str | None = None,
        recipient: str | None = None,
        next_hop: str | None = None,
        state: str | None = None,
        limit: int = MAX_MESSAGES,
        after: str = "",
    ) -> dict[str, Any]:
        """A page of the queue, oldest first: `rows`, one for each recipient, and `after`, to ask for the next page with
        ("" at the end). `sender` and `recipient` are addresses or `@domain`; `state` is queued or held."""
        chosen = _filter(queue_ids, sender, recipient, next_hop, state)
        limit = max(1, min(limit, MAX_MESSAGES))
        entries = await _asked(lambda: self.spool.select(chosen, limit, after))
        rows: list[dict[str, Any]] = []
        last = ""
        for entry in entries:
            if rows and len(rows) + len(entry.recipients) > MAX_ROWS:
                return {"rows": rows, "after": last}
            rows += [_queue_row(entry, each) for each in entry.recipients]
            last = entry.message.queue_id
        return {"rows": rows, "after": last if len(entries) == limit else ""}

    async def queue_show(self, queue_id: str) -> dict[str, Any]:
        """One message: its envelope, its session, all its recipients."""
        entry = await _asked(lambda: self.spool.show(queue_id))
        if entry is None:
            raise ControlError(
                f"{queue_id} is not in the queue; `polarismail trace {queue_id}` shows what became of it"
            )
        message = entry.message
        return {
            "queue_id": message.queue_id,
            "reverse_path": str(message.reverse_path or ""),
            "created": message.created,
            "size": message.size,
            "priority": message.options.priority,
            "hold_until": message.options.hold_until or None,
            "session": {name: value for name, value in attrs.asdict(entry.facts).items() if value},
            "recipients": [_queue_row(entry, each) for each in entry.recipients],
        }

    async def queue_retry(
        self,
        queue_ids: list[str] | None = None,
        sender: str | None = None,
        recipient: str | None = None,
        next_hop: str | None = None,
        everything: bool = False,
    ) -> dict[str, Any]:
        """Try what is queued now."""
        return await self._change(self.spool.retry, _chosen(queue_ids, sender, recipient, next_hop, everything))

    async def queue_hold(
        self,
        queue_ids: list[str] | None = None,
        sender: str | None = None,
        recipient: str | None = None,
        next_hop: str | None = None,
        everything: bool = False,
    ) -> dict[str, Any]:
        """Keep what is queued until it is released."""
        return await self._change(self.spool.hold, _chosen(queue_ids, sender, recipient, next_hop, everything))

    async def queue_release(
        self,
        queue_ids: list[str] | None = None,
        sender: str | None = None,
        recipient: str | None = None,
        next_hop: str | None = None,
        everything: bool = False,
    ) -> dict[str, Any]:
        """Queue again what is held; it is tried now."""
        return await self._change(self.spool.unhold, _chosen(queue_ids, sender, recipient, next_hop, everything))

    async def queue_delete(
        self,
        queue_ids: list[str] | None = None,
        sender: str | None = None,
        recipient: str | None = None,
        next_hop: str | None = None,
        everything: bool = False,
    ) -> dict[str, Any]:
        """Drop recipients; nobody is told."""
        return await self._change(self.spool.delete, _chosen(queue_ids, sender, recipient, next_hop, everything))

    async def _change(self, change: Callable[[QueueFilter], Any], chosen: QueueFilter) -> dict[str, Any]:
        return {"changed": await _asked(lambda: change(chosen))}

    # -- the server ------------------------------------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        """Whether a server runs, and its counts."""
        found: dict[str, Any] = {
            "version": __version__,
            "hostname": self.config.hostname,
            "running": self.manager is not None,
            "queue": attrs.asdict(await self.spool.counts()),
        }
        if self.manager is not None:
            found["pid"] = os.getpid() if self.fellows is None else self.fellows.place.supervisor
            found["directory"] = self.directory.statistics()
            if self.space is not None:
                found["space"] = self.space.statistics()
            others = [] if self.fellows is None else await self.fellows.statuses()
            found["workers"] = sorted([self.describe(), *others], key=lambda each: each["worker"])
        if self.greylist is not None:
            found["greylisting"] = await maybeDeferred(self.greylist.statistics)
        return found

    def describe(self) -> dict[str, Any]:
        """What this process, one of `workers`, has in hand."""
        found: dict[str, Any] = {
            "worker": 0,
            "pid": os.getpid(),
            "relay": attrs.asdict(self.manager.counts()),
            "commits": self.database.statistics(),
        }
        if self.lag is not None:
            found["lag"] = self.lag.statistics()
        if self.headroom is not None:
            found["memory"] = self.headroom.statistics()
        if self.stress is not None:
            found["connections"] = {name: each.statistics() for name, each in self.stress.items()}
        if self.describe_gate is not None:
            found["gate"] = self.describe_gate()
        if self.fellows is not None:
            handover = self.manager.handover
            found |= {
                "worker": self.fellows.place.number,
                "sessions": self.fellows.shares.sessions()[self.fellows.place.number],
                "handed_over": {"sent": handover.sent, "received": handover.received},
            }
        return found


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


def _filter(
    queue_ids: list[str] | None, sender: str | None, recipient: str | None, next_hop: str | None, state: str | None
) -> QueueFilter:
    states = {None: (), "queued": (RecipientState.QUEUED,), "held": (RecipientState.HELD,)}
    if state not in states:
        raise ControlError("a state is queued or held")
    return QueueFilter(tuple(queue_ids or ()), sender, recipient, next_hop, states[state])


def _chosen(
    queue_ids: list[str] | None, sender: str | None, recipient: str | None, next_hop: str | None, everything: bool
) -> QueueFilter:
    """The filter of a change; an empty one must be meant."""
    if not everything and not queue_ids and sender is None and recipient is None and next_hop is None:
        raise ControlError("say which messages: queue ids, a sender, a recipient, a next hop, or all of them")
    return _filter(queue_ids, sender, recipient, next_hop, None)


async def _asked(ask: Callable[[], Any]) -> Any:
    """The answer of the spool; it raises ValueError at once for a queue id that is none."""
    try:
        return await ask()
    except ValueError as problem:
        raise ControlError(str(problem)) from problem


def _queue_row(entry: QueueEntry, each: QueueRecipient) -> dict[str, Any]:
    recipient = each.recipient
    return {
        "queue_id": entry.message.queue_id,
        "recipient": str(recipient.forward_path),
        "original": str(recipient.original),
        "reverse_path": str(entry.message.reverse_path or ""),
        "size": entry.message.size,
        "created": entry.message.created,
        "state": each.state.name.lower(),
        "priority": entry.message.options.priority,
        "hold_until": entry.message.options.hold_until or None,
        "in_hand": each.owned,
        "next_hop": recipient.next_hop,
        "attempts": recipient.attempts,
        "next_attempt": recipient.next_attempt,
        "expires": recipient.expires,
        "remote": each.remote,
        "last_reply": recipient.last_reply,
    }


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
    "queue_list": Control.queue_list,
    "queue_show": Control.queue_show,
    "queue_retry": Control.queue_retry,
    "queue_hold": Control.queue_hold,
    "queue_release": Control.queue_release,
    "queue_delete": Control.queue_delete,
    "status": Control.status,
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
