# SPDX-License-Identifier: MIT
"""Changes of domains, accounts and aliases: plain functions of a connection, for `Database.write` and `.transaction`.

Guarantees: each change moves the generation in the same transaction, so that every process sees it; a refusal is
AccountError with a text for people, and changes nothing (its savepoint is undone); an account's maildir is made from
its number, never from its name, and belongs to one account alone; numbers are never reused.
RFC 5321 §4.1.2 (what a name may be; ours are narrower, HOSTILE A8).
"""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from attrs import frozen
from sqlalchemy import Connection, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from polarismail.store.addresses import (
    GENERATION,
    MAX_TARGETS,
    AddressReader,
    AddressSettings,
    Name,
    account_of,
    account_select,
    fold_local,
    name_of,
    parse_targets,
)
from polarismail.store.dialects import upsert
from polarismail.store.interfaces import Account
from polarismail.store.schema import accounts, aliases, domains, generations
from polarismail.values.address import MAX_LOCAL_OCTETS, Mailbox, parse_domain, to_ascii
from polarismail.values.errors import AccountError, BadAddress, Unavailable

# Of RFC 5321's atoms, without those that a shell, a path or a pattern would read: / % * ! ` | and others.
_LOCAL_PART = re.compile(r"[a-z0-9_][a-z0-9_&'+=~#-]*(?:\.[a-z0-9_&'+=~#-]+)*")
_PLAIN = {"L": "x", "N": "x", "M": "-"}  # what a letter, a digit and a mark beyond ASCII are judged as
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_MAX_MAILDIR = 1024
_MAX_ID = 2**32 - 2  # (uid_t) -1 means "leave it"


@frozen
class DomainRow:
    """A domain of ours, and how much hangs on it."""

    name: str
    active: bool
    accounts: int
    aliases: int


@frozen
class AliasRow:
    """An alias; `address` is `@domain` for a catch-all."""

    address: str
    targets: tuple[str, ...]


def add_domain(connection: Connection, name: str) -> str:
    """Take mail for this domain from now on. Returns its name as stored (lower case, A-labels)."""
    _begin_change(connection)
    domain = _parse_own_domain(name)
    try:
        connection.execute(insert(domains).values(name=domain))
    except IntegrityError as problem:
        raise AccountError(f"the domain {domain} exists already") from problem
    return domain


def set_domain_active(connection: Connection, name: str, active: bool) -> None:
    """Switch a domain off (its mail is refused, its accounts cannot log in) or on again."""
    _begin_change(connection)
    row = _domain_row(connection, name)
    connection.execute(update(domains).where(domains.c.id == row.id).values(active=active))


def remove_domain(connection: Connection, name: str, *, everything: bool = False) -> None:
    """Forget a domain; one with accounts or aliases only if `everything` is to go with it. Maildirs stay on disk."""
    _begin_change(connection)
    row = _domain_row(connection, name)
    for table, word in ((accounts, "accounts"), (aliases, "aliases")):
        count = connection.execute(select(func.count()).where(table.c.domain_id == row.id)).scalar_one()
        if count and not everything:
            raise AccountError(f"the domain {row.name} still has {count} {word}: remove them first")
        connection.execute(delete(table).where(table.c.domain_id == row.id))
    connection.execute(delete(domains).where(domains.c.id == row.id))


def list_domains(connection: Connection) -> list[DomainRow]:
    """All domains by name."""
    counts = [
        select(func.count()).where(table.c.domain_id == domains.c.id).scalar_subquery() for table in (accounts, aliases)
    ]
    rows = connection.execute(select(domains.c.name, domains.c.active, *counts).order_by(domains.c.name))
    return [DomainRow(name, bool(active), in_accounts, in_aliases) for name, active, in_accounts, in_aliases in rows]


def add_account(
    connection: Connection,
    address: str,
    password_hash: str,
    *,
    now: float,
    maildir: str | None = None,
    uid: int | None = None,
    gid: int | None = None,
) -> Account:
    """A new mailbox. `maildir` is given for imported ones alone: by default it follows from the account's number."""
    _begin_change(connection)
    local, domain = _parse_own_address(connection, address)
    _check_free(connection, local, domain)
    for name, number in (("uid", uid), ("gid", gid)):
        if number is not None and not 0 < number <= _MAX_ID:
            # Nothing of ours works as root in a user's directory (HOSTILE I9).
            raise AccountError(f"{name} {number}: expected a number from 1 to {_MAX_ID}")
    path = "" if maildir is None else _parse_maildir(maildir)
    try:
        number = connection.execute(
            insert(accounts)
            .values(
                domain_id=domain.id,
                local_part=local,
                maildir=path,
                uid=uid,
                gid=gid,
                password_hash=password_hash,
                created=now,
            )
            .returning(accounts.c.id)
        ).scalar_one()
    except IntegrityError as problem:
        raise AccountError(f"the account {local}@{domain.name} exists already") from problem
    if not path:
        path = base = f"accounts/{number // 1000:03d}/{number}"
        attempt = 1
        while _is_taken(connection, path, number):  # by an imported account that was given this path
            attempt += 1
            path = f"{base}-{attempt}"
        connection.execute(update(accounts).where(accounts.c.id == number).values(maildir=path))
    elif _is_taken(connection, path, number):
        raise AccountError(f"the maildir {path} belongs to another account")
    return Account(number, Mailbox(local, domain.name), path, uid, gid, password_hash)


def set_password_hash(connection: Connection, address: str, password_hash: str) -> Account:
    """A new password (a hash of `auth.passwords.hash_password`). Returns the account as it is now."""
    return _change_account(connection, address, password_hash=password_hash)


def set_account_active(connection: Connection, address: str, active: bool) -> Account:
    """Switch an account off (no login, no mail) or on again."""
    return _change_account(connection, address, active=active)


def remove_account(connection: Connection, address: str) -> Account:
    """Forget an account; its maildir stays on disk. Returns what it was."""
    _begin_change(connection)
    row = _account_row(connection, address)
    connection.execute(delete(accounts).where(accounts.c.id == row.id))
    return account_of(row, row.domain)


def list_accounts(connection: Connection, domain: str | None = None) -> list[Account]:
    """All accounts, or those of one domain, by address."""
    wanted = account_select().order_by(domains.c.name, accounts.c.local_part)
    if domain is not None:
        wanted = wanted.where(domains.c.id == _domain_row(connection, domain).id)
    return [account_of(row, row.domain) for row in connection.execute(wanted)]


def add_alias(
    connection: Connection, address: str, targets: Iterable[str], settings: AddressSettings | None = None
) -> AliasRow:
    """Mail for `address` (or, with `@domain`, for what has no account in it) goes to `targets`, ours or foreign."""
    _begin_change(connection)
    wanted = list(dict.fromkeys(_parse_target(target) for target in targets))
    if not 1 <= len(wanted) <= MAX_TARGETS:
        raise AccountError(f"an alias has 1 to {MAX_TARGETS} targets")
    if address.startswith("@"):
        local, domain = "", _domain_row(connection, address[1:])
    else:
        local, domain = _parse_own_address(connection, address)
        _check_free(connection, local, domain)
    if local and [name_of(target) for target in wanted] == [Name(local, domain.name)]:
        raise AccountError(f"the alias {local}@{domain.name} may not lead to itself alone")
    lines = [f"{target.local}@{target.domain}" for target in wanted]
    try:
        connection.execute(
            insert(aliases)
            .values(domain_id=domain.id, local_part=local, targets="\n".join(lines))
            .returning(aliases.c.id)
        )
    except IntegrityError as problem:
        raise AccountError(f"the alias {local}@{domain.name} exists already") from problem
    try:
        AddressReader(connection, settings or AddressSettings()).resolve(Name(local, domain.name))
    except Unavailable as problem:
        raise AccountError(str(problem)) from problem
    return AliasRow(f"{local}@{domain.name}", tuple(str(target) for target in wanted))


def remove_alias(connection: Connection, address: str) -> AliasRow:
    """Forget an alias, or with `@domain` a catch-all. Returns what it was."""
    _begin_change(connection)
    if address.startswith("@"):
        local, domain = "", _domain_row(connection, address[1:])
    else:
        local, domain = _parse_own_address(connection, address)
    found = select(aliases).where(aliases.c.domain_id == domain.id, aliases.c.local_part == local)
    row = connection.execute(found).first()
    if row is None:
        raise AccountError(f"there is no alias {local}@{domain.name}")
    connection.execute(delete(aliases).where(aliases.c.id == row.id))
    return _alias_row(row.local_part, domain.name, row.targets)


def list_aliases(connection: Connection, domain: str | None = None) -> list[AliasRow]:
    """All aliases, or those of one domain, by address; a catch-all comes first in its domain."""
    wanted = (
        select(aliases.c.local_part, domains.c.name, aliases.c.targets)
        .join_from(aliases, domains)
        .order_by(domains.c.name, aliases.c.local_part)
    )
    if domain is not None:
        wanted = wanted.where(domains.c.id == _domain_row(connection, domain).id)
    return [_alias_row(*row) for row in connection.execute(wanted)]


# -- inside ----------------------------------------------------------------------------------------------------------


def _begin_change(connection: Connection) -> None:
    """Move the generation. First of all, because its row then makes changes of other processes wait: what is looked at
    after this (is the name free?) stays true until the commit."""
    statement = upsert(connection, generations).values(name=GENERATION, value=1)
    connection.execute(
        statement.on_conflict_do_update(index_elements=["name"], set_={"value": generations.c.value + 1})
    )


def _parse_own_domain(text: str) -> str:
    try:
        domain = parse_domain(text.strip())
        if domain[:1] == "[":
            raise BadAddress("an address literal is no domain")
        return to_ascii(domain)
    except BadAddress as problem:
        raise AccountError(f"{_shown(text)} is no domain: {problem}") from problem


def _is_name(local: str) -> bool:
    """Beyond ASCII: letters, marks and digits of any script (RFC 6531 §3.3)."""
    plain = "".join(
        letter if letter.isascii() else _PLAIN.get(unicodedata.category(letter)[0], "/") for letter in local
    )
    return _LOCAL_PART.fullmatch(plain) is not None


def _domain_row(connection: Connection, name: str) -> Any:
    domain = _parse_own_domain(name)
    row = connection.execute(select(domains).where(domains.c.name == domain)).first()
    if row is None:
        raise AccountError(f"the domain {domain} is not ours: add it first")
    return row


def _parse_own_address(connection: Connection, address: str) -> tuple[str, Any]:
    local, at, domain = address.strip().rpartition("@")
    if not at:
        raise AccountError(f"{_shown(address)} is no address: expected local@domain")
    local = fold_local(local)
    if len(local.encode("utf-8", "replace")) > MAX_LOCAL_OCTETS or not _is_name(local):
        raise AccountError(
            f"{_shown(local)} cannot be a name here: expected up to {MAX_LOCAL_OCTETS} octets of letters, digits and"
            " . _ - + = & ' ~ #"
        )
    return local, _domain_row(connection, domain)


def _parse_target(text: str) -> Mailbox:
    try:
        target = Mailbox.parse(text.strip())
        return Mailbox(target.local, target.domain_ascii)
    except BadAddress as problem:
        raise AccountError(f"{_shown(text)} is no address to send to: {problem}") from problem


def _parse_maildir(text: str) -> str:
    path = posixpath.normpath(text)
    if not text or len(text) > _MAX_MAILDIR or _CONTROL.search(text) or path in (".", "/") or ".." in path.split("/"):
        raise AccountError(f"{_shown(text)} cannot be a maildir: expected a path without .. and control characters")
    return path


def _is_taken(connection: Connection, maildir: str, number: int) -> bool:
    taken = select(accounts.c.id).where(accounts.c.maildir == maildir, accounts.c.id != number)
    return connection.execute(taken).first() is not None


def _check_free(connection: Connection, local: str, domain: Any) -> None:
    for table, word in ((accounts, "account"), (aliases, "alias")):
        found = select(table.c.id).where(table.c.domain_id == domain.id, table.c.local_part == local)
        if connection.execute(found).first() is not None:
            raise AccountError(f"the {word} {local}@{domain.name} exists already")


def _account_row(connection: Connection, address: str) -> Any:
    local, domain = _parse_own_address(connection, address)
    found = account_select().where(accounts.c.domain_id == domain.id, accounts.c.local_part == local)
    row = connection.execute(found).first()
    if row is None:
        raise AccountError(f"there is no account {local}@{domain.name}")
    return row


def _change_account(connection: Connection, address: str, **values: Any) -> Account:
    _begin_change(connection)
    row = _account_row(connection, address)
    connection.execute(update(accounts).where(accounts.c.id == row.id).values(**values))
    changed = account_select().where(accounts.c.id == row.id)
    return account_of(connection.execute(changed).one(), row.domain)


def _alias_row(local: str, domain: str, targets: str) -> AliasRow:
    return AliasRow(f"{local}@{domain}", tuple(str(target) for target in parse_targets(targets)))


def _shown(text: str) -> str:
    return repr(text[:80])
