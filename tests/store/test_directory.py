# SPDX-License-Identifier: MIT
"""Domains, accounts and aliases: what addresses mean, and how soon a change is seen."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, fail, gatherResults, maybeDeferred
from zope.interface.verify import verifyObject

from polarismail.store import directory_admin as admin
from polarismail.store.addresses import (
    ACCOUNTS_OF_DOMAIN,
    ALIASES_OF_DOMAIN,
    AddressSettings,
    fold_local,
    login_name,
    name_of,
)
from polarismail.store.directory import Directory, DirectorySettings
from polarismail.store.interfaces import IDirectory, Resolution
from polarismail.values.address import Mailbox
from polarismail.values.errors import AccountError, Unavailable
from tests.databases import KINDS, SwitchedDatabase, open_database
from tests.reactor import reactor, run


class House:
    """A directory over a database of its own, called from the test's thread."""

    def __init__(self, database: SwitchedDatabase, settings: DirectorySettings) -> None:
        self.database = database
        self.directory = Directory(database, reactor, settings)
        run(self.directory.start)

    def do(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self.directory.change, lambda connection: function(connection, *args, **kwargs))

    def resolve(self, address: str) -> Resolution:
        mailbox = Mailbox(address, "") if "@" not in address else Mailbox.parse(address)
        return run(self.directory.resolve, mailbox)

    def targets(self, address: str) -> list[str]:
        """`+` before a maildrop, `-` before a foreign address."""
        resolution = self.resolve(address)
        assert resolution.ours
        return sorted(f"{'-' if t.account is None else '+'}{t.mailbox}" for t in resolution.targets)

    def add_account(self, address: str, **kwargs: Any) -> Any:
        return self.do(admin.add_account, address, kwargs.pop("password_hash", "!"), now=1.0, **kwargs)


@pytest.fixture(scope="module", params=KINDS)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwitchedDatabase]:
    with open_database(request.param, tmp_path_factory.mktemp("directory")) as database:
        yield SwitchedDatabase(database)


def _empty(connection: Any) -> None:
    for row in admin.list_domains(connection):
        admin.remove_domain(connection, row.name, everything=True)


@pytest.fixture
def house(shared: SwitchedDatabase) -> Iterator[House]:
    shared.problem = None
    run(shared.write, _empty)
    built = House(shared, DirectorySettings(poll_seconds=0.05, stale_seconds=0.5))
    built.do(admin.add_domain, "Ours.Example")
    built.add_account("joe@ours.example")
    yield built
    shared.problem = None
    run(built.directory.stop)


def test_it_provides_the_interface(house: House) -> None:
    verifyObject(IDirectory, house.directory)


def test_an_account_is_found_whatever_the_case(house: House) -> None:
    assert house.targets("JOE@OURS.example") == ["+joe@ours.example"]
    assert house.resolve("joe@ours.example").targets[0].account.address == Mailbox("joe", "ours.example")


def test_names_beyond_ascii_are_found_in_every_form(house: House) -> None:
    """RFC 6531: composed or not, in any case, the domain as U-labels or A-labels; it is one account."""
    house.do(admin.add_domain, "bücher.example")
    assert str(house.add_account("Jörg@bücher.example").address) == "jörg@xn--bcher-kva.example"
    house.do(admin.add_alias, "δοκιμή@bücher.example", ["jörg@bücher.example", "用户@foreign.example"])
    for form in ("jörg@bücher.example", "jo\u0308rg@xn--bcher-kva.example", "JÖRG+liste@BÜCHER.example"):
        (target,) = house.resolve(form).targets
        assert target.account is not None and target.account.address.local == "jörg"
    assert house.targets("ΔΟΚΙΜΉ@bücher.example") == ["+jörg@xn--bcher-kva.example", "-用户@foreign.example"]
    assert house.targets("jorg@bücher.example") == []
    assert run(house.directory.find_account, "JÖRG@bücher.example") is not None
    for wrong in ("a\u200bb", "jö rg", "jö\u202erg", "ö" * 33, "☃"):
        with pytest.raises(AccountError, match="cannot be a name here"):
            house.add_account(f"{wrong}@bücher.example")


def test_unknown_users_are_ours_and_nobody(house: House) -> None:
    assert house.resolve("jane@ours.example") == Resolution(True)


def test_foreign_addresses_and_literals_are_not_ours(house: House) -> None:
    for address in ("joe@their.example", "joe@[192.0.2.1]", "joe@[IPv6:2001:db8::1]", "joe@sub.ours.example"):
        assert house.resolve(address) == Resolution(False)


def test_detail_goes_to_the_account_and_stays_visible(house: House) -> None:
    assert house.targets("joe+Lists+x@ours.example") == ["+joe+lists+x@ours.example"]
    house.add_account("joe+own@ours.example")
    assert house.resolve("joe+own@ours.example").targets[0].account.address.local == "joe+own"
    assert house.resolve("+joe@ours.example") == Resolution(True)


def test_no_delimiter_means_no_detail(house: House) -> None:
    plain = House(house.database, DirectorySettings(delimiter=""))
    assert plain.resolve("joe+x@ours.example") == Resolution(True)
    run(plain.directory.stop)


def test_aliases_expand_to_accounts_aliases_and_foreign_addresses(house: House) -> None:
    house.add_account("ann@ours.example")
    house.do(admin.add_alias, "team@ours.example", ["joe@ours.example", "Rest@ours.example", "x@Their.Example"])
    house.do(admin.add_alias, "rest@ours.example", ["ann+t@ours.example", "joe@ours.example", "gone@ours.example"])
    expected = ["+ann+t@ours.example", "+joe@ours.example", "-x@their.example"]
    assert house.targets("team@ours.example") == expected
    assert house.targets("team+tag@ours.example") == expected


def test_loops_are_cut(house: House) -> None:
    house.do(admin.add_alias, "a@ours.example", ["b@ours.example"])
    house.do(admin.add_alias, "b@ours.example", ["a@ours.example"])
    house.do(admin.add_alias, "c@ours.example", ["c@ours.example", "b@ours.example", "joe@ours.example"])
    assert house.resolve("a@ours.example") == Resolution(True)
    assert house.targets("c@ours.example") == ["+joe@ours.example"]


def test_too_many_targets_are_try_again_and_never_a_part_of_them(house: House) -> None:
    hundred = [f"u{number}@their.example" for number in range(100)]
    house.do(admin.add_alias, "full@ours.example", hundred)
    assert len(house.resolve("full@ours.example").targets) == 100
    with pytest.raises(AccountError, match="more than 100"):
        house.do(admin.add_alias, "over@ours.example", ["full@ours.example", "one@their.example"])
    with pytest.raises(AccountError, match="1 to 100"):
        house.do(admin.add_alias, "long@ours.example", [*hundred, "one@their.example"])
    house.do(admin.add_alias, "late@ours.example", ["full@ours.example", "more@ours.example"])
    house.do(admin.add_alias, "more@ours.example", ["one@their.example"])
    with pytest.raises(Unavailable):
        house.resolve("late@ours.example")
    assert house.targets("joe@ours.example") == ["+joe@ours.example"]


def test_the_catch_all_takes_what_nobody_else_does(house: House) -> None:
    house.do(admin.add_alias, "@ours.example", ["joe@ours.example"])
    assert house.targets("anything@ours.example") == ["+joe@ours.example"]
    assert house.targets('"odd name"@ours.example') == ["+joe@ours.example"]
    assert house.targets("m\u00fcller@ours.example") == ["+joe@ours.example"]
    house.add_account("off@ours.example")
    house.do(admin.set_account_active, "off@ours.example", False)
    assert house.resolve("off@ours.example") == Resolution(True), "not for an account that was switched off"
    house.do(admin.remove_alias, "@ours.example")
    assert house.resolve("anything@ours.example") == Resolution(True)


def test_a_catch_all_that_leads_nowhere_ends(house: House) -> None:
    house.do(admin.add_alias, "@ours.example", ["gone@ours.example"])
    assert house.resolve("x@ours.example") == Resolution(True)


def test_postmaster_always_reaches_somebody(house: House) -> None:
    house.do(admin.add_domain, "second.example")
    house.add_account("sue@second.example")
    # Nobody named: the oldest account of the domain.
    assert house.targets("PostMaster@second.example") == ["+sue@second.example"]
    assert house.targets("Postmaster") == ["+joe@ours.example"]
    house.do(admin.add_alias, "postmaster@ours.example", ["joe@ours.example", "noc@their.example"])
    both = ["+joe@ours.example", "-noc@their.example"]
    assert house.targets("Postmaster") == house.targets("postmaster@second.example") == both
    house.add_account("postmaster@second.example")
    assert house.targets("postmaster@second.example") == ["+postmaster@second.example"]
    assert house.resolve("Hostmaster") == Resolution(False)


def test_a_configured_postmaster_takes_over(house: House) -> None:
    configured = House(house.database, DirectorySettings(postmaster="noc@their.example"))
    assert configured.targets("postmaster@ours.example") == ["-noc@their.example"]
    assert configured.targets("POSTMASTER") == ["-noc@their.example"]
    run(configured.directory.stop)
    with pytest.raises(ValueError, match="postmaster"):
        AddressSettings(postmaster="nobody")


def test_internationalised_domains_are_one_in_both_spellings(house: House) -> None:
    assert house.do(admin.add_domain, "M\u00fcller.example") == "xn--mller-kva.example"
    house.add_account("joe@m\u00fcller.example")
    for domain in ("m\u00fcller.example", "xn--mller-kva.example"):
        assert house.targets(f"joe@{domain}") == ["+joe@xn--mller-kva.example"]
        assert run(house.directory.find_account, f"joe@{domain}") is not None


def test_login_names(house: House) -> None:
    def find(name: str) -> Any:
        return run(house.directory.find_account, name)

    assert find("JOE@Ours.Example").address == Mailbox("joe", "ours.example")
    for name in (
        "joe",
        "joe+x@ours.example",
        "",
        "@",
        "joe@",
        "joe@their.example",
        "joe@[192.0.2.1]",
        "joe\0@ours.example",
        "joe@ours.example\n",
        "%@ours.example",
        "../joe@ours.example",
        "\udc80@ours.example",
        "x" * 9999 + "@b.c",
    ):
        assert find(name) is None, name
    house.do(admin.set_account_active, "joe@ours.example", False)
    assert find("joe@ours.example") is None
    house.do(admin.set_account_active, "joe@ours.example", True)
    assert find("joe@ours.example") is not None
    house.do(admin.set_domain_active, "ours.example", False)
    assert find("joe@ours.example") is None
    assert house.resolve("joe@ours.example") == Resolution(True)


def test_accounts_by_number(house: House) -> None:
    number = run(house.directory.find_account, "joe@ours.example").id
    house.do(admin.set_account_active, "joe@ours.example", False)
    assert run(house.directory.account_by_id, number).active is False, "mail that was accepted is still delivered"
    house.do(admin.remove_account, "joe@ours.example")
    assert run(house.directory.account_by_id, number) is None


def test_a_hit_is_synchronous_and_costs_no_read(house: House) -> None:
    for address in ("joe@ours.example", "nobody@ours.example", "x@their.example"):
        house.resolve(address)
    run(house.directory.account_by_id, house.resolve("joe@ours.example").targets[0].account.id)
    run(house.directory.find_account, "joe@ours.example")
    before = house.directory.statistics()["reads"]

    number = house.resolve("joe@ours.example").targets[0].account.id
    assert run(lambda: not isinstance(house.directory.account_by_id(number), Deferred))
    assert run(lambda: isinstance(house.directory.resolve(Mailbox("JOE", "ours.example")), Resolution))
    assert run(lambda: house.directory.resolve(Mailbox("nobody", "ours.example"))) == Resolution(True)
    assert run(lambda: house.directory.resolve(Mailbox("another", "their.example"))) == Resolution(False)
    assert house.directory.statistics()["reads"] == before


def test_many_questions_at_once_share_their_reads(house: House) -> None:
    before = house.directory.statistics()["reads"]

    def ask() -> Any:
        asked = [maybeDeferred(house.directory.resolve, Mailbox(f"u{n % 50}", "ours.example")) for n in range(500)]
        return gatherResults(asked)

    assert run(ask) == [Resolution(True)] * 500
    assert house.directory.statistics()["reads"] <= before + 2


def test_caches_are_bounded(house: House) -> None:
    small = House(house.database, DirectorySettings(cache_entries=10))
    for number in range(30):
        small.resolve(f"u{number}@ours.example")
        small.resolve(f"u@their{number}.example")
        run(small.directory.find_account, f"u{number}@ours.example")
    figures = small.directory.statistics()
    assert figures["addresses"] <= 10 and figures["accounts"] <= 10 and figures["foreign_domains"] <= 10
    run(small.directory.stop)


def test_a_change_by_another_process_is_seen_within_a_second(house: House) -> None:
    assert house.resolve("new@ours.example") == Resolution(True)
    run(house.database.write, lambda c: admin.add_account(c, "new@ours.example", "!", now=1.0))
    deadline = time.monotonic() + 10
    while not house.resolve("new@ours.example").targets:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert DirectorySettings().poll_seconds <= 0.5


def test_an_own_change_is_seen_at_once(house: House) -> None:
    assert house.resolve("new@ours.example") == Resolution(True)
    house.add_account("new@ours.example")
    assert house.targets("new@ours.example") == ["+new@ours.example"]


def test_an_unavailable_database_is_try_again(house: House) -> None:
    house.resolve("joe@ours.example")
    house.database.problem = lambda: fail(Unavailable("down"))
    with pytest.raises(Unavailable):
        house.resolve("other@ours.example")
    with pytest.raises(Unavailable):
        run(house.directory.find_account, "other@ours.example")
    assert house.targets("joe@ours.example"), "a short silence is bridged"
    deadline = time.monotonic() + 10
    while True:
        try:
            house.resolve("joe@ours.example")
        except Unavailable:
            break
        assert time.monotonic() < deadline
        time.sleep(0.02)
    house.database.problem = None
    assert house.targets("other+x@ours.example") == []
    assert house.targets("joe@ours.example") == ["+joe@ours.example"]


def test_an_unexpected_error_is_try_again_too(house: House) -> None:
    house.database.problem = lambda: fail(RuntimeError("a driver's surprise"))
    with pytest.raises(Unavailable):
        house.resolve("other@ours.example")

    def explode() -> Any:
        raise RuntimeError("synchronously")

    house.database.problem = explode
    with pytest.raises(Unavailable):
        house.resolve("another@ours.example")


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=80))
def test_any_text_is_a_login_name_or_none(text: str) -> None:
    name = login_name(text)
    if name is not None:
        assert name.local.isprintable() and name.domain
        assert login_name(f"{Mailbox(name.local, name.domain)}") == name


@settings(max_examples=300, deadline=None)
@given(st.text(min_size=1), st.text())
def test_names_of_any_mailbox_are_fit_for_a_database(local: str, domain: str) -> None:
    name = name_of(Mailbox(local, domain))
    if name is not None:
        assert name.domain.isascii() and "\0" not in name.local
        name.local.encode()
        assert fold_local(name.local) == name.local


def test_statements_use_the_indexes(tmp_path: Path) -> None:
    with open_database("sqlite", tmp_path) as database:

        def plans(connection: Any) -> list[str]:
            wanted = {"domain": 1, "names": ["", "joe"]}
            literal = {"literal_binds": True, "render_postcompile": True}
            found = []
            for statement in (ACCOUNTS_OF_DOMAIN, ALIASES_OF_DOMAIN):
                text = str(statement.params(wanted).compile(connection.engine, compile_kwargs=literal))
                found += [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}")]
            return found

        found = run(database.read, plans)
        assert len(found) == 2 and all("SEARCH" in step and "local_part=?" in step for step in found), found
