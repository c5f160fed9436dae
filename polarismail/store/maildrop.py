# SPDX-License-Identifier: MIT
"""A maildir as POP3 sees it: locked, numbered, fixed for one session; nothing is deleted before `commit`.

RFC 1939 §4 and §8. The lock is a `flock` on a file in the maildir: it holds between processes as between sessions of one
process, and the kernel lets go of it when a process dies. Delivery needs no lock and goes on meanwhile; what arrives shows
in the next session.

Files may be renamed under a session (a reader of another kind sets flags, moves new/ to cur/): they are found again by the
unchanging part of their name. What is no regular file of the account is not shown (HOSTILE I9).

Everything here blocks on the disk: call it from a thread. One Maildrop is used by one thread at a time.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator

from attrs import define, frozen

from polarismail.store import maildir as names
from polarismail.store.lru import LruCache
from polarismail.store.maildir import FileName, MaildirRefused
from polarismail.values.errors import Unavailable

LOCK_NAME = "polarismail-pop3.lock"
_COUNT_OCTETS = 128 * 1024
_NOT_COUNTED = -1
_LOCK_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class MaildropInUse(Unavailable):
    """Another session has the maildrop: POP3's [IN-USE] (RFC 2449 §8.1.1)."""


class MessageGone(Unavailable):
    """The file of a message is no longer there, or may not be read: another reader deleted it."""


@frozen
class MaildropSettings:
    """Bounds of one maildrop's session."""

    max_messages: int = 100_000  # the newest are shown; older ones once those are deleted
    counted_sizes: int = 100_000  # of files whose name does not tell the size; remembered by the process


@define
class Entry:
    """One message of the session."""

    name: str  # of the file, at last sight
    part: str  # "new" or "cur", at last sight
    unique: str
    octets: int  # with CRLF line ends
    uidl: str = ""
    deleted: bool = False


class SizeCache:
    """Sizes that had to be counted, by file; shared by the maildrops of a process, used from several threads.

    A lost entry costs one more counting, so there is no lock: each call is one operation of a dict under the interpreter's own.
    """

    def __init__(self, entries: int) -> None:
        self._known: LruCache[tuple[int, int, int, int], int] = LruCache(entries)

    def octets(self, descriptor: int) -> int:
        """The size with CRLF line ends of an open file. Raises OSError."""
        about = os.fstat(descriptor)
        key = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
        known = self._known.get(key)
        if known is None:
            known = _count(descriptor)
            try:
                self._known.put(key, known)
            except KeyError:
                pass  # another thread evicted the same entry
        return known


def _count(descriptor: int) -> int:
    octets, after_cr = 0, False
    while piece := os.read(descriptor, _COUNT_OCTETS):
        octets += len(piece) + piece.count(b"\n") - piece.count(b"\r\n")
        if after_cr and piece[:1] == b"\n":
            octets -= 1
        after_cr = piece[-1:] == b"\r"
    return octets


class Maildrop:
    """The messages of one session, numbered from 1. Made by `open_maildrop`; `close` lets go of the lock."""

    def __init__(self, path: str, owner: int, directory: int, lock: int, sizes: SizeCache) -> None:
        self._path, self._owner, self._directory, self._lock, self._sizes = path, owner, directory, lock, sizes
        self.entries: list[Entry] = []
        self.skipped = 0  # files that are not shown

    def get(self, number: int) -> Entry | None:
        """The message with that number, from 1; None where there is none or it is marked deleted."""
        if 1 <= number <= len(self.entries):
            entry = self.entries[number - 1]
            return None if entry.deleted else entry
        return None

    def numbered(self) -> Iterator[tuple[int, Entry]]:
        """The messages that are not marked deleted, with their numbers."""
        return ((number, entry) for number, entry in enumerate(self.entries, 1) if not entry.deleted)

    def totals(self) -> tuple[int, int]:
        """How many messages are not marked deleted, and their octets with CRLF line ends."""
        sizes = [entry.octets for entry in self.entries if not entry.deleted]
        return len(sizes), sum(sizes)

    def reset(self) -> None:
        """Unmark everything (RSET)."""
        for entry in self.entries:
            entry.deleted = False

    def open_message(self, entry: Entry) -> int:
        """A descriptor to read the message from; LF line ends, mostly. Raises MessageGone, OSError for a sick disk."""
        for _ in range(2):
            try:
                return self._open_at(entry)
            except FileNotFoundError:
                if not self._find_again(entry):
                    break
            except MaildirRefused as problem:
                raise MessageGone(str(problem)) from problem
            except PermissionError as problem:
                raise MessageGone("it may not be read") from problem
            except OSError as problem:
                if problem.errno not in (errno.ELOOP, errno.ENXIO):
                    raise
                raise MessageGone("not a regular file") from problem
        raise MessageGone("it was deleted or renamed by another reader")

    def commit(self) -> int:
        """Delete what is marked (the UPDATE state); returns how many could not be deleted. Durable when it returns.

        What another reader has deleted already counts as deleted. A message that cannot be deleted does not keep the
        others (RFC 1939 §6: the reply says that some remain).
        """
        failed, touched = 0, set[str]()
        for entry in self.entries:
            if entry.deleted:
                try:
                    if self._unlink(entry):
                        touched.add(entry.part)
                except OSError:
                    failed += 1
        for part in touched:
            descriptor = names.open_directory(part, self._directory)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return failed

    def close(self) -> None:
        """Let go of the lock. Idempotent."""
        for descriptor in (self._lock, self._directory):
            if descriptor >= 0:
                os.close(descriptor)
        self._lock = self._directory = -1

    def load(self, limit: int) -> None:
        """Fix the messages of this session, by time of delivery and name. Raises OSError, MaildirRefused."""
        found = {entry.name.partition(":")[0]: (*order, entry) for order, entry in self._scan()}
        rows = sorted(found.values(), key=lambda row: row[:2])
        self.skipped += max(0, len(rows) - limit)
        uidls: set[str] = set()
        for *_, entry in rows[-limit:]:
            if entry.octets < 0 and not self._count_octets(entry):
                self.skipped += 1
                continue
            entry.uidl = names.uidl(entry.unique)
            if entry.uidl in uidls:
                entry.uidl = names.hash_uidl(entry.name.partition(":")[0])
            uidls.add(entry.uidl)
            self.entries.append(entry)

    def _scan(self) -> Iterator[tuple[tuple[int, str], Entry]]:
        for part in (names.NEW, names.CUR):
            try:
                descriptor = names.open_directory(part, self._directory, owner=self._owner)
            except FileNotFoundError:
                continue  # delivery makes it when it is needed
            try:
                with os.scandir(descriptor) as listing:
                    for seen in listing:
                        if seen.name[0] == ".":
                            continue
                        try:
                            about = seen.stat(follow_symlinks=False)
                        except FileNotFoundError:
                            continue  # moved to cur/ between the two, where it is found next
                        if not names.is_message(about, self._owner):
                            self.skipped += 1
                            continue
                        name = FileName.parse(seen.name)
                        seconds = name.seconds if name.seconds is not None else int(about.st_mtime)
                        octets = name.wire_octets if name.wire_octets is not None else _NOT_COUNTED
                        yield (seconds, name.unique), Entry(seen.name, part, name.unique, octets)
            finally:
                os.close(descriptor)

    def _count_octets(self, entry: Entry) -> bool:
        """False when the file cannot be read, so that one bad sector does not keep all the mail."""
        try:
            descriptor = self.open_message(entry)
        except MessageGone:
            return False
        try:
            entry.octets = self._sizes.octets(descriptor)
        except OSError as problem:
            if problem.errno != errno.EIO:
                raise
            return False
        finally:
            os.close(descriptor)
        return True

    def _open_at(self, entry: Entry) -> int:
        directory = names.open_directory(entry.part, self._directory)
        try:
            return names.open_message(entry.name, directory, owner=self._owner)
        finally:
            os.close(directory)

    def _find_again(self, entry: Entry) -> bool:
        for part in (names.CUR, names.NEW):
            try:
                listing = os.listdir(f"{self._path}/{part}")
            except FileNotFoundError:
                continue
            for name in listing:
                if name.startswith(entry.unique) and FileName.parse(name).unique == entry.unique:
                    entry.name, entry.part = name, part
                    return True
        return False

    def _unlink(self, entry: Entry) -> bool:
        """False when it had gone already. Raises OSError."""
        for _ in range(2):
            directory = names.open_directory(entry.part, self._directory)
            try:
                os.unlink(entry.name, dir_fd=directory)
                return True
            except FileNotFoundError:
                if not self._find_again(entry):
                    return False
            finally:
                os.close(directory)
        return False


def open_maildrop(
    path: str,
    owner: int,
    sizes: SizeCache,
    *,
    settings: MaildropSettings,
    create: Callable[[], None],
) -> Maildrop:
    """Lock a maildir and list it. `create` makes it where it is not there yet: no mail has come so far.

    Raises MaildropInUse, MaildirRefused, OSError.
    """
    try:
        directory = names.open_directory(path, owner=owner)
    except FileNotFoundError:
        create()
        directory = names.open_directory(path, owner=owner)
    lock = -1
    try:
        lock = os.open(LOCK_NAME, _LOCK_FLAGS, names.FILE_MODE, dir_fd=directory)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            raise MaildropInUse("another session has the maildrop") from problem
        maildrop = Maildrop(path, owner, directory, lock, sizes)
        maildrop.load(settings.max_messages)
        return maildrop
    except BaseException:
        for descriptor in (lock, directory):
            if descriptor >= 0:
                os.close(descriptor)
        raise
