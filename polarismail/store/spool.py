# SPDX-License-Identifier: MIT
"""Accepted mail until every recipient is done: what a 250 promises is kept here.

Legal states of a message, and what a crash leaves of each
    draft       no row. Octets in memory, in a file, or in chunk rows. Crash: gone; file or chunks are swept at the next
                start. Nobody was told 250.
    finished    no row; octets of a large content durable, with their name. Crash: as a draft.
    queued      the row of the message and a row for each recipient, in one transaction. This is what 250 promises. Content
                in the row, or in a file or chunks that were durable before. Crash: taken over, and delivered.
    leaving     no row; the file still there. Crash: the file is swept.
    gone        neither row nor file.
A row never refers to a content that is not durable; a file without a row is never needed.

Legal states of a recipient (values.envelope.RecipientState)
    QUEUED, unowned   due at next_attempt; anybody may claim it.
    QUEUED, owned     somebody is trying it, or has it in line. Crash of the owner: unowned again, epoch up.
    HELD              the operator's: nobody claims it. While owned its last attempt is still running.
    final             kept, for the operator to see, while another recipient of the message is open.
Each change is fenced by owner and epoch, and its row count is looked at: who was taken over changes nothing.

Never: a message without a recipient row; a change of state outside a transaction of `Database`.
RFC 5321 §4.2.5 and §6.1 (responsibility for the message passes with the reply to the end of data).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from attrs import evolve, frozen
from sqlalchemy import Connection, select
from twisted.internet import defer
from twisted.internet.defer import Deferred, fail, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from polarismail.store import claims, schema
from polarismail.store.accepting import Accept, AcceptLane
from polarismail.store.content import (
    CHUNKS,
    FILE,
    INLINE,
    INLINE_OCTETS,
    LINK_OCTETS,
    MAILDIR,
    ChunkStore,
    ContentStore,
    Draft,
    FileStore,
    parse_maildir_head,
)
from polarismail.store.content_files import ContentFiles
from polarismail.store.database import Database
from polarismail.store.interfaces import (
    Committed,
    Front,
    ISpool,
    MaildirForm,
    Outcome,
    QueuedMessage,
    QueuedRecipient,
    Refused,
    Submission,
)
from polarismail.store.lru import LruCache
from polarismail.store.outcomes import Record, Recorded, RecordLane
from polarismail.store.queue_operations import QueueOperations
from polarismail.store.statements import Statements, number_of
from polarismail.store.threads import Answers
from polarismail.values.envelope import QueueIds, render_queue_id
from polarismail.values.errors import SpoolFull, SpoolUnhealthy, Unavailable

_KEPT_HEADS = 64
_MOST_OWNED = 100_000
_KEPT_FORMS = 1000


@frozen
class SpoolSettings:
    """What an operator may choose of the spool."""

    inline_octets: int = INLINE_OCTETS  # contents up to here travel in the accept transaction
    expires_seconds: float = 5 * 86400.0  # life in the queue
    file_threads: int = 4
    # auto: files where the database is a file, rows where it is a server
    content: Literal["auto", "files", "rows"] = "auto"


@implementer(ISpool)
class Spool(QueueOperations):
    """The spool of one process, on a started Database."""

    log = Logger()

    def __init__(
        self,
        database: Database,
        directory_path: str,
        reactor: Any,
        settings: SpoolSettings | None = None,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`directory_path`: where large contents are, made by `start` where it is missing. `now`: seconds since 1970."""
        super().__init__(database, now)
        self._settings = settings or SpoolSettings()
        self._directory_path = directory_path
        self._answers = Answers(reactor)
        self._files: ContentFiles | None = None
        self._store: ContentStore | None = None
        self._ids = QueueIds(0)
        self._ids_incarnation = -1
        self._heads: LruCache[str, tuple[int, bytes]] = LruCache(_KEPT_HEADS)
        self._forms: LruCache[str, bytes] = LruCache(_KEPT_FORMS)  # heads of storage MAILDIR
        self._when_removed: list[Callable[[list[str]], None]] = []
        self._doubtful: list[int] = []
        self._last_claim, self._clamps = float("inf"), False
        statements = Statements(database.dialect)
        self._statements = statements
        self._accept_lane = AcceptLane(statements, lambda: database.incarnation)
        self._record_lane = RecordLane(statements, self._accept_lane, lambda: database.incarnation)

    # -- opening and closing

    def start(self) -> Deferred[None]:
        """Open the directory of contents and sweep what crashed processes left in it. The database is started already:
        it has made claimable what they owned. Fails with SpoolUnhealthy."""
        kind = self._settings.content
        in_files = self._database.is_sqlite if kind == "auto" else kind == "files"
        try:
            self._files = ContentFiles(
                os.path.abspath(self._directory_path), self._answers, self._settings.file_threads
            )
        except OSError as problem:
            return fail(SpoolUnhealthy(f"the spool's directory cannot be used: {problem}"))
        self._store = FileStore(self._files) if in_files else ChunkStore(self._database)
        self._database.when_released(self._released)
        return Deferred.fromCoroutine(self._sweep())

    def stop(self) -> Deferred[None]:
        """Finish what was asked of the content threads. Stop the database after this."""
        files, self._files, self._store = self._files, None, None
        if files is None:
            return succeed(None)
        return self._database.in_thread(files.stop)

    @property
    def healthy(self) -> bool:
        """False once a sync has failed: accept nothing, deliver nothing, until the process is started anew."""
        return self._database.healthy and (self._files is None or self._files.healthy)

    def when_removed(self, callback: Callable[[list[str]], None]) -> None:
        """Call this with the queue ids of messages that have just left the spool."""
        self._when_removed.append(callback)

    # -- accepting

    def draft(self, front: Front | None = None) -> Draft:
        if not self.healthy or self._store is None:
            raise SpoolUnhealthy("the spool takes no mail")
        if self._database.full:
            raise SpoolFull("there is no room for more mail")
        incarnation = self._database.incarnation
        if incarnation != self._ids_incarnation:
            self._ids, self._ids_incarnation = QueueIds(incarnation), incarnation
        queue_id = self._ids.next(self._now())
        inline_octets, store = self._settings.inline_octets, self._store
        link_octets = min(inline_octets, LINK_OCTETS) if store.storage == FILE else inline_octets
        return Draft(queue_id, number_of(queue_id), incarnation, store.sink, inline_octets, front, link_octets)

    def commit(self, submission: Submission) -> Deferred[Committed | Refused]:
        if not self.healthy:
            submission.draft.abandon()
            return fail(SpoolUnhealthy("the spool takes no mail"))
        finished = submission.draft.finish()
        if finished is None:
            return self._accept(None, submission)
        answered: Deferred[Committed | Refused] = finished.addCallback(self._accept, submission)
        return answered

    def _accept(self, _: object, submission: Submission) -> Deferred[Committed | Refused]:
        draft = submission.draft
        try:
            accept = self._render(submission)
        except Exception as error:
            draft.drop()
            return fail(error)
        answered: Deferred[Committed | Refused] = self._database.submit(self._accept_lane, accept)
        return answered.addCallbacks(self._accepted, self._not_accepted, (draft, accept), {}, (draft, accept), {})

    def _render(self, submission: Submission) -> Accept:
        return Accept(
            submission,
            submission.draft,
            self._database.incarnation,
            self._now(),
            self._settings.expires_seconds,
        )

    def _accepted(self, answer: Committed | Refused, draft: Draft, accept: Accept) -> Committed | Refused:
        if isinstance(answer, Refused):
            draft.drop()
        elif accept.storage == MAILDIR:
            self._forms.put(draft.queue_id, accept.message[-1])
        return answer

    def _not_accepted(self, failure: Failure, draft: Draft, accept: Accept) -> Failure:
        if accept.undone or failure.check(SpoolFull) is not None:
            draft.drop()
        else:
            self._doubt(draft)
        return failure

    def _doubt(self, draft: Draft) -> None:
        # The row may be there all the same: its octets stay, and what we own without knowing it is given back.
        draft.in_doubt = True
        self._doubtful.append(draft.number)

    # -- the queue

    def claim(
        self, now: float, limit: int, longest_wait_seconds: float | None = None
    ) -> Deferred[list[QueuedRecipient]]:
        if not self.healthy:
            return fail(SpoolUnhealthy("what is delivered now could not be recorded"))
        doubtful, self._doubtful = self._doubtful, []
        # The first time, whenever the wall clock went back, and until nothing is left of that.
        clamps, self._clamps, self._last_claim = self._clamps or now < self._last_claim, False, now

        def claim(connection: Connection) -> tuple[list[QueuedRecipient], bool]:
            left = longest_wait_seconds is not None and clamps and claims.clamp(connection, now, longest_wait_seconds)
            if doubtful:
                claims.release_messages(connection, doubtful, self._database.incarnation)
            return claims.claim(connection, self._database.incarnation, now, limit), left

        return self._database.write(claim).addCallbacks(
            self._claimed, self._not_claimed, errbackArgs=(doubtful, clamps)
        )

    def _claimed(self, answer: tuple[list[QueuedRecipient], bool]) -> list[QueuedRecipient]:
        claimed, left = answer
        self._clamps = self._clamps or left
        return claimed

    def _not_claimed(self, failure: Failure, doubtful: list[int], clamps: bool) -> Failure:
        self._doubtful.extend(doubtful)
        self._clamps = self._clamps or clamps
        return failure

    def next_due(self) -> Deferred[float | None]:
        if self._doubtful or self._clamps:
            return succeed(0.0)
        return self._database.read(claims.next_due)

    def record(self, outcomes: Sequence[Outcome], reports: Sequence[Submission] = ()) -> Deferred[list[Committed]]:
        if not reports:
            return self._record(None, outcomes, ())
        finishing = [report.draft.finish() for report in reports]
        waits = [finished for finished in finishing if finished is not None]
        if not waits:
            return self._record(None, outcomes, reports)
        ready = defer.gatherResults(waits, consumeErrors=True)
        ready.addErrback(_first_failure)
        return ready.addCallback(self._record, outcomes, reports)

    def _record(
        self, _: object, outcomes: Sequence[Outcome], reports: Sequence[Submission]
    ) -> Deferred[list[Committed]]:
        try:
            record = Record(outcomes, [self._render(report) for report in reports])
        except Exception as error:
            return fail(error)
        answered: Deferred[Recorded] = self._database.submit(self._record_lane, record)
        return answered.addCallbacks(self._recorded, self._not_recorded, (reports,), {}, (reports,), {})

    def _not_recorded(self, failure: Failure, reports: Sequence[Submission]) -> Failure:
        for report in reports:
            self._doubt(report.draft)
        return failure

    def _recorded(self, recorded: Recorded, reports: Sequence[Submission]) -> list[Committed]:
        if recorded.left:
            self._removed([(message.queue_id, message.storage) for message in recorded.left])
        if len(recorded.committed) != len(reports):
            committed = {one.message.queue_id for one in recorded.committed}
            for report in reports:
                if report.draft.queue_id not in committed:
                    report.draft.drop()
        return recorded.committed

    def release(self, recipients: Sequence[QueuedRecipient]) -> Deferred[None]:
        return self.release_keys([(each.message.queue_id, each.number, each.epoch) for each in recipients])

    def hand_over(self, recipients: Sequence[QueuedRecipient], to: int) -> Deferred[list[QueuedRecipient]]:
        rows = [(number_of(recipient.message.queue_id), recipient.number, recipient.epoch) for recipient in recipients]

        def hand_over(connection: Connection) -> list[bool]:
            return claims.hand_over(connection, self._statements, self._database.incarnation, to, rows)

        def moved(changed: list[bool]) -> list[QueuedRecipient]:
            there = zip(recipients, changed, strict=True)
            return [evolve(recipient, epoch=recipient.epoch + 1) for recipient, has_moved in there if has_moved]

        return self._database.write(hand_over).addCallback(moved)

    def owned(self) -> Deferred[list[tuple[str, int, int]]]:
        limit, owner = _MOST_OWNED, self._database.incarnation
        found = self._database.read(lambda connection: claims.owned(connection, owner, limit))
        return found.addCallback(lambda rows: [(render_queue_id(key), number, epoch) for key, number, epoch in rows])

    def release_keys(self, keys: Sequence[tuple[str, int, int]]) -> Deferred[None]:
        rows = [(number_of(queue_id), number, epoch) for queue_id, number, epoch in keys]
        return self._database.write(
            lambda connection: claims.release(connection, self._statements, self._database.incarnation, rows)
        )

    # -- reading

    def read(self, message: QueuedMessage, offset: int, octets: int) -> Deferred[bytes]:
        if message.inline is not None:
            return succeed(message.inline[offset : offset + octets])
        return self._find_head(message).addCallback(self._read_behind, message, offset, octets)

    def maildir_form(self, message: QueuedMessage) -> Deferred[MaildirForm | None]:
        if message.storage != MAILDIR:
            return succeed(None)
        return self._find_head(message).addCallback(self._to_form, message)

    def _to_form(self, known: tuple[int, bytes], message: QueuedMessage) -> MaildirForm:
        if self._files is None:
            raise Unavailable("the spool is closed")
        front_octets, octets, trace = parse_maildir_head(known[1])
        return MaildirForm(self._files.path_of(number_of(message.queue_id)), octets, front_octets, trace)

    def _find_head(self, message: QueuedMessage) -> Deferred[tuple[int, bytes]]:
        """How the content is kept, and what the row keeps of it."""
        form = self._forms.get(message.queue_id)
        if form is not None:
            return succeed((MAILDIR, form))
        known = self._heads.get(message.queue_id)
        if known is not None:
            return succeed(known)
        messages = schema.messages
        query = select(messages.c.storage, messages.c.head).where(messages.c.id == number_of(message.queue_id))
        found: Deferred[Any] = self._database.read(lambda connection: connection.execute(query).first())
        return found.addCallback(self._found_head, message)

    def _found_head(self, row: Any, message: QueuedMessage) -> tuple[int, bytes]:
        if row is None:
            raise Unavailable(f"{message.queue_id} is not in the spool any more")
        known = (int(row[0]), bytes(row[1]))
        self._heads.put(message.queue_id, known)
        return known

    def _read_behind(
        self, known: tuple[int, bytes], message: QueuedMessage, offset: int, octets: int
    ) -> Deferred[bytes]:
        storage, head = known
        if storage == MAILDIR:
            return self._read_form(head, message, offset, octets)
        first = head[offset : offset + octets]
        if storage == INLINE or len(first) == octets:
            return succeed(first)
        if self._store is None:
            return fail(Unavailable("the spool is closed"))
        # A message keeps its storage when the setting changes.
        store = self._store
        if storage != store.storage:
            assert self._files is not None
            store = FileStore(self._files) if storage == FILE else ChunkStore(self._database)
        rest = store.read(number_of(message.queue_id), max(0, offset - len(head)), octets - len(first))
        return rest.addCallback(first.__add__)

    def _read_form(self, head: bytes, message: QueuedMessage, offset: int, octets: int) -> Deferred[bytes]:
        front_octets, _, trace = parse_maildir_head(head)
        first = trace[offset : offset + octets]
        if self._files is None:
            return fail(Unavailable("the spool is closed"))
        behind = max(0, offset - len(trace))
        rest = self._files.read_lines(number_of(message.queue_id), front_octets, behind, octets - len(first))
        return rest.addCallback(first.__add__)

    # -- inside

    def _removed(self, messages: Sequence[tuple[str, int]]) -> None:
        files = [number_of(queue_id) for queue_id, storage in messages if storage in (FILE, MAILDIR)]
        for queue_id, storage in messages:
            if storage != INLINE:
                self._heads.drop(queue_id)
                self._forms.drop(queue_id)
        if files and self._files is not None:
            self._files.remove(files)
        gone = [queue_id for queue_id, _ in messages]
        for callback in self._when_removed:
            callback(gone)

    def _released(self) -> None:
        self._changed("released", [])
        Deferred.fromCoroutine(self._sweep()).addErrback(self._not_swept)

    def _not_swept(self, failure: Failure) -> None:
        self.log.failure("orphaned contents stay until the next start", failure, event="not_swept")

    async def _sweep(self) -> None:
        """Remove contents that no message refers to and whose process is dead: drafts of a crash, files of the leaving."""
        if self._files is None or self._store is None:
            return
        stores: list[ContentStore] = [FileStore(self._files)]
        if self._store.storage == CHUNKS:
            stores.append(self._store)
        for store in stores:
            orphans = await self._database.read(partial(_orphans, numbers=await store.numbers()))
            if orphans:
                self.log.info("sweeping {count} orphaned contents", event="swept", count=len(orphans))
                await store.sweep(orphans)


def _first_failure(failure: Failure) -> Failure:
    return failure.value.subFailure  # type: ignore[union-attr,no-any-return]


def _orphans(connection: Connection, numbers: Sequence[int]) -> list[int]:
    """Those of no message and of no living process. A queue id carries its incarnation (values.envelope.QueueIds)."""
    if not numbers:
        return []
    nodes, messages = schema.nodes, schema.messages
    # The dead have been taken out of the table before anybody sweeps.
    living = {number & 0x7FFF for number in connection.execute(select(nodes.c.incarnation)).scalars()}
    candidates = [number for number in numbers if number >> 8 & 0x7FFF not in living]
    orphans: list[int] = []
    for at in range(0, len(candidates), 500):
        some = candidates[at : at + 500]
        there = set(connection.execute(select(messages.c.id).where(messages.c.id.in_(some))).scalars())
        orphans.extend(number for number in some if number not in there)
    return orphans
