# SPDX-License-Identifier: MIT
"""One portal for every protocol: logins by the directory, and strangers who only bring mail."""

from __future__ import annotations

from typing import Any

from twisted.cred.checkers import ANONYMOUS, AllowAnonymousAccess
from twisted.cred.credentials import Anonymous, IAnonymous, UsernamePassword
from twisted.cred.error import UnauthorizedLogin
from twisted.cred.portal import Portal
from twisted.internet.defer import Deferred, fail, succeed

from polarismail.auth.checker import DirectoryChecker, PlainCredentials
from polarismail.auth.interfaces import IPlainCredentials
from polarismail.auth.logins import VerifiedLogins
from polarismail.auth.passwords import Passwords
from polarismail.auth.realm import MaildropFactory, MailRealm, ReceptionFactory
from polarismail.store.interfaces import IDirectory


def build_portal(
    directory: IDirectory,
    passwords: Passwords,
    logins: VerifiedLogins,
    reception_factory: ReceptionFactory,
    maildrop_factory: MaildropFactory,
) -> Portal:
    """A portal that gives strangers a reception, and accounts a reception or their maildrop.

    `passwords` is started and stopped by the caller.
    """
    realm = MailRealm(reception_factory, maildrop_factory)
    return MailPortal(realm, [DirectoryChecker(directory, passwords, logins), AllowAnonymousAccess()])


class MailPortal(Portal):
    """A portal that lets strangers in without asking a checker: for each connection one comes, and none is refused."""

    def login(self, credentials: Any, mind: Any, *interfaces: Any) -> Deferred[Any]:
        """See Portal."""
        checker: Any = self.checkers.get(IAnonymous)
        if type(credentials) is not Anonymous or type(checker) is not AllowAnonymousAccess:
            return super().login(credentials, mind, *interfaces)
        try:
            return succeed(self.realm.requestAvatar(ANONYMOUS, mind, *interfaces))
        except Exception:
            return fail()


def credentials_for(portal: Portal, authcid: str, password: bytes, authzid: str = "") -> object:
    """The credentials to log in with: ours where the portal knows them, else Twisted's plain name and password, so
    that any checker for IUsernamePassword works.

    Raises UnauthorizedLogin for an authzid that such a checker could not judge.
    """
    if IPlainCredentials in portal.listCredentialsInterfaces():
        return PlainCredentials(authcid, password, authzid)
    if authzid not in ("", authcid):
        raise UnauthorizedLogin("may not act as another")
    return UsernamePassword(authcid.encode("utf-8", "surrogatepass"), password)
