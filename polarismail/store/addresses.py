# SPDX-License-Identifier: MIT
"""What addresses and login names mean, read from the tables inside one transaction.

Guarantees: a bounded amount of work for any address, however aliases refer to each other: loops are cut, and one that
leads to more than 100 targets is an error of ours ("try again", and a line in the log), because leaving some out would
lose mail. Names are compared in lower case, beyond ASCII case-folded and composed (NFC), domains as A-labels; nothing that a
client sends becomes a path. RFC 5321 §2.4 (case), §3.9 (aliases), §4.5.1 (Postmaster); RFC 5233 (detail); RFC 6531 (UTF-8).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from attrs import field, frozen
from sqlalchemy import Connection, Select, bindparam, select

from polarismail.store.interfaces import Account, Resolution, Target
from polarismail.store.schema import accounts, aliases, domains, generations
from polarismail.values.address import Mailbox
from polarismail.values.errors import BadAddress, TooManyTargets

GENERATION = "directory"
MAX_TARGETS = 100
MAX_STEPS = 1000  # addresses looked at for one resolution
FOREIGN = Resolution(False)
NOBODY = Resolution(True)
POSTMASTER = "postmaster"


def _check_postmaster(_: object, __: object, address: str) -> None:
    try:
        if address:
            Mailbox.parse(address)
    except BadAddress as problem:
        raise ValueError(f'postmaster: expected an address or "", found {address!r}: {problem}') from problem


@frozen
class AddressSettings:
    """How addresses of ours are read."""

    delimiter: str = "+"  # between an account and its detail; "": none
    postmaster: str = field(default="", validator=_check_postmaster)  # who gets the mail of domains that have none


@frozen
class Name:
    """An address as it is looked up: lower case, A-labels. `local` is "" where only the catch-all can match."""

    local: str
    domain: str


def name_of(mailbox: Mailbox) -> Name | None:
    """None for what can never be ours: an address literal, a domain that is none, no domain at all."""
    domain = mailbox.domain
    if domain[:1] == "[" or not domain:
        # RFC 5321 §4.1.1.3: the bare Postmaster alone has no domain.
        return Name(POSTMASTER, "") if not domain and mailbox.local.lower() == POSTMASTER else None
    if not domain.isascii():
        try:
            domain = mailbox.domain_ascii
        except BadAddress:
            return None
    local = mailbox.local
    # Accounts and aliases have printable names. This also keeps NUL and lone surrogates away from the database.
    return Name(fold_local(local) if local.isprintable() else "", domain.lower())


def fold_local(local: str) -> str:
    """A local part as it is compared here. What is stored for other hosts, and said to them, stays as it came."""
    if local.isascii():
        return local.lower()
    # Caseless matching as Unicode has it (D145), in the form that people type.
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", local).casefold())


def login_name(text: str) -> Name | None:
    """What somebody logs in as: an address, in any case. None for what no account is called."""
    try:
        name = name_of(Mailbox.parse(text))
    except BadAddress:
        return None
    return name if name is not None and name.local and name.domain else None


_GENERATION = select(generations.c.value).where(generations.c.name == GENERATION)
_DOMAINS = select(domains.c.id, domains.c.name, domains.c.active).where(
    domains.c.name.in_(bindparam("names", expanding=True))
)
_FIRST_DOMAIN = select(domains.c.name).where(domains.c.active).order_by(domains.c.id).limit(1)
_ACCOUNT_COLUMNS = (
    accounts.c.id,
    accounts.c.domain_id,
    accounts.c.local_part,
    accounts.c.maildir,
    accounts.c.uid,
    accounts.c.gid,
    accounts.c.password_hash,
    accounts.c.active,
)
# A domain at a time: SQLite scans the whole table for `(domain_id, local_part) IN (VALUES ...)`.
ACCOUNTS_OF_DOMAIN = select(*_ACCOUNT_COLUMNS).where(
    accounts.c.domain_id == bindparam("domain"), accounts.c.local_part.in_(bindparam("names", expanding=True))
)
ALIASES_OF_DOMAIN = select(aliases.c.local_part, aliases.c.targets).where(
    aliases.c.domain_id == bindparam("domain"), aliases.c.local_part.in_(bindparam("names", expanding=True))
)
_WITH_DOMAIN = select(*_ACCOUNT_COLUMNS, domains.c.name.label("domain"), domains.c.active.label("domain_active"))
_BY_ID = _WITH_DOMAIN.join_from(accounts, domains).where(accounts.c.id.in_(bindparam("ids", expanding=True)))
_OLDEST = (
    _WITH_DOMAIN.join_from(accounts, domains)
    .where(domains.c.name == bindparam("domain"), accounts.c.active)
    .order_by(accounts.c.id)
    .limit(1)
)


def read_generation(connection: Connection) -> int:
    """How often domains, accounts and aliases have been changed."""
    return int(connection.execute(_GENERATION).scalar() or 0)


def account_select() -> Select[Any]:
    """Accounts with `domain` and `domain_active`, for `account_of`."""
    return _WITH_DOMAIN.join_from(accounts, domains)


def account_of(row: Any, domain: str) -> Account:
    """The value of one row of `accounts`."""
    return Account(
        row.id,
        Mailbox(row.local_part, domain),
        row.maildir,
        row.uid,
        row.gid,
        row.password_hash,
        bool(row.active),
    )


def parse_targets(text: str) -> list[Mailbox]:
    """The targets of an alias as the table keeps them: one `local@domain` a line, unquoted, split at the last `@`."""
    return [Mailbox(local, domain) for local, _, domain in (line.rpartition("@") for line in text.split("\n") if line)]


class AddressReader:
    """What one transaction has read so far; a fresh one for each job. Names of one domain are loaded together."""

    def __init__(self, connection: Connection, settings: AddressSettings) -> None:
        self._connection, self._settings = connection, settings
        self._domains: dict[str, Any] = {}  # a row, or None where the domain is not ours
        self._loaded: set[Name] = set()
        self._accounts: dict[tuple[int, str], Account] = {}
        self._aliases: dict[tuple[int, str], str] = {}

    def load(self, names: Iterable[Name]) -> None:
        """Read what `find` needs for these names."""
        fresh = [name for name in names if name not in self._loaded]
        if not fresh:
            return
        self._loaded.update(fresh)
        missing = {name.domain for name in fresh} - self._domains.keys()
        if missing:
            self._domains.update(dict.fromkeys(missing))
            for domain in self._connection.execute(_DOMAINS, {"names": sorted(missing)}):
                self._domains[domain.name] = domain
        locals_of: dict[str, set[str]] = {}
        for name in fresh:
            if self._domains[name.domain] is not None:
                locals_of.setdefault(name.domain, {""}).update(self._candidates(name.local))
        for domain_name, local_parts in locals_of.items():
            number = self._domains[domain_name].id
            wanted = {"domain": number, "names": sorted(local_parts)}
            for account in self._connection.execute(ACCOUNTS_OF_DOMAIN, wanted):
                self._accounts[number, account.local_part] = account_of(account, domain_name)
            for alias in self._connection.execute(ALIASES_OF_DOMAIN, wanted):
                self._aliases[number, alias.local_part] = alias.targets

    def login(self, name: Name) -> Account | None:
        """The active account with exactly this name. `load` it first."""
        domain = self._domains[name.domain]
        account = self._accounts.get((domain.id, name.local)) if domain is not None and domain.active else None
        return account if account is not None and account.active else None

    def accounts_by_id(self, ids: Sequence[int]) -> dict[int, Account]:
        """The accounts with these numbers, switched off or not."""
        return {row.id: account_of(row, row.domain) for row in self._connection.execute(_BY_ID, {"ids": list(ids)})}

    def resolve(self, name: Name) -> Resolution:
        """What the address means (IDirectory.resolve). Raises Unavailable for one that leads to too many."""
        if name.domain:
            self.load([name])
            if self._domains[name.domain] is None:
                return FOREIGN
            targets = self._expand(Mailbox(name.local, name.domain))
        else:
            targets = ()
        if not targets and name.local == POSTMASTER:
            targets = self._postmaster(name.domain)
        return Resolution(True, targets) if targets else NOBODY

    def _postmaster(self, domain: str) -> tuple[Target, ...]:
        # RFC 5321 §4.5.1: postmaster of every domain of ours, and without a domain, must reach somebody.
        first = self._connection.execute(_FIRST_DOMAIN).scalar()
        own = [Mailbox(POSTMASTER, first)] if first else []
        configured = [Mailbox.parse(self._settings.postmaster)] if self._settings.postmaster else []
        for candidate in own + configured:
            targets = self._expand(candidate)
            if targets:
                return targets
        for name in (domain, first):
            row = self._connection.execute(_OLDEST, {"domain": name}).first() if name else None
            if row is not None:
                account = account_of(row, row.domain)
                return (Target(account.address, account),)
        return ()

    def _expand(self, mailbox: Mailbox) -> tuple[Target, ...]:
        targets: dict[object, Target] = {}
        seen: set[Name] = set()
        wave = [mailbox]
        while wave:
            named = [(each, name_of(each)) for each in wave]
            fresh = list({name: each for each, name in named if name is not None and name not in seen}.items())
            for each, name in named:
                if name is None:
                    targets[each] = Target(each)
            seen.update(name for name, _ in fresh)
            self.load(name for name, _ in fresh)
            wave = []
            for name, each in fresh:
                found = self._find(name, each)
                if isinstance(found, Target):
                    targets[found.mailbox if found.account is None else found.account.id] = found
                else:
                    wave.extend(found)
            if len(targets) > MAX_TARGETS or len(seen) + len(wave) > MAX_STEPS:
                raise TooManyTargets(f"the alias {mailbox} leads to more than {MAX_TARGETS} addresses")
        return tuple(targets.values())

    def _find(self, name: Name, mailbox: Mailbox) -> Target | list[Mailbox]:
        """One step: a target, or the addresses that an alias names (none for nobody)."""
        domain = self._domains[name.domain]
        if domain is None:
            return Target(Mailbox(mailbox.local, name.domain))
        if not domain.active:
            return []
        for local in self._candidates(name.local):
            account = self._accounts.get((domain.id, local))
            if account is not None:
                # Mail for an account that is switched off goes to nobody, and not to the catch-all.
                return Target(Mailbox(name.local, name.domain), account) if account.active else []
            text = self._aliases.get((domain.id, local))
            if text is not None:
                return parse_targets(text)
        return parse_targets(self._aliases.get((domain.id, ""), ""))

    def _candidates(self, local: str) -> tuple[str, ...]:
        if not local:
            return ()
        delimiter = self._settings.delimiter
        base = local.partition(delimiter)[0] if delimiter else local
        return (local, base) if base and base != local else (local,)
