# SPDX-License-Identifier: MIT
"""Logins through the portal: right, wrong, unavailable, shared, and dropped on change."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from twisted.cred.checkers import ANONYMOUS, ICredentialsChecker, InMemoryUsernamePasswordDatabaseDontUse
from twisted.cred.credentials import Anonymous, IUsernamePassword, UsernamePassword
from twisted.cred.error import UnauthorizedLogin, UnhandledCredentials
from twisted.cred.portal import IRealm, Portal
from twisted.internet.defer import Deferred, DeferredList, fail, gatherResults, maybeDeferred
from zope.interface import Interface
from zope.interface.verify import verifyObject

from polarismail.auth.checker import DirectoryChecker, PlainCredentials, VouchedCredentials
from polarismail.auth.interfaces import IMaildropAvatar, IPlainCredentials, IReception, IVouchedCredentials
from polarismail.auth.logins import LoginCacheSettings, VerifiedLogins
from polarismail.auth.passwords import Passwords, PasswordSettings, hash_password
from polarismail.auth.portal import build_portal, credentials_for
from polarismail.auth.realm import MailRealm
from polarismail.store import directory_admin as admin
from polarismail.store.directory import Directory, DirectorySettings
from polarismail.store.interfaces import Account
from polarismail.values.address import Mailbox
from polarismail.values.errors import Unavailable
from tests.databases import KINDS, SwitchedDatabase, open_database
from tests.reactor import reactor, run

CHEAP = PasswordSettings(memory_kib=64, iterations=1)


class CountingPasswords(Passwords):
    """Counts the hashes that logins cost."""

    verified = 0

    def verify(self, password_hash: str | None, password: bytes) -> Deferred[bool]:
        self.verified += 1
        return super().verify(password_hash, password)


class Avatar:
    def __init__(self, account: Account | None, mind: Any) -> None:
        self.account, self.mind, self.logouts = account, mind, 0

    def logout(self) -> None:
        self.logouts += 1


class Gate:
    """A portal over a directory of its own, called from the test's thread."""

    def __init__(self, database: SwitchedDatabase) -> None:
        self.database = database
        self.directory = Directory(database, reactor, DirectorySettings(poll_seconds=0.05, stale_seconds=0.3))
        self.passwords = CountingPasswords(reactor, CHEAP)
        self.logins = VerifiedLogins(LoginCacheSettings())
        self.portal = build_portal(self.directory, self.passwords, self.logins, Avatar, Avatar)

    def login(self, credentials: Any, interface: type[Interface] = IReception) -> Any:
        """The account, or None for a stranger."""
        return run(self.portal.login, credentials, "mind", interface)[1].account

    def attempt(self, password: bytes = b"sesame", name: str = "joe@ours.example", authzid: str = "") -> Any:
        return self.login(PlainCredentials(name, password, authzid))


@pytest.fixture(scope="module", params=KINDS)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwitchedDatabase]:
    with open_database(request.param, tmp_path_factory.mktemp("checker")) as database:
        yield SwitchedDatabase(database)


def _people(connection: Any) -> None:
    for row in admin.list_domains(connection):
        admin.remove_domain(connection, row.name, everything=True)
    admin.add_domain(connection, "ours.example")
    admin.add_account(connection, "joe@ours.example", hash_password("sesame", CHEAP), now=1.0)
    admin.add_account(connection, "ann@ours.example", hash_password("sesame", CHEAP), now=1.0)
    admin.add_alias(connection, "alias@ours.example", ["joe@ours.example"])


@pytest.fixture
def gate(shared: SwitchedDatabase) -> Iterator[Gate]:
    shared.problem = None
    run(shared.write, _people)
    built = Gate(shared)
    built.passwords.start()
    run(built.directory.start)
    yield built
    shared.problem = None
    run(built.directory.stop)
    built.passwords.stop()


def test_who_is_vouched_for_must_exist_and_needs_no_password(gate: Gate) -> None:
    account = gate.login(VouchedCredentials("JOE@ours.example"))
    assert str(account.address) == "joe@ours.example"
    for name in ("alias@ours.example", "nobody@ours.example", "", "joe\0@ours.example"):
        with pytest.raises(UnauthorizedLogin):
            gate.login(VouchedCredentials(name))
    assert gate.passwords.verified == 0
    gate.database.problem = Unavailable("down")
    with pytest.raises(Unavailable):
        gate.login(VouchedCredentials("new@ours.example"))


def test_interfaces(gate: Gate) -> None:
    checker = DirectoryChecker(gate.directory, gate.passwords, gate.logins)
    verifyObject(ICredentialsChecker, checker)
    verifyObject(IPlainCredentials, PlainCredentials("a", b"b"))
    verifyObject(IRealm, MailRealm(Avatar, Avatar))
    verifyObject(IVouchedCredentials, VouchedCredentials("a"))
    assert set(checker.credentialInterfaces) == {IPlainCredentials, IUsernamePassword, IVouchedCredentials}


def test_a_login_in_any_spelling_and_both_kinds(gate: Gate) -> None:
    for name in ("joe@ours.example", "JOE@Ours.Example"):
        assert gate.attempt(name=name).address == Mailbox("joe", "ours.example")
        assert gate.login(UsernamePassword(name.encode(), b"sesame")).address == Mailbox("joe", "ours.example")
        assert gate.login(UsernamePassword(name, "sesame"), IMaildropAvatar).id
    assert gate.passwords.verified == 1, "one account is one entry, however it is spelled"


@pytest.mark.parametrize(
    "name",
    [
        "joe",
        "jane@ours.example",
        "alias@ours.example",
        "joe+x@ours.example",
        "joe@their.example",
        "",
        "\udc80@x",
        "'; --",
    ],
)
def test_who_does_not_exist_costs_one_hash_and_is_wrong(gate: Gate, name: str) -> None:
    with pytest.raises(UnauthorizedLogin):
        gate.attempt(name=name)
    assert gate.passwords.verified == 1


def test_wrong_passwords(gate: Gate) -> None:
    for password in (b"", b"Sesame", b"sesame\0", b"\xff", b"x" * 12000):
        with pytest.raises(UnauthorizedLogin):
            gate.attempt(password)
    assert gate.passwords.verified == 5


def test_what_is_switched_off_is_wrong_at_the_same_price(gate: Gate) -> None:
    gate.attempt()
    run(gate.directory.change, lambda c: admin.set_account_active(c, "joe@ours.example", False))
    with pytest.raises(UnauthorizedLogin):
        gate.attempt()
    assert gate.passwords.verified == 2


def test_authzid_is_empty_or_oneself(gate: Gate) -> None:
    assert gate.attempt(authzid="JOE@ours.example").address.local == "joe"
    for authzid in ("ann@ours.example", "joe", "admin"):
        with pytest.raises(UnauthorizedLogin):
            gate.attempt(authzid=authzid)


def test_pollers_cost_nothing(gate: Gate) -> None:
    gate.attempt()
    time.sleep(0.2)
    reads = gate.directory.statistics()["reads"]
    for _ in range(50):
        gate.attempt()
    assert gate.passwords.verified == 1
    assert gate.directory.statistics()["reads"] == reads


def test_a_changed_password_is_seen_and_the_old_one_is_dropped(gate: Gate) -> None:
    gate.attempt()
    made = hash_password("other", CHEAP)
    run(gate.database.write, lambda c: admin.set_password_hash(c, "joe@ours.example", made))
    deadline = time.monotonic() + 10
    while True:
        try:
            gate.attempt()
        except UnauthorizedLogin:
            break
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert gate.attempt(b"other").address.local == "joe"


def test_a_change_of_somebody_else_costs_a_read_and_no_hash(gate: Gate) -> None:
    gate.attempt()
    run(gate.directory.change, lambda c: admin.remove_account(c, "ann@ours.example"))
    gate.attempt()
    assert gate.passwords.verified == 1


def test_a_removed_account_is_gone(gate: Gate) -> None:
    gate.attempt()
    run(gate.directory.change, lambda c: admin.remove_account(c, "joe@ours.example"))
    with pytest.raises(UnauthorizedLogin):
        gate.attempt()


def test_a_new_account_of_the_same_name_is_not_the_old_one(gate: Gate) -> None:
    first = gate.attempt()
    run(gate.directory.change, lambda c: admin.remove_account(c, "joe@ours.example"))
    made = hash_password("sesame", CHEAP)
    run(gate.directory.change, lambda c: admin.add_account(c, "joe@ours.example", made, now=1.0))
    assert gate.attempt().id != first.id


def test_the_same_login_many_times_at_once_is_verified_once(gate: Gate) -> None:
    def flood(password: bytes) -> Any:
        logins = [
            gate.portal.login(PlainCredentials("joe@ours.example", password), None, IReception) for _ in range(200)
        ]
        return DeferredList(logins, consumeErrors=True)

    assert all(good for good, _ in run(flood, b"sesame"))
    assert gate.passwords.verified == 1
    assert all(result.check(UnauthorizedLogin) for _, result in run(flood, b"wrong"))
    assert gate.passwords.verified == 2


def test_different_logins_at_once_stay_apart(gate: Gate) -> None:
    def both() -> Any:
        names = ("joe@ours.example", "ann@ours.example") * 10
        return gatherResults([gate.portal.login(PlainCredentials(name, b"sesame"), None, IReception) for name in names])

    locals_ = [avatar.account.address.local for _, avatar, _ in run(both)]
    assert locals_ == ["joe", "ann"] * 10


def test_an_unavailable_database_is_never_a_wrong_password(gate: Gate) -> None:
    for problem in (Unavailable("down"), RuntimeError("a driver's surprise")):
        gate.database.problem = lambda problem=problem: fail(problem)
        with pytest.raises(Unavailable):
            gate.attempt(name="ann@ours.example")
        with pytest.raises(Unavailable):
            gate.attempt(name="nobody@ours.example")
    gate.database.problem = None
    assert gate.attempt(name="ann@ours.example").address.local == "ann"


def test_verified_logins_are_not_believed_for_ever_without_the_database(gate: Gate) -> None:
    gate.attempt()
    gate.database.problem = lambda: fail(Unavailable("down"))
    deadline = time.monotonic() + 10
    while True:
        try:
            gate.attempt()
        except Unavailable:
            break
        assert time.monotonic() < deadline
        time.sleep(0.02)
    gate.database.problem = None
    assert gate.attempt().address.local == "joe"
    assert gate.passwords.verified == 1


def test_a_full_line_is_try_again(gate: Gate) -> None:
    gate.passwords.stop()
    with pytest.raises(Unavailable):
        gate.attempt()
    with pytest.raises(Unavailable):
        gate.attempt(name="nobody@ours.example")


def test_secrets_are_not_in_the_repr() -> None:
    assert "sesame" not in repr(PlainCredentials("joe", b"sesame"))


def test_a_stranger_gets_a_reception_and_no_maildrop(gate: Gate) -> None:
    assert gate.login(Anonymous()) is None
    with pytest.raises(UnauthorizedLogin):
        gate.login(Anonymous(), IMaildropAvatar)


def test_the_realm_gives_the_first_interface_it_knows() -> None:
    class IOther(Interface):
        """Nobody's."""

    realm = MailRealm(Avatar, Avatar)
    account = Account(1, Mailbox("joe", "ours.example"), "accounts/000/1", None, None, "")
    interface, avatar, logout = realm.requestAvatar(account, "mind", IOther, IMaildropAvatar, IReception)
    assert interface is IMaildropAvatar and avatar.mind == "mind" and avatar.account is account
    logout()
    assert avatar.logouts == 1
    interface, avatar, logout = realm.requestAvatar(ANONYMOUS, None, IReception, IMaildropAvatar)
    assert interface is IReception and avatar.account is None
    logout()
    for wrong in ((account, IOther), (b"joe", IReception)):
        with pytest.raises(TypeError):
            realm.requestAvatar(wrong[0], None, wrong[1])


def test_any_checker_of_twisted_works_behind_our_session() -> None:
    class Realm:
        def requestAvatar(self, avatarId: bytes, mind: Any, *interfaces: Any) -> Any:
            return interfaces[0], avatarId, lambda: None

    portal = Portal(Realm(), [InMemoryUsernamePasswordDatabaseDontUse(joe=b"sesame")])  # type: ignore[arg-type]
    credentials = credentials_for(portal, "joe", b"sesame")
    assert run(portal.login, credentials, None, IReception)[1] == b"joe"
    with pytest.raises(UnauthorizedLogin):
        credentials_for(portal, "joe", b"sesame", "ann")
    with pytest.raises(UnhandledCredentials):
        run(lambda: maybeDeferred(portal.login, Anonymous(), None, IReception))
