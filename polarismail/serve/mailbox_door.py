# SPDX-License-Identifier: MIT
"""Any Twisted mailbox behind our POP3 server: an avatar that provides `twisted.mail.interfaces.IMailboxPOP3` becomes a door.

The mailbox is asked for its list once, at the login, so that numbers stay what they are for the session; `deleteMessage` and
`sync` are called at QUIT only (RFC 1939 §6). Its methods run on the reactor's thread, as Twisted's own server calls them, and
may return Deferreds. A list that is over `MAX_MESSAGES` is cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from attrs import define
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.logger import Logger
from zope.interface import implementer

from polarismail.auth.interfaces import IMaildropAvatar
from polarismail.store.maildir import uidl

MAX_MESSAGES = 100_000
PIECE_OCTETS = 65536


@define
class MailboxEntry:
    """One message, as store.maildrop.Entry shows it. `octets` is what the mailbox says."""

    index: int
    octets: int
    uidl: str
    deleted: bool = False

    @property
    def name(self) -> str:
        """For logs."""
        return self.uidl


@implementer(IMaildropAvatar)
class MailboxDoor:
    """See IMaildropAvatar."""

    account = None

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def open(self) -> Deferred[MailboxMaildrop]:
        """Fails with what the mailbox fails with."""
        return Deferred.fromCoroutine(self._list())

    async def _list(self) -> MailboxMaildrop:
        sizes = await maybeDeferred(self._mailbox.listMessages)
        entries = []
        for index, octets in enumerate(islice(sizes, MAX_MESSAGES)):
            unique = await maybeDeferred(self._mailbox.getUidl, index)
            text = unique if isinstance(unique, str) else unique.decode("latin-1")
            entries.append(MailboxEntry(index, octets, uidl(text)))
        return MailboxMaildrop(self._mailbox, entries)

    def logout(self) -> None:
        """The portal's own logout does what is to be done."""


class MailboxMaildrop:
    """What OpenMaildrop is for a maildir."""

    log = Logger()

    def __init__(self, mailbox: Any, entries: list[MailboxEntry]) -> None:
        self._mailbox, self._entries = mailbox, entries

    def totals(self) -> tuple[int, int]:
        sizes = [entry.octets for entry in self._entries if not entry.deleted]
        return len(sizes), sum(sizes)

    def get(self, number: int) -> MailboxEntry | None:
        entry = self._entries[number - 1] if 1 <= number <= len(self._entries) else None
        return None if entry is None or entry.deleted else entry

    def numbered(self) -> Iterator[tuple[int, MailboxEntry]]:
        return ((number, entry) for number, entry in enumerate(self._entries, 1) if not entry.deleted)

    def reset(self) -> None:
        for entry in self._entries:
            entry.deleted = False

    def read(self, entry: MailboxEntry) -> Deferred[MailboxReader]:
        return maybeDeferred(self._mailbox.getMessage, entry.index).addCallback(MailboxReader)

    def commit(self) -> Deferred[int]:
        return Deferred.fromCoroutine(self._commit())

    async def _commit(self) -> int:
        failed = 0
        for entry in self._entries:
            if entry.deleted:
                try:
                    await maybeDeferred(self._mailbox.deleteMessage, entry.index)
                except Exception:
                    failed += 1
                    self.log.failure("a mailbox could not delete {message}", message=entry.uidl)
        await maybeDeferred(self._mailbox.sync)
        return failed


class MailboxReader:
    """What MessageReader is for a file of a maildir. Raises what the file raises."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.piece: bytes = file.read(PIECE_OCTETS)

    def next(self) -> Deferred[bytes]:
        return maybeDeferred(self._file.read, PIECE_OCTETS)

    def close(self) -> None:
        self._file.close()
