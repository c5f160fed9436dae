# SPDX-License-Identifier: MIT
"""Contents that lie on disk as a Maildir keeps them become files of maildirs: by a link, or by a copy that the kernel makes.

A positive receipt means the same as in `maildir_delivery`. A linked file's octets were durable before (the spool's order), so
that only its name is synced: the directory's fsync, where few directories are concerned and each is known to be durable
itself, else one `syncfs`.

Never: a link for a content that anybody else still needs. Whoever changes a file of the maildir in place (no Maildir program
does) would change it for all. So a content is linked for a message with one recipient alone; between the link and the end of
its row nobody reads the spool's name but a repetition, which finds its own file there and leaves it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence

from attrs import frozen

from polarismail.store import maildir as names
from polarismail.store.interfaces import MaildirForm
from polarismail.store.maildir import MaildirRefused
from polarismail.store.maildir_delivery import (
    Batch,
    Directories,
    DiskContent,
    MaildirWriter,
    Placed,
    Receipt,
    create_draft,
    publish_name,
    remove,
    sync_file_system,
    write_all,
)

# Another file system (or another mount of it), one without links, one whose links are used up, a rule against them.
_CANNOT_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS}
_CANNOT_SEND = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}
# From so many directories on, one syncfs is cheaper.
_SYNCFS_FROM = 4
_COPY_OCTETS = 1 << 20


@frozen
class FileDelivery:
    """One large message for one maildir.

    `front` is what the maildir's file begins with, in place of the front of `form`; `may_link` says that they are the same
    and that no other recipient needs the content. `wire_octets` counts the whole file with CRLF line ends.
    """

    maildir: str  # absolute
    owner: int  # uid
    unique: str  # maildir.render_unique
    front: DiskContent
    form: MaildirForm
    wire_octets: int
    may_link: bool
    may_repeat: bool = False


class FileWriter(MaildirWriter):
    """A MaildirWriter that takes files as well. `sync_directory` makes the names in one directory durable."""

    def __init__(
        self,
        mail_root: str,
        *,
        open_maildirs: int = 64,
        sync: Callable[[int], None] = sync_file_system,
        sync_directory: Callable[[int], None] = os.fsync,
    ) -> None:
        super().__init__(mail_root, open_maildirs=open_maildirs, sync=sync)
        self.sync_directory = sync_directory

    def deliver_files(self, deliveries: Sequence[FileDelivery]) -> list[Receipt]:
        """Place a batch; the receipts come in its order, after the sync. Never raises OSError."""
        batch = _FileBatch(self)
        for at, delivery in enumerate(deliveries):
            try:
                directories = batch.directories(delivery.maildir, delivery.owner)
                name, repeated, linked = _place(directories, delivery)
                batch.all_linked = batch.all_linked and linked
                batch.note(at, directories, name, repeated)
            except (OSError, MaildirRefused) as problem:
                batch.refuse(at, problem)
        return batch.finish()


class _FileBatch(Batch):
    def __init__(self, writer: FileWriter) -> None:
        super().__init__(writer)
        self._files = writer
        self.all_linked = True

    def sync(self, placed: Sequence[Placed]) -> None:
        touched = {id(directories): directories for _, directories, _, repeated in placed}
        repeated = any(was_there for _, _, _, was_there in placed)  # then cur/ may have changed as well
        settled = all(directories.settled for directories in touched.values())
        if self.all_linked and settled and not repeated and len(touched) < _SYNCFS_FROM:
            for directories in touched.values():
                self._files.sync_directory(directories.new)
            return
        super().sync(placed)
        for directories in touched.values():
            directories.settled = True


def _place(directories: Directories, delivery: FileDelivery) -> tuple[str, bool, bool]:
    """Returns the name, whether it was there already, and whether the octets are the spool's own."""
    form, front, unique = delivery.form, delivery.front, delivery.unique
    name = names.render_name(unique, len(front.disk) + form.octets - form.front_octets, delivery.wire_octets)
    may_repeat = delivery.may_repeat
    if delivery.may_link and not may_repeat:
        try:
            if _link(form.path, name, directories.new):
                return name, False, True
        except FileExistsError:
            may_repeat = True
    try:
        linked = delivery.may_link and _link_draft(form.path, unique, directories.tmp)
        if not linked:
            _copy(delivery, directories.tmp)
        return *publish_name(directories, unique, name, may_repeat=may_repeat), linked
    except (OSError, MaildirRefused):
        remove(unique, directories.tmp)
        raise


def _link(path: str, name: str, directory: int) -> bool:
    """False where it takes a copy. Raises OSError, FileExistsError among them."""
    try:
        os.link(path, name, dst_dir_fd=directory, follow_symlinks=False)
    except OSError as problem:
        if problem.errno in _CANNOT_LINK:
            return False
        raise
    return True


def _link_draft(path: str, unique: str, tmp: int) -> bool:
    try:
        return _link(path, unique, tmp)
    except FileExistsError:
        # Left by an attempt that was killed in the middle: the name is ours alone.
        os.unlink(unique, dir_fd=tmp)
        return _link(path, unique, tmp)


def _copy(delivery: FileDelivery, tmp: int) -> None:
    """The front that is wanted, and what stands behind the form's own, into tmp/. Raises OSError."""
    form = delivery.form
    source = os.open(form.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        draft = create_draft(delivery.unique, tmp)
        try:
            write_all(draft, delivery.front.disk)
            at = form.front_octets
            while at < form.octets:
                taken = _send(draft, source, at, form.octets - at)
                if not taken:
                    raise OSError(errno.EIO, "the content is shorter than it was")
                at += taken
        finally:
            os.close(draft)
    finally:
        os.close(source)


def _send(target: int, source: int, offset: int, octets: int) -> int:
    try:
        return os.sendfile(target, source, offset, octets)
    except OSError as problem:
        if problem.errno not in _CANNOT_SEND:
            raise
    piece = os.pread(source, min(octets, _COPY_OCTETS), offset)
    write_all(target, piece)
    return len(piece)
