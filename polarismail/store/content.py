# SPDX-License-Identifier: MIT
"""Where the octets of a message are: in its row, in a file, or in rows of their own; and drafts, which fill them.

A small content travels in the accept transaction. A larger one is streamed away while it arrives: to a file on one machine,
to chunk rows on a server, where another machine may have to take over. A draft holds at most 256 KB in memory: 64 KB of
its beginning, 64 KB that wait, 64 KB on the way, and the rest of a chunk.

A file whose recipients are maildrops alone is written in the form that a Maildir keeps (MAILDIR), with the fields of final
delivery in front where there is one recipient: delivery is then a link, and the octets are written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from sqlalchemy import Connection, delete, insert, select
from twisted.internet.defer import Deferred, fail, succeed
from zope.interface import implementer

from polarismail.store import schema
from polarismail.store.content_files import ContentFile, ContentFiles
from polarismail.store.database import Database
from polarismail.store.interfaces import Front, IDraft
from polarismail.values.errors import Unavailable

INLINE, FILE, CHUNKS, MAILDIR = 0, 1, 2, 3
"""messages.storage: numbers are the database's, never renumber."""

INLINE_OCTETS = 65536
LINK_OCTETS = 32768
"""From here on a content for one maildrop is a file all the same: a link costs what a row of so many octets costs, and halves
what is written (40 KB: 1.15 octets to the disk for each octet instead of 2.4, at the same CPU)."""
CHUNK_OCTETS = 65536
HEAD_OCTETS = 65536
_HIGH_WATER_OCTETS = 65536


class Sink(Protocol):
    """Takes the octets of one large draft; calls come one at a time, each after the Deferred of the one before."""

    storage: int

    def append(self, pieces: Sequence[bytes]) -> Deferred[None]:
        """Take these behind the others."""

    def finish(self) -> Deferred[None]:
        """Make all of it durable."""

    def discard(self) -> None:
        """Remove all of it, soon."""

    def render_head(self, trace: bytes) -> bytes:
        """What the message's row keeps: the trace fields, and where the content is, as far as only the sink knows it."""


class ContentStore(Protocol):
    """Where large contents go."""

    storage: int

    def sink(self, number: int, front: bytes | None) -> Sink:
        """A place for the content of the message with this number; where `front` is not None, in Maildir's form where the
        store can do that: then the sink's storage is MAILDIR, and the front is in it."""

    def read(self, number: int, offset: int, octets: int) -> Deferred[bytes]:
        """Octets of the content from `offset`, fewer only at the end. Fails with Unavailable."""

    def remove(self, numbers: Sequence[int]) -> None:
        """The rows of these messages are gone: what is left of them may go."""

    def numbers(self) -> Deferred[list[int]]:
        """Messages that have something here, candidates for `sweep`."""

    def sweep(self, numbers: Sequence[int]) -> Deferred[Any]:
        """Remove what belongs to these numbers, for which there is no message."""


class FileStore:
    """Contents as files."""

    storage = FILE

    def __init__(self, files: ContentFiles) -> None:
        self._files = files
        self.read, self.numbers, self.remove = files.read, files.numbers, files.remove

    def sink(self, number: int, front: bytes | None) -> Sink:
        return _FileSink(self._files, number) if front is None else _MaildirSink(self._files, number, front)

    def sweep(self, numbers: Sequence[int]) -> Deferred[Any]:
        self._files.remove(numbers)
        return succeed(None)


class _FileSink:
    storage = FILE

    def __init__(self, files: ContentFiles, number: int) -> None:
        self._files, self._file = files, ContentFile(number)

    def append(self, pieces: Sequence[bytes]) -> Deferred[None]:
        return self._files.append(self._file, pieces)

    def finish(self) -> Deferred[None]:
        return self._files.sync(self._file)

    def discard(self) -> None:
        self._files.discard(self._file)

    def render_head(self, trace: bytes) -> bytes:
        return trace


class _MaildirSink(_FileSink):
    """Takes octets with CRLF line ends and no others."""

    storage = MAILDIR

    def __init__(self, files: ContentFiles, number: int, front: bytes) -> None:
        super().__init__(files, number)
        self._front, self._front_octets = front, len(front.replace(b"\r", b""))

    def append(self, pieces: Sequence[bytes]) -> Deferred[None]:
        front, self._front = self._front, b""
        return self._files.append_lines(self._file, (front, *pieces) if front else pieces)

    def render_head(self, trace: bytes) -> bytes:
        return b"%d %d\n" % (self._front_octets, self._file.octets) + trace


def parse_maildir_head(head: bytes) -> tuple[int, int, bytes]:
    """Octets of the front, octets of the file, trace fields: from what a row of storage MAILDIR keeps."""
    sizes, _, trace = head.partition(b"\n")
    front_octets, octets = map(int, sizes.split())
    return front_octets, octets, trace


class ChunkStore:
    """Contents as rows of CHUNK_OCTETS each, the last one shorter. They go with their message, in its transaction."""

    storage = CHUNKS

    def __init__(self, database: Database) -> None:
        self._database = database

    def sink(self, number: int, front: bytes | None) -> Sink:
        return _ChunkSink(self._database, number)

    def read(self, number: int, offset: int, octets: int) -> Deferred[bytes]:
        first, skipped = divmod(offset, CHUNK_OCTETS)
        last = (offset + octets - 1) // CHUNK_OCTETS
        chunks = schema.chunks
        query = (
            select(chunks.c.octets)
            .where(chunks.c.message_id == number, chunks.c.number.between(first, last))
            .order_by(chunks.c.number)
        )

        def read(connection: Connection) -> bytes:
            return b"".join(connection.execute(query).scalars())[skipped : skipped + octets]

        return self._database.read(read)

    def remove(self, numbers: Sequence[int]) -> None:
        """Nothing: the rows have gone with the message's."""

    def numbers(self) -> Deferred[list[int]]:
        chunks, messages = schema.chunks, schema.messages
        orphans = (
            select(chunks.c.message_id)
            .where(chunks.c.number == 0)
            .where(~select(messages.c.id).where(messages.c.id == chunks.c.message_id).exists())
        )
        return self._database.read(lambda connection: list(connection.execute(orphans).scalars()))

    def sweep(self, numbers: Sequence[int]) -> Deferred[Any]:
        return self._database.write(lambda connection: delete_chunks(connection, numbers))


def delete_chunks(connection: Connection, numbers: Iterable[int]) -> None:
    """Remove the chunk rows of these messages."""
    connection.execute(delete(schema.chunks).where(schema.chunks.c.message_id.in_(list(numbers))))


class _ChunkSink:
    storage = CHUNKS

    def __init__(self, database: Database, number: int) -> None:
        self._database, self._number = database, number
        self._rest, self._rows = b"", 0

    def append(self, pieces: Sequence[bytes]) -> Deferred[None]:
        octets = b"".join((self._rest, *pieces))
        whole = len(octets) - len(octets) % CHUNK_OCTETS
        self._rest = octets[whole:]
        return self._insert([octets[at : at + CHUNK_OCTETS] for at in range(0, whole, CHUNK_OCTETS)])

    def finish(self) -> Deferred[None]:
        rest, self._rest = self._rest, b""
        return self._insert([rest] if rest else [])

    def discard(self) -> None:
        if self._rows:
            # What cannot be removed now is swept at the next start.
            self._database.write(lambda connection: delete_chunks(connection, [self._number])).addErrback(
                lambda _: None
            )

    def render_head(self, trace: bytes) -> bytes:
        return trace

    def _insert(self, chunks: list[bytes]) -> Deferred[None]:
        if not chunks:
            return succeed(None)
        rows = [
            {"message_id": self._number, "number": self._rows + at, "octets": octets}
            for at, octets in enumerate(chunks)
        ]
        self._rows += len(rows)
        done: Deferred[Any] = self._database.write(lambda connection: connection.execute(insert(schema.chunks), rows))
        return done.addCallback(lambda _: None)


@implementer(IDraft)
class Draft:
    """Content that is being received. Used on the reactor's thread alone."""

    def __init__(
        self,
        queue_id: str,
        number: int,
        incarnation: int,
        sink: Callable[[int, bytes | None], Sink],
        inline_octets: int,
        front: Front | None = None,
        link_octets: int | None = None,
    ) -> None:
        """`link_octets`: more than that is not INLINE where there is a front that is not empty."""
        self.queue_id, self.number, self.incarnation = queue_id, number, incarnation
        self.size = 0
        self.trace = b""
        self._make_sink, self._inline_octets, self._front = sink, inline_octets, front
        self._link_octets = inline_octets if front is None or link_octets is None else link_octets
        self._fields: tuple[bytes, bytes] | None = None
        self._pending: list[bytes] = []
        self._pending_octets = self._flying_octets = 0
        self._head = b""
        self._sink: Sink | None = None
        self._waiting: list[Deferred[None]] = []
        self._error: BaseException | None = None
        self._gone = False  # abandoned, or handed over to a commit
        self._durable = False
        self.in_doubt = False  # a commit failed: a row may refer to its octets

    @property
    def storage(self) -> int:
        """INLINE, FILE, CHUNKS or MAILDIR: known once it is finished."""
        return INLINE if self._sink is None else self._sink.storage

    def octets(self, before: bytes = b"") -> bytes:
        """All of it behind `before`, where it is INLINE."""
        return b"".join((before, *self._pending))

    def render_head(self, trace: bytes) -> bytes:
        """What the message's row keeps in its head: all octets where it is INLINE, else the trace and what its sink adds."""
        return self.octets(trace) if self._sink is None else self._sink.render_head(trace)

    def write(self, octets: bytes) -> Deferred[None] | None:
        if self._error is not None:
            return fail(self._error)
        if self._gone:
            return fail(Unavailable("the draft is closed"))
        self.size += len(octets)
        self._pending.append(octets)
        self._pending_octets += len(octets)
        if self._sink is None:
            if self._is_inline():
                return None
            self._head = b"".join(self._pending)[:HEAD_OCTETS]
            self._sink = self._begin_sink()
        elif len(self._head) < HEAD_OCTETS:
            self._head += octets[: HEAD_OCTETS - len(self._head)]
        if self._pending_octets + self._flying_octets <= _HIGH_WATER_OCTETS:
            return None
        # Not before: a hand-over to a thread and back costs more than the write itself, so that few and large ones are wanted.
        self._spill()
        return self._wait()

    def head(self, octets: int) -> bytes:
        if self._sink is not None:
            return self._head[:octets]
        return self.octets()[: min(octets, HEAD_OCTETS)]

    def abandon(self) -> None:
        if self._gone:
            return
        self._gone = True
        self._drop()

    def finish(self) -> Deferred[None] | None:
        """Make all of it durable, but for what is INLINE (None then). No write may follow; `abandon` does nothing any more:
        whether octets go is for the commit to say, by `drop`. Fails as `write` does, and nothing is left then. May be
        called again once it has succeeded.
        """
        if self._durable:
            return None
        if self._gone:
            return fail(Unavailable("the draft is closed"))
        self._gone = True
        if self._sink is None:
            self._durable = True
            return None
        sink = self._sink
        flushed = self._wait() if self._flying_octets or self._pending_octets or self._error else succeed(None)
        self._spill()  # somebody waits already, or what lands at once would be taken for abandoned
        flushed.addCallback(lambda _: sink.finish())
        return flushed.addCallbacks(self._finished, self._unfinished)

    def drop(self) -> None:
        """Remove the octets of a finished draft: its commit was refused. Nothing happens where a row may refer to them."""
        if self._sink is not None and not self.in_doubt:
            self._sink.discard()

    def _is_inline(self) -> bool:
        if self.size > self._inline_octets:
            return False
        return self.size <= self._link_octets or not any(self._ask_front())

    def _ask_front(self) -> tuple[bytes, bytes]:
        if self._fields is None:
            self._fields = self._front(self.queue_id) if self._front is not None else (b"", b"")
        return self._fields

    def _begin_sink(self) -> Sink:
        if self._front is None:
            return self._make_sink(self.number, None)
        own, trace = self._ask_front()
        sink = self._make_sink(self.number, own + trace)
        if sink.storage == MAILDIR:
            self.trace = trace
        return sink

    def _wait(self) -> Deferred[None]:
        if self._error is not None:
            return fail(self._error)
        waiting: Deferred[None] = Deferred()
        self._waiting.append(waiting)
        return waiting

    def _finished(self, _: object) -> None:
        self._durable = True

    def _unfinished(self, failure: Any) -> Any:
        self._pending = []
        if self._sink is not None:
            self._sink.discard()
        return failure

    def _spill(self) -> None:
        if self._sink is None or self._flying_octets or not self._pending_octets:
            return
        pieces, self._pending = self._pending, []
        self._flying_octets, self._pending_octets = self._pending_octets, 0
        self._sink.append(pieces).addCallbacks(self._landed, self._lost)

    def _landed(self, _: object) -> None:
        self._flying_octets = 0
        if self._gone and not self._waiting:
            self._drop()
            return
        if self._gone or self._pending_octets > _HIGH_WATER_OCTETS:
            self._spill()
        if self._pending_octets + self._flying_octets <= (0 if self._gone else _HIGH_WATER_OCTETS):
            self._release(None)

    def _lost(self, failure: Any) -> None:
        self._error, self._flying_octets = failure.value, 0
        self._pending, self._pending_octets = [], 0
        if self._gone and not self._waiting:
            self._drop()
        else:
            self._release(failure.value)

    def _release(self, error: BaseException | None) -> None:
        waiting, self._waiting = self._waiting, []
        for deferred in waiting:
            if error is None:
                deferred.callback(None)
            else:
                deferred.errback(error)

    def _drop(self) -> None:
        self._pending, self._pending_octets, self._head = [], 0, b""
        if self._sink is not None and not self._flying_octets:
            sink, self._sink = self._sink, None
            sink.discard()
        if self._waiting:
            self._release(Unavailable("the draft is abandoned"))
