# SPDX-License-Identifier: MIT
"""The one credential checker of SMTP, POP3 and IMAP: a name and a password become an Account.

Guarantees: a name that does not exist, one that is switched off and a wrong password cost the same work and give the
same UnauthorizedLogin; a database or a hash pool that cannot answer is Unavailable, never "wrong"; a login that was
verified lately, and whose account has not changed since, costs neither hashing nor a read; the same login arriving
many times at once is verified once.
RFC 4616 §2 (authzid); RFC 4954 §6 (535 and 454).
"""

from __future__ import annotations

from typing import Any

from attrs import field, frozen
from twisted.cred.checkers import ICredentialsChecker
from twisted.cred.credentials import IUsernamePassword
from twisted.cred.error import UnauthorizedLogin
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from polarismail.auth.interfaces import IPlainCredentials, IVouchedCredentials
from polarismail.auth.logins import VerifiedLogins
from polarismail.auth.passwords import Passwords
from polarismail.store.addresses import login_name, name_of
from polarismail.store.interfaces import Account, IDirectory
from polarismail.values.errors import Unavailable


def _octets(text: str | bytes) -> bytes:
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else bytes(text)


def _text(octets: str | bytes | None) -> str:
    # What is no UTF-8 becomes a name that nobody has.
    return octets if isinstance(octets, str) else (octets or b"").decode("utf-8", "replace")


@implementer(IPlainCredentials)
@frozen
class PlainCredentials:
    """See IPlainCredentials. Text and octets are both taken; the password is not in the repr."""

    authcid: str = field(converter=_text)
    password: bytes = field(converter=_octets, repr=False)
    authzid: str = field(default="", converter=_text)


@implementer(IVouchedCredentials)
@frozen
class VouchedCredentials:
    """See IVouchedCredentials."""

    authcid: str


@implementer(ICredentialsChecker)
class DirectoryChecker:
    """Looks accounts up in a directory and verifies their passwords. The avatar id is the Account."""

    log = Logger()
    credentialInterfaces = (IPlainCredentials, IUsernamePassword, IVouchedCredentials)

    def __init__(self, directory: IDirectory, passwords: Passwords, logins: VerifiedLogins) -> None:
        self.hits = 0  # logins that cost no hashing
        self._directory, self._passwords, self._logins = directory, passwords, logins
        self._under_way: dict[bytes, list[Deferred[Account]]] = {}

    def requestAvatarId(self, credentials: Any) -> Deferred[Any]:
        """The Account of these credentials. Fails with UnauthorizedLogin or Unavailable, and with nothing else."""
        if IVouchedCredentials.providedBy(credentials):
            return (
                self._directory.find_account(credentials.authcid).addCallback(_must_exist).addErrback(self._translate)
            )
        if IPlainCredentials.providedBy(credentials):
            given = PlainCredentials(credentials.authcid, credentials.password, credentials.authzid)
        else:
            given = PlainCredentials(credentials.username, credentials.password)
        checked = self._verified(given.authcid, given.password)
        return checked.addCallback(_check_authzid, given.authzid).addErrback(self._translate)

    def _verified(self, authcid: str, password: bytes) -> Deferred[Account]:
        # One account has many spellings, and one entry. What is no name at all goes the same way as an unknown one.
        name = login_name(authcid)
        key = self._logins.key(f"{name.local}@{name.domain}" if name else authcid, password)
        answer: Deferred[Account] = Deferred()
        sharing = self._under_way.get(key)
        if sharing is not None:
            sharing.append(answer)
            return answer
        self._under_way[key] = [answer]

        def share(outcome: Account | Failure) -> None:
            for waiting in self._under_way.pop(key):
                # callback() takes a Failure as well, and each gets its own chain.
                waiting.callback(outcome)

        Deferred.fromCoroutine(self._do_verify(key, authcid, password)).addBoth(share)
        return answer

    async def _do_verify(self, key: bytes, authcid: str, password: bytes) -> Account:
        login = self._logins.find(key)
        # A negative generation: the directory has no news of the database, so nothing that is remembered is believed.
        if login is not None and login.generation == self._directory.generation >= 0:
            self.hits += 1
            return login.account
        # Read before the account is, so that a change while we hash makes the entry old and not wrong.
        generation = self._directory.generation
        account = await self._directory.find_account(authcid)
        if login is not None:
            if account is not None and (account.id, account.password_hash) == (
                login.account.id,
                login.account.password_hash,
            ):
                self.hits += 1
                self._logins.confirm(key, account, generation)
                return account
            self._logins.drop(key)
        if not await self._passwords.verify(account.password_hash if account else None, password) or account is None:
            raise UnauthorizedLogin("wrong name or password")
        self._logins.record(key, account, generation)
        return account

    def _translate(self, failure: Failure) -> Failure:
        if failure.check(UnauthorizedLogin, Unavailable) is None:
            self.log.failure("a login could not be judged", failure)
            return Failure(Unavailable("a login could not be judged"))
        return failure


def _must_exist(account: Account | None) -> Account:
    if account is None:
        raise UnauthorizedLogin("no such account")
    return account


def _check_authzid(account: Account, authzid: str) -> Account:
    """Nobody acts as another here: an authzid is the account's own address, or empty (RFC 4616 §2)."""
    if authzid and login_name(authzid) != name_of(account.address):
        raise UnauthorizedLogin("may not act as another")
    return account
