# SPDX-License-Identifier: MIT
"""Who has logged in gets what its protocol asked for: a reception (SMTP) or the door to its maildrop (POP3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.cred.checkers import ANONYMOUS
from twisted.cred.error import UnauthorizedLogin
from twisted.cred.portal import IRealm
from zope.interface import Interface, implementer

from polarismail.auth.interfaces import IMaildropAvatar, IReception
from polarismail.store.interfaces import Account

ReceptionFactory = Callable[[Account | None, Any], Any]
MaildropFactory = Callable[[Account, Any], Any]


@implementer(IRealm)
class MailRealm:
    """Makes avatars. The factories get the account (a reception's may be None: a stranger) and the `mind`, which is
    the session or None, and return a provider of IReception or IMaildropAvatar."""

    def __init__(self, reception_factory: ReceptionFactory, maildrop_factory: MaildropFactory) -> None:
        self._reception_factory, self._maildrop_factory = reception_factory, maildrop_factory

    def requestAvatar(
        self, avatarId: Any, mind: Any, *interfaces: type[Interface]
    ) -> tuple[type[Interface], Any, Callable[[], None]]:
        """The first of `interfaces` that is ours, with its avatar and what to call at the session's end.

        Raises UnauthorizedLogin for a maildrop without a login, TypeError when none of the interfaces is ours.
        """
        account = None if avatarId is ANONYMOUS else avatarId
        if account is not None and not isinstance(account, Account):
            raise TypeError("expected an Account: this realm wants a checker that returns one")
        for interface in interfaces:
            if interface is IReception:
                return interface, self._reception_factory(account, mind), _nothing
            if interface is IMaildropAvatar:
                if account is None:
                    raise UnauthorizedLogin("a maildrop has an owner")
                avatar = self._maildrop_factory(account, mind)
                return interface, avatar, avatar.logout
        raise TypeError(f"no avatar here provides any of {[interface.__name__ for interface in interfaces]}")


def _nothing() -> None:
    """A reception keeps nothing that a session's end would have to let go."""
