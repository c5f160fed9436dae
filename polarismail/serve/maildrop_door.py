# SPDX-License-Identifier: MIT
"""The door to a maildrop: what a POP3 login gets, with all disk work on a few threads of its own.

A third party's portal may hand out avatars of its own; they provide IMaildropAvatar, and what their `open` fires with has the
methods of OpenMaildrop. At the end of a session, in whatever way, the lock is let go: at once, or as soon as what a thread
is doing for that session is done.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from attrs import frozen
from twisted.internet.defer import Deferred, succeed
from zope.interface import implementer

from polarismail.auth.interfaces import IMaildropAvatar
from polarismail.store import maildir as names
from polarismail.store.interfaces import Account
from polarismail.store.maildir import MaildirRefused
from polarismail.store.maildrop import Entry, Maildrop, MaildropSettings, SizeCache, open_maildrop
from polarismail.store.threads import Answers, Workers
from polarismail.values.errors import Unavailable

T = TypeVar("T")


@frozen
class DoorSettings:
    """How maildrops are read."""

    threads: int = 4
    piece_octets: int = 65536


class MaildropDoors:
    """All maildrops below one mail root. `door` makes avatars; the threads start with the first session."""

    def __init__(
        self,
        reactor: Any,
        mail_root: str,
        settings: MaildropSettings | None = None,
        door_settings: DoorSettings | None = None,
    ) -> None:
        self.settings, self.door_settings = settings or MaildropSettings(), door_settings or DoorSettings()
        self._answers, self._mail_root = Answers(reactor), mail_root
        self._sizes = SizeCache(self.settings.counted_sizes)
        self._workers: Workers | None = None

    def door(self, account: Account, mind: Any = None) -> MaildropDoor:
        """The avatar of one login."""
        return MaildropDoor(self, account)

    def run(self, job: Callable[..., T], *args: Any) -> Deferred[T]:
        """Run a job on one of the threads."""
        if self._workers is None:
            self._workers = Workers(self._answers, "maildrop", self.door_settings.threads)
        return self._workers.submit(job, *args)

    def stop(self) -> None:
        """End the threads, when the sessions are gone."""
        if self._workers is not None:
            workers, self._workers = self._workers, None
            workers.stop()

    def open(self, account: Account) -> Maildrop:
        """On a thread: lock and list the account's maildrop. Raises MaildropInUse, MaildirRefused, OSError."""
        owner = os.geteuid()
        if account.uid is not None and account.uid != owner:
            raise MaildirRefused(f"the maildir belongs to uid {account.uid}, and the server runs as uid {owner}")
        path = names.locate(self._mail_root, account.maildir)
        return open_maildrop(
            path, owner, self._sizes, settings=self.settings, create=lambda: names.create(path, self._mail_root)
        )


@implementer(IMaildropAvatar)
class MaildropDoor:
    """See IMaildropAvatar."""

    def __init__(self, maildrops: MaildropDoors, account: Account) -> None:
        self.account = account
        self._maildrops = maildrops
        self._open: OpenMaildrop | None = None
        self._left = False

    def open(self) -> Deferred[OpenMaildrop]:
        """Fails with MaildropInUse (another session has the lock), Unavailable, OSError."""
        return self._maildrops.run(self._maildrops.open, self.account).addCallback(self._opened)

    def _opened(self, maildrop: Maildrop) -> OpenMaildrop:
        if self._left:
            maildrop.close()
            raise Unavailable("the session ended while the maildrop was being opened")
        self._open = OpenMaildrop(self._maildrops, maildrop)
        return self._open

    def logout(self) -> None:
        """The session has ended. Idempotent."""
        self._left = True
        if self._open is not None:
            self._open.close()


class OpenMaildrop:
    """A locked maildrop for the reactor's thread. What is not a Deferred is answered from memory."""

    def __init__(self, maildrops: MaildropDoors, maildrop: Maildrop) -> None:
        self._maildrops, self._maildrop = maildrops, maildrop
        self._under_way = 0
        self._closed = False

    def totals(self) -> tuple[int, int]:
        """Messages that are not marked deleted, and their octets with CRLF."""
        return self._maildrop.totals()

    def get(self, number: int) -> Entry | None:
        """A message that is not marked deleted, with `octets`, `uidl` and `deleted`."""
        return self._maildrop.get(number)

    def numbered(self) -> Iterator[tuple[int, Entry]]:
        """Those that are not marked deleted, with their numbers."""
        return self._maildrop.numbered()

    def reset(self) -> None:
        """Unmark everything."""
        self._maildrop.reset()

    def read(self, entry: Entry) -> Deferred[MessageReader]:
        """Open a message and read its first piece. Fails with MessageGone, OSError."""
        octets = self._maildrops.door_settings.piece_octets
        return self._run(_open_and_read, self._maildrop, entry, octets).addCallback(self._begun, octets)

    def _begun(self, begun: tuple[int, bytes], octets: int) -> MessageReader:
        return MessageReader(self, *begun, octets)

    def commit(self) -> Deferred[int]:
        """Delete what is marked, durably; fires with how many could not be deleted."""
        return self._run(self._maildrop.commit)

    def close(self) -> None:
        """Let go of the lock. Idempotent."""
        self._closed = True
        self._settle()

    def _run(self, job: Callable[..., T], *args: Any) -> Deferred[T]:
        self._under_way += 1
        return self._maildrops.run(job, *args).addBoth(self._done)

    def _done(self, result: Any) -> Any:
        self._under_way -= 1
        self._settle()
        return result

    def _settle(self) -> None:
        if self._closed and not self._under_way:
            self._maildrop.close()


class MessageReader:
    """One message as it is stored: `piece` holds its first octets."""

    def __init__(self, maildrop: OpenMaildrop, descriptor: int, piece: bytes, octets: int) -> None:
        self.piece = piece
        self._maildrop, self._descriptor, self._octets = maildrop, descriptor, octets

    def next(self) -> Deferred[bytes]:
        """The next piece; b"" behind the last. Fails with OSError."""
        if self._descriptor < 0:
            return succeed(b"")
        return self._maildrop._run(os.read, self._descriptor, self._octets)

    def close(self) -> None:
        """Idempotent. No `next` may be under way."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


def _open_and_read(maildrop: Maildrop, entry: Entry, octets: int) -> tuple[int, bytes]:
    """On a thread. A small message is read and closed in one go: then the descriptor is -1."""
    descriptor = maildrop.open_message(entry)
    piece = b""
    try:
        piece = os.read(descriptor, octets)
    finally:
        if len(piece) < octets:
            os.close(descriptor)
            descriptor = -1
    return descriptor, piece
