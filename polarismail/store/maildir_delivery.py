# SPDX-License-Identifier: MIT
"""Messages into maildirs, in batches: when a receipt with a positive reply comes back, a power cut cannot undo the delivery.

A batch writes each file in tmp/, renames it into new/, and calls `syncfs` once for each file system that it touched; only
then are there receipts. What was measured (docs: durability): twenty files, renamed, one `syncfs` survive a power cut with
names and contents; the same without the sync survive as names without contents.

Delivery is idempotent. Names derive from the queue id and the recipient's number, so a repeated delivery replaces its own
file. When an attempt may be a repeat, a copy that a reader has moved to cur/ is looked for as well: the same octets are left
alone, others (a torn file, from a power cut before the sync) are replaced where they lie.

A failed sync is final for the files of that batch (DURABILITY rule 1): they are removed again and the receipts say "later".

A MaildirWriter belongs to one thread. Its calls block on the disk; nothing in here may run on the reactor's thread.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from attrs import define, field, frozen

from polarismail.store import maildir as names
from polarismail.store.maildir import MaildirRefused
from polarismail.values.reply import Reply

DELIVERED = Reply(250, (2, 0, 0), "Delivered to the mailbox")
STORAGE_FULL = Reply(452, (4, 3, 1), "Mail storage is full, try again later")
MAILBOX_FULL = Reply(452, (4, 2, 2), "Mailbox is full, try again later")
STORAGE_BROKEN = Reply(451, (4, 3, 0), "Mail storage reports an I/O error, try again later")

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_COMPARE_OCTETS = 128 * 1024

_libc = ctypes.CDLL(None, use_errno=True)


def sync_file_system(descriptor: int) -> None:
    """Make everything on the descriptor's file system durable (syncfs, Linux). Raises OSError."""
    if _libc.syncfs(descriptor) != 0:
        problem = ctypes.get_errno()
        raise OSError(problem, os.strerror(problem))


@frozen
class Receipt:
    """What became of one delivery. A positive `reply` means: on stable storage. Otherwise nothing of it is left."""

    reply: Reply
    name: str = ""  # of the file in new/ (or where an earlier copy was found)
    repeated: bool = False  # an earlier attempt had already delivered it
    alarm: bool = False  # an operator must look: the disk, or what is mounted where


@frozen
class DiskContent:
    """Octets with LF line ends as they lie on disk, and how many they were with CRLF."""

    disk: bytes = field(repr=False)
    wire_octets: int


def to_disk(octets: bytes) -> DiskContent:
    """CRLF to LF, for content as the spool keeps it (every CR and LF is part of a CRLF).

    Where it is not, the difference shows in `wire_octets`: what a reader makes of it again, each LF without a CR getting one.
    """
    # Dropping every CR is nine times as fast as replacing pairs; the counts say whether it was the same.
    disk = octets.replace(b"\r", b"")
    if len(disk) - len(disk.replace(b"\n", b"")) == len(octets) - len(disk):
        return DiskContent(disk, len(octets))
    disk = octets.replace(b"\r\n", b"\n")
    return DiskContent(disk, len(disk) + disk.count(b"\n") - disk.count(b"\r\n"))


@frozen
class Delivery:
    """One small message for one maildir."""

    maildir: str  # absolute
    owner: int  # uid
    unique: str  # maildir.render_unique
    head: DiskContent  # our own fields
    content: DiskContent
    may_repeat: bool = False


Placed = tuple[int, "Directories", str, bool]  # its place in the batch, where, under which name, was it there already


@define
class Directories:
    """The open directories of one maildir, and what they were when they were opened."""

    path: str
    tmp: int
    new: int
    device: int
    identity: tuple[tuple[int, int], tuple[int, int]]
    drafts: int = 0  # open ones: not to be closed under them
    settled: bool = False  # the directories themselves were made durable since they were opened
    copies: dict[str, str] | None = None  # key -> name in cur/, as it was at first use in this batch

    def is_current(self) -> bool:
        """False when tmp/ or new/ is no longer at that path: mail must not go into a directory that was moved away."""
        try:
            return self.identity == (_identity(f"{self.path}/tmp"), _identity(f"{self.path}/new"))
        except OSError:
            return False

    def close(self) -> None:
        os.close(self.tmp)
        os.close(self.new)


def _identity(path: str) -> tuple[int, int]:
    about = os.lstat(path)
    return about.st_dev, about.st_ino


class Draft:
    """A large message on its way into tmp/, piece by piece. Made by MaildirWriter.open_draft; published or abandoned."""

    def __init__(self, directories: Directories, unique: str, may_repeat: bool) -> None:
        self.directories, self.unique, self.may_repeat = directories, unique, may_repeat
        self.disk_octets = self.wire_octets = 0
        self._held = b""  # a CR that may be half of a CRLF
        self._after_cr = False
        self._descriptor = create_draft(unique, directories.tmp)
        directories.drafts += 1

    def write(self, octets: bytes) -> None:
        """Append octets with CRLF line ends, sliced anywhere. Raises OSError; then abandon it."""
        octets = self._held + octets
        self._held = b"\r" if octets[-1:] == b"\r" else b""
        self._append((octets[:-1] if self._held else octets).replace(b"\r\n", b"\n"))

    def _append(self, disk: bytes) -> None:
        write_all(self._descriptor, disk)
        self.disk_octets += len(disk)
        self.wire_octets += len(disk) + disk.count(b"\n")
        if self._after_cr and disk[:1] == b"\n":
            self.wire_octets -= 1
        if b"\r" in disk:
            self.wire_octets -= disk.count(b"\r\n")
        if disk:
            self._after_cr = disk[-1:] == b"\r"

    def finish(self) -> None:
        """No more octets come. Writes back what is still in memory, so that the batch's sync is short. Raises OSError."""
        self._append(self._held)
        self._held = b""
        os.fdatasync(self._descriptor)
        self._close()

    def abandon(self) -> None:
        """Remove it. Idempotent; harmless after `publish`, which has renamed it."""
        try:
            self._close()
        finally:
            remove(self.unique, self.directories.tmp)

    def _close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            self.directories.drafts -= 1
            os.close(descriptor)


class MaildirWriter:
    """Writes batches, with a bounded cache of open directories.

    `sync` makes one file system durable, given a descriptor on it.
    """

    def __init__(
        self, mail_root: str, *, open_maildirs: int = 64, sync: Callable[[int], None] = sync_file_system
    ) -> None:
        self._mail_root, self._limit, self._sync = mail_root, open_maildirs, sync
        self._open: OrderedDict[tuple[str, int], Directories] = OrderedDict()
        # One descriptor for each file system, because the kernel reports a write-back error once for each descriptor.
        self._sync_descriptors: dict[int, int] = {}

    def deliver(self, deliveries: Sequence[Delivery]) -> list[Receipt]:
        """Write a batch; the receipts come in its order, after the sync. Never raises OSError."""
        batch = Batch(self)
        for at, delivery in enumerate(deliveries):
            try:
                directories = batch.directories(delivery.maildir, delivery.owner)
                batch.note(at, directories, *_place(directories, delivery))
            except (OSError, MaildirRefused) as problem:
                batch.refuse(at, problem)
        return batch.finish()

    def open_draft(self, maildir: str, owner: int, unique: str, head: bytes, *, may_repeat: bool = False) -> Draft:
        """Begin a large message with our own fields (CRLF). Raises OSError, MaildirRefused."""
        draft = Draft(self._directories(maildir, owner), unique, may_repeat)
        try:
            draft.write(head)
        except OSError:
            draft.abandon()
            raise
        return draft

    def publish(self, drafts: Sequence[Draft]) -> list[Receipt]:
        """Give finished drafts their names, durably. Never raises OSError."""
        batch = Batch(self)
        for at, draft in enumerate(drafts):
            try:
                name = names.render_name(draft.unique, draft.disk_octets, draft.wire_octets)
                batch.note(
                    at,
                    draft.directories,
                    *publish_name(draft.directories, draft.unique, name, may_repeat=draft.may_repeat),
                )
            except (OSError, MaildirRefused) as problem:
                draft.abandon()
                batch.refuse(at, problem)
        return batch.finish()

    def close(self) -> None:
        """Give all descriptors back."""
        for directories in self._open.values():
            directories.close()
        self._open.clear()
        for descriptor in self._sync_descriptors.values():
            os.close(descriptor)
        self._sync_descriptors.clear()

    def _directories(self, path: str, owner: int) -> Directories:
        key = (path, owner)
        known = self._open.get(key)
        if known is not None:
            if known.is_current():
                self._open.move_to_end(key)
                known.copies = None
                return known
            if not known.drafts:
                known.close()
            del self._open[key]
        fresh = self._open[key] = _open_directories(path, owner, self._mail_root)
        return fresh

    def _trim(self) -> None:
        """Close what was used longest ago. Only between batches: a batch may use more maildirs than the cache holds."""
        for key in list(self._open)[: max(0, len(self._open) - self._limit)]:
            if not self._open[key].drafts:
                self._open.pop(key).close()

    def _sync_descriptor(self, directories: Directories) -> int:
        known = self._sync_descriptors.get(directories.device)
        if known is None:
            known = self._sync_descriptors[directories.device] = os.dup(directories.new)
        return known

    def _forget_sync_descriptor(self, device: int) -> None:
        """After a failed sync: it is final for that descriptor."""
        descriptor = self._sync_descriptors.pop(device, None)
        if descriptor is not None:
            os.close(descriptor)


class Batch:
    """The files of one batch between their renaming and their sync."""

    def __init__(self, writer: MaildirWriter) -> None:
        self._writer = writer
        self._seen: dict[tuple[str, int], Directories | Exception] = {}
        self._receipts: dict[int, Receipt] = {}
        self._placed: dict[int, list[Placed]] = {}  # by device

    def directories(self, path: str, owner: int) -> Directories:
        """Looked at once in a batch, whatever the outcome. Raises what opening raised."""
        found = self._seen.get((path, owner))
        if found is None:
            try:
                found = self._writer._directories(path, owner)
            except (OSError, MaildirRefused) as problem:
                found = problem
            self._seen[path, owner] = found
        if isinstance(found, Exception):
            raise found
        return found

    def note(self, at: int, directories: Directories, name: str, repeated: bool) -> None:
        self._placed.setdefault(directories.device, []).append((at, directories, name, repeated))

    def refuse(self, at: int, problem: OSError | MaildirRefused) -> None:
        self._receipts[at] = refusal(problem)

    def sync(self, placed: Sequence[Placed]) -> None:
        """Make what was placed on one file system durable. Raises OSError."""
        self._writer._sync(self._writer._sync_descriptor(placed[0][1]))

    def finish(self) -> list[Receipt]:
        for placed in self._placed.values():
            try:
                self.sync(placed)
            except OSError as problem:
                receipt = refusal(problem)
                self._writer._forget_sync_descriptor(placed[0][1].device)
                for at, directories, name, repeated in placed:
                    remove(name, directories.new)
                    if repeated:
                        remove(f"{directories.path}/{names.CUR}/{name}")
                    self._receipts[at] = receipt
            else:
                for at, _directories, name, repeated in placed:
                    self._receipts[at] = Receipt(DELIVERED, name, repeated)
        self._writer._trim()
        return [self._receipts[at] for at in sorted(self._receipts)]


def _open_directories(path: str, owner: int, mail_root: str) -> Directories:
    try:
        return _open_existing(path, owner)
    except FileNotFoundError:
        names.create(path, mail_root)
        return _open_existing(path, owner)


def _open_existing(path: str, owner: int) -> Directories:
    top = names.open_directory(path, owner=owner)
    try:
        tmp = names.open_directory(names.TMP, top, owner=owner)
        try:
            new = names.open_directory(names.NEW, top, owner=owner)
        except BaseException:
            os.close(tmp)
            raise
    finally:
        os.close(top)
    about_tmp, about_new = os.fstat(tmp), os.fstat(new)
    identity = (about_tmp.st_dev, about_tmp.st_ino), (about_new.st_dev, about_new.st_ino)
    return Directories(path, tmp, new, about_new.st_dev, identity)


def _place(directories: Directories, delivery: Delivery) -> tuple[str, bool]:
    head, content, unique = delivery.head, delivery.content, delivery.unique
    name = names.render_name(unique, len(head.disk) + len(content.disk), head.wire_octets + content.wire_octets)
    descriptor = create_draft(unique, directories.tmp)
    try:
        try:
            written = os.writev(descriptor, (head.disk, content.disk))
            if written < len(head.disk) + len(content.disk):
                write_all(descriptor, (head.disk + content.disk)[written:])
        finally:
            os.close(descriptor)
        return publish_name(directories, unique, name, may_repeat=delivery.may_repeat)
    except (OSError, MaildirRefused):
        remove(unique, directories.tmp)
        raise


def publish_name(directories: Directories, unique: str, name: str, *, may_repeat: bool) -> tuple[str, bool]:
    """Rename from tmp/ to new/, unless the same is there. Returns the name, and whether it was there already."""
    if may_repeat:
        for part, earlier in _find_copies(directories, unique, name):
            if _replace_if_torn(directories, unique, part, earlier):
                return earlier, True
    os.rename(unique, name, src_dir_fd=directories.tmp, dst_dir_fd=directories.new)
    return name, False


def _find_copies(directories: Directories, unique: str, name: str) -> Iterable[tuple[str, str]]:
    """Where an earlier attempt may have left its file: in new/ under its own name, or wherever a reader put it."""
    yield names.NEW, name
    if directories.copies is None:
        directories.copies = {names.key_of(seen): seen for seen in _listing(f"{directories.path}/{names.CUR}")}
        directories.copies.update(
            (names.key_of(seen), f"{names.NEW}/{seen}") for seen in _listing(f"{directories.path}/{names.NEW}")
        )
    found = directories.copies.get(names.key_of(unique))
    if found is not None:
        part, slash, inner = found.partition("/")
        yield (part, inner) if slash else (names.CUR, found)


def _listing(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except FileNotFoundError:
        return []


def _replace_if_torn(directories: Directories, unique: str, part: str, earlier: str) -> bool:
    """False when there is no such copy. Else the copy holds the right octets afterwards, and tmp/ is empty of it."""
    try:
        directory = names.open_directory(f"{directories.path}/{part}")
    except FileNotFoundError:
        return False
    try:
        if not _same_octets(unique, directories.tmp, earlier, directory):
            os.rename(unique, earlier, src_dir_fd=directories.tmp, dst_dir_fd=directory)
        else:
            os.unlink(unique, dir_fd=directories.tmp)
        return True
    except FileNotFoundError:
        return False
    finally:
        os.close(directory)


def _same_octets(name: str, directory: int, other: str, other_directory: int) -> bool:
    """Raises FileNotFoundError when `other` is not there."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with (
        open(os.open(other, flags, dir_fd=other_directory), "rb", buffering=0) as theirs,
        open(os.open(name, flags, dir_fd=directory), "rb", buffering=0) as ours,
    ):
        our, their = os.fstat(ours.fileno()), os.fstat(theirs.fileno())
        if (our.st_dev, our.st_ino) == (their.st_dev, their.st_ino):
            return True  # a link of the spool's file
        if our.st_size != their.st_size:
            return False
        while True:
            piece = ours.read(_COMPARE_OCTETS)
            if piece != theirs.read(_COMPARE_OCTETS):
                return False
            if not piece:
                return True


def create_draft(name: str, directory: int) -> int:
    try:
        return os.open(name, _CREATE, names.FILE_MODE, dir_fd=directory)
    except FileExistsError:
        # Left by an attempt that was killed in the middle: the name is ours alone.
        os.unlink(name, dir_fd=directory)
        return os.open(name, _CREATE, names.FILE_MODE, dir_fd=directory)


def write_all(descriptor: int, octets: bytes) -> None:
    written = os.write(descriptor, octets) if octets else 0
    while written < len(octets):  # a short write is how a disk that fills up begins to say so
        written += os.write(descriptor, octets[written:])


def remove(name: str, directory: int | None = None) -> None:
    try:
        os.unlink(name, dir_fd=directory)
    except OSError:
        pass  # it may be gone; if the disk is that broken, the receipt already says so


def refusal(problem: OSError | MaildirRefused) -> Receipt:
    """The deferral that follows from an error of the file system. Never permanent: the fault is ours."""
    if isinstance(problem, MaildirRefused):
        return Receipt(Reply(451, (4, 3, 5), f"Mailbox cannot be used: {problem}"), alarm=True)
    if problem.errno == errno.EDQUOT:
        return Receipt(MAILBOX_FULL)
    if problem.errno == errno.ENOSPC:
        return Receipt(STORAGE_FULL, alarm=True)
    if problem.errno in (errno.EIO, errno.EROFS):
        return Receipt(STORAGE_BROKEN, alarm=True)
    told = os.strerror(problem.errno) if problem.errno else "unknown error"
    return Receipt(Reply(451, (4, 3, 0), f"Mailbox cannot be written: {told}"), alarm=True)
