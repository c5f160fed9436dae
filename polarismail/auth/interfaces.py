# SPDX-License-Identifier: MIT
"""What the portal hands out: a reception for SMTP, the door to a maildrop for POP3; and credentials with an authzid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from twisted.cred.credentials import ICredentials
from twisted.internet.defer import Deferred
from zope.interface import Attribute, Interface

from polarismail.store.interfaces import IDraft
from polarismail.values.envelope import Envelope, MailOptions, Recipient, SessionFacts
from polarismail.values.reply import Reply

if TYPE_CHECKING:
    from polarismail.wire.smtp_events import EndOfData, Mail, Rcpt


class IPlainCredentials(ICredentials):
    """A name, a password in clear, and whom to act as: SASL PLAIN (RFC 4616), LOGIN, and POP3's USER and PASS."""

    authcid = Attribute("str: who proves, an account's address in any case")
    password = Attribute("bytes: as the client sent it; never logged")
    authzid = Attribute('str: whom to act as; "" for the same')


class IVouchedCredentials(ICredentials):
    """The name of an account that a front end vouches for, which has checked the password itself (XCLIENT LOGIN)."""

    authcid = Attribute("str: an account's address in any case")


class IReception(Interface):
    """Takes mail in, one transaction after the other, for one account or for a stranger.

    Nothing here raises for what a peer sent. A failure of a Deferred means that a part of ours is broken: the caller
    answers 451. The caller keeps the transaction: a reception has no state of its own.
    """

    account = Attribute("Account or None: who has logged in")

    def check_mail(
        facts: SessionFacts, mail: Mail
    ) -> Reply | tuple[Reply, MailOptions] | Deferred[Reply] | Deferred[Reply | tuple[Reply, MailOptions]]:
        """Whether this reverse-path may begin a transaction: 250, or the refusal. Where `mail.wishes` are there, also what
        is granted of them."""

    def check_rcpt(
        facts: SessionFacts, envelope: Envelope, rcpt: Rcpt
    ) -> tuple[Reply, tuple[Recipient, ...]] | Deferred[tuple[Reply, tuple[Recipient, ...]]]:
        """Whether mail for this forward-path is taken, and the recipients that it stands for (none with a refusal).

        `envelope` is the transaction so far: its recipients are those already accepted.
        """

    def begin_content(facts: SessionFacts, envelope: Envelope) -> IDraft:
        """Where the content goes. Raises SpoolFull or SpoolUnhealthy: then answer 452 or 421, and not 354."""

    def end_of_data(
        facts: SessionFacts, envelope: Envelope, draft: IDraft, end: EndOfData
    ) -> Deferred[Reply] | Deferred[tuple[Reply, ...]]:
        """Judge the whole message and commit it. 250 only once it is on stable storage (RFC 5321 §6.1).

        Fires with one reply for all recipients, or, only where `facts.is_lmtp`, with one for each of `envelope.recipients`.

        The draft is committed or abandoned when this fires, whatever it fires with.
        """


class IMaildropAvatar(Interface):
    """The door to one account's maildrop (RFC 1939 §4): made by a login, opened and locked by `open`."""

    account = Attribute("Account: who has logged in")

    def open() -> Deferred[Any]:
        """Lock the maildrop and fix its messages for this session; fires with it.

        Fails with the error of `serve/pop3.py` that means [IN-USE], and with Unavailable.
        """

    def logout() -> None:
        """The session has ended, in whatever way: let go of the lock. Idempotent; deletes nothing."""
