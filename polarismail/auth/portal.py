# SPDX-License-Identifier: MIT
"""One portal for every protocol: logins by the directory, and strangers who only bring mail."""

from __future__ import annotations

from twisted.cred.checkers import AllowAnonymousAccess
from twisted.cred.credentials import UsernamePassword
from twisted.cred.error import UnauthorizedLogin
from twisted.cred.portal import Portal

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
    return Portal(realm, [DirectoryChecker(directory, passwords, logins), AllowAnonymousAccess()])


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
