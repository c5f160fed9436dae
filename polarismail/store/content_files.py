# SPDX-License-Identifier: MIT
"""Large contents as files beside the database, durable before any row refers to them.

The order (DURABILITY): write, sync the octets, sync the name, then the row; on removal the row first, the file after it.
So a file without a row is an orphan that `sweep` may remove, and a row without a file does not happen.

A sync that fails is final for its file: it is set aside (renamed `*.broken`), never synced again, and the store is
unhealthy from then on. Needs Linux 5.8 for `syncfs` to report errors; without `syncfs` each file is synced by itself.
"""

from __future__ import annotations

import ctypes
import errno
import os
import queue
import threading
from collections.abc import Iterable, Sequence

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from polarismail.store.threads import Answer, Answers, Workers
from polarismail.values.envelope import QUEUE_ID_LENGTH, parse_queue_id, render_queue_id
from polarismail.values.errors import SpoolFull, SpoolUnhealthy, Unavailable

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
# From so many files on, one syncfs is cheaper than a sync for each and one for the directory (measured with 100 KB and two
# processes: 0.85 flushes of the disk for each message from four files on, 0.8 from two on). A file alone does not wait for
# what others have written to the file system.
_SYNCFS_FROM = 2
_MOST_VECTORS = 512
_LINES_OCTETS = 65536
_MOST_PLACES = 64

_libc = ctypes.CDLL(None, use_errno=True)
_fdatasync = getattr(os, "fdatasync", os.fsync)


class ContentFile:
    """One file that is being written. Its calls are made one after the other, from any thread."""

    __slots__ = ("descriptor", "made", "name", "octets")

    def __init__(self, number: int) -> None:
        self.name = render_queue_id(number)
        self.descriptor, self.made = -1, False
        self.octets = 0  # written so far


class ContentFiles:
    """The directory of large contents, the threads that write it, and the thread that syncs it in groups."""

    log = Logger()

    def __init__(self, path: str, answers: Answers, threads: int) -> None:
        """Make the directory where there is none. Raises OSError."""
        os.makedirs(path, mode=0o700, exist_ok=True)
        self.path, self.healthy = path, True
        self._answers = answers
        self._places: dict[int, tuple[int, int]] = {}  # by number: (octets with CRLF, octets on disk) up to some point
        self._places_lock = threading.Lock()
        self._directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._workers = Workers(answers, "content", threads)
        self._to_sync: queue.SimpleQueue[tuple[Deferred[None], ContentFile] | None] = queue.SimpleQueue()
        self._syncer = threading.Thread(target=self._sync_groups, name="content-sync", daemon=True)
        self._syncer.start()

    def stop(self) -> None:
        """Finish what was asked for. Blocks; not for the reactor's thread."""
        self._to_sync.put(None)
        self._syncer.join()
        self._workers.stop()
        os.close(self._directory)

    # -- asynchronous, from the reactor's thread

    def append(self, file: ContentFile, pieces: Sequence[bytes]) -> Deferred[None]:
        """Write behind what is there, making the file first. Fails with SpoolFull or SpoolUnhealthy."""
        return self._workers.submit(self._append, file, pieces)

    def append_lines(self, file: ContentFile, pieces: Sequence[bytes]) -> Deferred[None]:
        """The same with LF line ends, for octets each CR and LF of which is part of a CRLF."""
        return self._workers.submit(self._append_lines, file, pieces)

    def sync(self, file: ContentFile) -> Deferred[None]:
        """Make octets and name durable, and close. Files that wait at the same time share the syncs.

        Fails with SpoolUnhealthy.
        """
        deferred: Deferred[None] = Deferred()
        self._to_sync.put((deferred, file))
        return deferred

    def discard(self, file: ContentFile) -> None:
        """Close and remove, soon. For a file that no row refers to."""
        self._workers.submit(self._discard, file).addErrback(self._not_removed)

    def remove(self, numbers: Iterable[int]) -> None:
        """Remove the files of messages whose rows are gone, soon."""
        self._workers.submit(self._remove, list(numbers)).addErrback(self._not_removed)

    def read(self, number: int, offset: int, octets: int) -> Deferred[bytes]:
        """Octets from `offset`, fewer only at the end. Fails with Unavailable."""
        return self._workers.submit(self._read, number, offset, octets)

    def read_lines(self, number: int, front_octets: int, offset: int, octets: int) -> Deferred[bytes]:
        """The same with CRLF line ends out of a file with LF line ends, behind its front; `offset` and `octets` count what
        is given out. Quick where each read goes on where the last one ended. Fails with Unavailable."""
        return self._workers.submit(self._read_lines, number, front_octets, offset, octets)

    def path_of(self, number: int) -> str:
        """Where the content of this message is."""
        return f"{self.path}/{render_queue_id(number)}"

    def numbers(self) -> Deferred[list[int]]:
        """The messages that have a file."""
        return self._workers.submit(self._numbers)

    # -- in a worker

    def _append(self, file: ContentFile, pieces: Sequence[bytes]) -> None:
        try:
            if file.descriptor < 0:
                file.descriptor = os.open(file.name, _CREATE, 0o600, dir_fd=self._directory)
                file.made = True
            for at in range(0, len(pieces), _MOST_VECTORS):
                file.octets += _write_all(file.descriptor, pieces[at : at + _MOST_VECTORS])
        except OSError as problem:
            if problem.errno in _NO_ROOM:
                raise SpoolFull(f"no room for the content of {file.name}: {problem}") from problem
            self.healthy = False
            raise SpoolUnhealthy(f"cannot write the content of {file.name}: {problem}") from problem

    def _append_lines(self, file: ContentFile, pieces: Sequence[bytes]) -> None:
        # Dropping every CR is nine times as fast as replacing pairs.
        self._append(file, [piece.replace(b"\r", b"") for piece in pieces])

    def _discard(self, file: ContentFile) -> None:
        _close(file)
        if file.made:
            file.made = False
            os.unlink(file.name, dir_fd=self._directory)

    def _remove(self, numbers: list[int]) -> None:
        for number in numbers:
            try:
                os.unlink(render_queue_id(number), dir_fd=self._directory)
            except FileNotFoundError:
                continue  # swept by another process: it looked after the row had gone

    def _read(self, number: int, offset: int, octets: int) -> bytes:
        try:
            descriptor = os.open(render_queue_id(number), _READ, dir_fd=self._directory)
            try:
                found = os.pread(descriptor, octets, offset)
                while len(found) < octets:
                    more = os.pread(descriptor, octets - len(found), offset + len(found))
                    if not more:
                        break
                    found += more
                return found
            finally:
                os.close(descriptor)
        except OSError as problem:
            raise Unavailable(f"cannot read the content of {render_queue_id(number)}: {problem}") from problem

    def _read_lines(self, number: int, front_octets: int, offset: int, octets: int) -> bytes:
        # Where an octet with CRLF line ends lies on disk is known from reading alone: from the front, or where a piece was met.
        with self._places_lock:
            place = self._places.get(number, (0, front_octets))
        wire_at, disk_at = place if place[0] <= offset else (0, front_octets)
        found: list[bytes] = []
        wanted = octets
        try:
            descriptor = os.open(render_queue_id(number), _READ, dir_fd=self._directory)
            try:
                while wanted > 0 and (disk := os.pread(descriptor, _LINES_OCTETS, disk_at)):
                    wire = disk.replace(b"\n", b"\r\n")
                    taken = wire[max(0, offset - wire_at) :][:wanted]
                    found.append(taken)
                    wanted -= len(taken)
                    if wanted or offset + octets == wire_at + len(wire):
                        wire_at, disk_at = wire_at + len(wire), disk_at + len(disk)
            finally:
                os.close(descriptor)
        except OSError as problem:
            raise Unavailable(f"cannot read the content of {render_queue_id(number)}: {problem}") from problem
        with self._places_lock:
            self._places[number] = (wire_at, disk_at)
            while len(self._places) > _MOST_PLACES:
                del self._places[next(iter(self._places))]
        return b"".join(found)

    def _numbers(self) -> list[int]:
        found = []
        for name in os.listdir(self._directory):
            if len(name) == QUEUE_ID_LENGTH:
                try:
                    found.append(parse_queue_id(name))
                except ValueError:
                    self.log.warn("{name!r} in the spool is none of ours", event="stranger_in_spool", name=name)
        return found

    def _not_removed(self, failure: object) -> None:
        self.log.warn("a content file stays until the next start: {failure}", event="not_removed", failure=str(failure))

    # -- in the syncing thread

    def _sync_groups(self) -> None:
        going = True
        while going:
            group = [self._to_sync.get()]
            while not self._to_sync.empty():
                group.append(self._to_sync.get())
            going = None not in group
            waiting = [item for item in group if item is not None]
            if waiting:
                self._answers.put(self._sync_group(waiting))

    def _sync_group(self, waiting: list[tuple[Deferred[None], ContentFile]]) -> list[Answer]:
        errors: dict[ContentFile, OSError] = {}
        together = len(waiting) >= _SYNCFS_FROM and hasattr(_libc, "syncfs")
        for _, file in waiting:
            try:
                if not together:
                    _fdatasync(file.descriptor)
            except OSError as problem:
                errors[file] = problem
        try:
            if together:
                _syncfs(self._directory)
            else:
                os.fsync(self._directory)
        except OSError as problem:
            errors.update((file, problem) for _, file in waiting)
        for _, file in waiting:
            try:
                _close(file)
            except OSError as problem:
                errors.setdefault(file, problem)
        answers: list[Answer] = []
        for deferred, file in waiting:
            if file not in errors:
                answers.append((deferred, None, None))
                continue
            self.healthy = False
            self._set_aside(file)
            answers.append((deferred, None, SpoolUnhealthy(f"cannot sync {file.name}: {errors[file]}")))
        return answers

    def _set_aside(self, file: ContentFile) -> None:
        file.made = False
        self.log.critical(
            "{name}: the sync of its content failed: the spool takes no more mail", event="sync_failed", name=file.name
        )
        try:
            os.rename(file.name, f"{file.name}.broken", src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except OSError as problem:
            self.log.error("cannot set {name} aside: {error}", event="sync_failed", name=file.name, error=str(problem))


def _write_all(descriptor: int, pieces: Sequence[bytes]) -> int:
    """Every octet, whatever a single call takes. Returns how many they were."""
    octets = sum(map(len, pieces))
    left = octets - os.writev(descriptor, pieces)
    if left:
        rest = memoryview(b"".join(pieces))[-left:]
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    return octets


def _syncfs(descriptor: int) -> None:
    if _libc.syncfs(descriptor) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _close(file: ContentFile) -> None:
    descriptor, file.descriptor = file.descriptor, -1
    if descriptor >= 0:
        os.close(descriptor)
