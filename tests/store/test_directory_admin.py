# SPDX-License-Identifier: MIT
"""Changes of domains, accounts and aliases: what is refused, what is stored, and that everybody hears of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from twisted.internet.defer import DeferredList

from polarismail.store import directory_admin as admin
from polarismail.store.addresses import read_generation
from polarismail.store.database import Database
from polarismail.store.interfaces import Account
from polarismail.values.address import Mailbox
from polarismail.values.errors import AccountError
from tests.databases import KINDS, open_database
from tests.reactor import reactor, run


class Office:
    """Runs changes as the server does: each in a savepoint of the committer's transaction."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def do(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self.database.write, lambda connection: function(connection, *args, **kwargs))

    def look(self, function: Any, *args: Any) -> Any:
        return run(self.database.read, lambda connection: function(connection, *args))

    def add(self, address: str, **kwargs: Any) -> Account:
        account: Account = self.do(admin.add_account, address, "hash", now=1.0, **kwargs)
        return account

    @property
    def generation(self) -> int:
        return int(self.look(read_generation))


@pytest.fixture(scope="module", params=KINDS)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    with open_database(request.param, tmp_path_factory.mktemp("admin")) as database:
        yield Office(database)


@pytest.fixture
def office(shared: Office) -> Office:
    for row in shared.look(admin.list_domains):
        shared.do(admin.remove_domain, row.name, everything=True)
    shared.do(admin.add_domain, "ours.example")
    return shared


def test_domains(office: Office) -> None:
    assert office.do(admin.add_domain, " Two.Example ") == "two.example"
    office.add("joe@two.example")
    office.do(admin.add_alias, "@two.example", ["joe@two.example"])
    assert office.look(admin.list_domains) == [
        admin.DomainRow("ours.example", True, 0, 0),
        admin.DomainRow("two.example", True, 1, 1),
    ]
    with pytest.raises(AccountError, match="still has 1 accounts"):
        office.do(admin.remove_domain, "two.example")
    assert len(office.look(admin.list_accounts)) == 1
    office.do(admin.remove_domain, "two.example", everything=True)
    assert [row.name for row in office.look(admin.list_domains)] == ["ours.example"]
    assert office.look(admin.list_accounts) == office.look(admin.list_aliases) == []


@pytest.mark.parametrize("name", ["", "[192.0.2.1]", "a..b", "a b", "-", "x/y", "127.0.0.1", "a\0b", "OURS.example"])
def test_domains_that_are_refused(office: Office, name: str) -> None:
    with pytest.raises(AccountError):
        office.do(admin.add_domain, name)
    with pytest.raises(AccountError):
        office.do(admin.remove_domain, f"no-{name}")


def test_accounts_get_their_maildir_by_number(office: Office) -> None:
    joe = office.add(" JOE.Q@Ours.Example ", uid=1000, gid=1000)
    assert joe.address == Mailbox("joe.q", "ours.example")
    assert joe.maildir == f"accounts/{joe.id // 1000:03d}/{joe.id}"
    given = office.add("imported@ours.example", maildir="/srv/mail/odd name/Maildir/")
    assert given.maildir == "/srv/mail/odd name/Maildir"
    assert office.look(admin.list_accounts, "ours.example") == [given, joe]
    assert "hash" not in repr(joe)


def test_a_maildir_has_one_account(office: Office) -> None:
    taken = office.add("a@ours.example", maildir="shared/box")
    with pytest.raises(AccountError, match="belongs to another"):
        office.add("b@ours.example", maildir="shared//box/.")
    ahead = f"accounts/{(taken.id + 9) // 1000:03d}/"
    for step in range(1, 9):
        office.add(f"c{step}@ours.example", maildir=f"{ahead}{taken.id + 9 + step}")
    made = [office.add(f"d{step}@ours.example") for step in range(9)]
    assert len({account.maildir for account in office.look(admin.list_accounts)}) == 18
    assert all(str(account.id) in account.maildir for account in made)


def test_numbers_are_never_reused(office: Office) -> None:
    first = office.add("joe@ours.example")
    assert office.do(admin.remove_account, "joe@ours.example") == first
    second = office.add("joe@ours.example")
    assert second.id > first.id and second.maildir != first.maildir


@pytest.mark.parametrize(
    "address",
    [
        "",
        "@ours.example",
        "joe",
        "joe@",
        "joe@their.example",
        "../joe@ours.example",
        "a/b@ours.example",
        ".a@ours.example",
        "a..b@ours.example",
        "a\n@ours.example",
        "a\0@ours.example",
        "a b@ours.example",
        '"a"@ours.example',
        "a%b@ours.example",
        "a*@ours.example",
        "a`b@ours.example",
        "a|b@ours.example",
        "-a@ours.example",
        "j\u00f6\u200b@ours.example",
        "\u0308o@ours.example",
        "a" * 65 + "@ours.example",
        "a@b@ours.example",
        "\udc80@ours.example",
    ],
)
def test_names_that_are_refused(office: Office, address: str) -> None:
    before = office.generation
    with pytest.raises(AccountError):
        office.add(address)
    if address != "@ours.example":
        with pytest.raises(AccountError):
            office.do(admin.add_alias, address, ["x@their.example"])
    assert office.look(admin.list_accounts) == [] and office.generation == before


@pytest.mark.parametrize("maildir", ["", ".", "/", "../x", "a/../../b", "a\nb", "a\0b", "x" * 1025])
def test_maildirs_that_are_refused(office: Office, maildir: str) -> None:
    with pytest.raises(AccountError):
        office.add("joe@ours.example", maildir=maildir)


@pytest.mark.parametrize("ids", [{"uid": 0}, {"uid": -1}, {"gid": 0}, {"uid": 2**32 - 1}])
def test_ids_that_are_refused(office: Office, ids: dict[str, int]) -> None:
    with pytest.raises(AccountError):
        office.add("joe@ours.example", **ids)


def test_an_address_is_one_thing(office: Office) -> None:
    office.add("joe@ours.example")
    office.do(admin.add_alias, "team@ours.example", ["joe@ours.example"])
    for change in (
        lambda: office.add("Joe@ours.example"),
        lambda: office.add("team@ours.example"),
        lambda: office.do(admin.add_alias, "joe@ours.example", ["x@their.example"]),
        lambda: office.do(admin.add_alias, "TEAM@ours.example", ["x@their.example"]),
    ):
        with pytest.raises(AccountError, match="exists already"):
            change()


def test_changes_of_accounts(office: Office) -> None:
    joe = office.add("joe@ours.example")
    changed = office.do(admin.set_password_hash, "JOE@ours.example", "other")
    assert (changed.id, changed.password_hash, changed.active) == (joe.id, "other", True)
    assert office.do(admin.set_account_active, "joe@ours.example", False).active is False
    assert office.look(admin.list_accounts)[0].active is False
    for function, args in (
        (admin.set_password_hash, ("x",)),
        (admin.set_account_active, (True,)),
        (admin.remove_account, ()),
    ):
        with pytest.raises(AccountError, match="there is no account"):
            office.do(function, "nobody@ours.example", *args)


def test_aliases(office: Office) -> None:
    made = office.do(
        admin.add_alias, "Team@ours.example", [" joe@ours.example ", "A.b@B\u00fccher.example", "joe@ours.example"]
    )
    assert made == admin.AliasRow("team@ours.example", ("joe@ours.example", "A.b@xn--bcher-kva.example"))
    every = office.do(admin.add_alias, "@ours.example", ['"odd @ name"@their.example'])
    assert every == admin.AliasRow("@ours.example", ('"odd @ name"@their.example',))
    assert office.look(admin.list_aliases) == office.look(admin.list_aliases, "ours.example") == [every, made]
    with pytest.raises(AccountError, match="exists already"):
        office.do(admin.add_alias, "@ours.example", ["x@their.example"])
    assert office.do(admin.remove_alias, "@ours.example") == every
    assert office.do(admin.remove_alias, "team@ours.example") == made
    with pytest.raises(AccountError, match="there is no alias"):
        office.do(admin.remove_alias, "team@ours.example")


@pytest.mark.parametrize(
    "targets",
    [
        [],
        ["joe"],
        ["joe@"],
        ["a b@x.example"],
        ["a@x.example\nb@x.example"],
        ["j\x85@x.example"],
        ["self@ours.example"],
    ],
)
def test_targets_that_are_refused(office: Office, targets: list[str]) -> None:
    with pytest.raises(AccountError):
        office.do(admin.add_alias, "self@ours.example", targets)


def test_every_change_moves_the_generation(office: Office) -> None:
    changes: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (admin.add_domain, ("two.example",), {}),
        (admin.set_domain_active, ("two.example", False), {}),
        (admin.add_account, ("joe@two.example", "x"), {"now": 1.0}),
        (admin.set_password_hash, ("joe@two.example", "y"), {}),
        (admin.set_account_active, ("joe@two.example", False), {}),
        (admin.add_alias, ("@two.example", ["joe@two.example"]), {}),
        (admin.remove_alias, ("@two.example",), {}),
        (admin.remove_account, ("joe@two.example",), {}),
        (admin.remove_domain, ("two.example",), {}),
    ]
    for function, args, kwargs in changes:
        before = office.generation
        office.do(function, *args, **kwargs)
        assert office.generation == before + 1, function.__name__


def test_changes_of_several_processes_wait_for_each_other(request: pytest.FixtureRequest, office: Office) -> None:
    others = [Office(office.database) for _ in range(2)]
    if not office.database.is_sqlite:
        others = []
        for _ in range(2):
            database = Database(office.database.url, reactor=reactor, joins=False)
            run(database.start)
            request.addfinalizer(lambda database=database: run(database.stop))
            others.append(Office(database))

    def add(number: int, each: Office) -> Any:
        address = f"{number}@ours.example"
        return each.database.write(lambda c: admin.add_account(c, address, "x", now=1.0, maildir="one"))

    def race() -> Any:
        return DeferredList([add(*each) for each in enumerate(others * 5)], consumeErrors=True)

    outcomes = run(race)
    assert [good for good, _ in outcomes].count(True) == 1
    assert all(result.check(AccountError) for good, result in outcomes if not good)
