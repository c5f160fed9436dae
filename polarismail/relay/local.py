# SPDX-License-Identifier: MIT
"""The next hop that is a mailbox of ours: an outcome DELIVERED means that the copy is on stable storage.

All disk work happens on two threads: one writes small messages in batches (whatever waits when the last sync is done is the
next batch), one writes large messages piece by piece, at most `streams` of them at a time, so that neither memory nor the
latency of small mail depends on the size of large mail. A large message that lies in the spool as a Maildir keeps it is not
read here at all: its file is linked or copied by the kernel (`local_files`). The reactor's thread only looks accounts up and
hands over.

`deliver` answers when the slowest of its recipients is done: give large messages a call of their own.

A deferral never becomes a failure here: only an account that does not exist (5.1.1) and a loop (5.4.6) are permanent.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from attrs import frozen
from twisted.internet.defer import Deferred, DeferredSemaphore, gatherResults
from twisted.logger import Logger
from twisted.python.failure import Failure

from polarismail.relay.local_files import INCOMPLETE, write_files
from polarismail.relay.local_writing import BatchThread, Contents, Job, LargeMessage, Receipts
from polarismail.store import maildir as names
from polarismail.store.content import MAILDIR
from polarismail.store.interfaces import Account, IDirectory, MaildirForm, Outcome, QueuedMessage, QueuedRecipient
from polarismail.store.maildir import MaildirRefused
from polarismail.store.maildir_delivery import MaildirWriter, Receipt, refusal, sync_file_system
from polarismail.store.maildir_files import FileWriter
from polarismail.store.threads import Answers, Workers
from polarismail.values.envelope import RecipientState
from polarismail.values.errors import Unavailable
from polarismail.values.events import RecordEvent, no_event
from polarismail.values.reply import TRY_AGAIN, UNKNOWN_RECIPIENT, Reply

DISABLED = Reply(450, (4, 2, 1), "Mailbox is disabled, try again later")

ReadContent = Callable[[QueuedMessage, int, int], "Deferred[bytes]"]
FindForm = Callable[[QueuedMessage], "Deferred[MaildirForm | None]"]
_DELIVERED = RecipientState.DELIVERED
_ALARM_SECONDS = 60.0
_ALARMS = 100


@frozen
class LocalSettings:
    """Bounds of local delivery."""

    batch: int = 200  # small messages for one sync, at most
    small_octets: int = 65536  # larger ones are streamed
    piece_octets: int = 131072
    streams: int = 2  # large messages at a time
    copies: int = 8  # of one large message, written side by side
    open_maildirs: int = 64
    retry_seconds: float = 300.0  # where a deferral is not scheduled by somebody who knows better


class LocalDelivery:
    """See the module. `read` is ISpool.read, `find_form` its maildir_form; `record_event` hears of "alarm" when an operator
    must look.

    `mail_root` is where relative maildirs begin; it must exist. `sync` makes a file system durable, given a descriptor.
    """

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        read: ReadContent,
        directory: IDirectory,
        settings: LocalSettings | None = None,
        *,
        hostname: str,
        mail_root: str,
        find_form: FindForm | None = None,
        record_event: RecordEvent = no_event,
        sync: Callable[[int], None] = sync_file_system,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._read, self._directory, self._settings = read, directory, settings or LocalSettings()
        self._hostname, self._mail_root, self._record_event, self._now = hostname, mail_root, record_event, now
        self._find_form = find_form
        self._alarms: dict[str, float] = {}
        self._active: set[Deferred[list[Outcome]]] = set()
        self._answers = Answers(reactor)
        writer = MaildirWriter(mail_root, open_maildirs=self._settings.open_maildirs, sync=sync)
        self._batches = BatchThread(self._answers, writer, self._settings.batch)
        self._streams = DeferredSemaphore(self._settings.streams)
        most = max(self._settings.copies, self._settings.open_maildirs)
        self._make_large_writer = lambda: FileWriter(mail_root, open_maildirs=most, sync=sync)
        self._large: Workers | None = None

    def deliver(self, recipients: Sequence[QueuedRecipient]) -> Deferred[list[Outcome]]:
        """Deliver to each; the outcomes come in the same order. Never fails: what went wrong is a deferral."""
        done = Deferred.fromCoroutine(self._deliver(list(recipients)))
        done.addErrback(self._unforeseen, recipients)
        if not done.called:
            self._active.add(done)
            done.addBoth(self._forget, done)
        return done

    def stop(self) -> Deferred[None]:
        """Finish what was begun and end the threads. Call `deliver` no more."""
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        while self._active:
            one: Deferred[None] = Deferred()
            next(iter(self._active)).addBoth(_tell, one)
            await one
        await self._batches.stop()
        if self._large is not None:
            self._large.stop()  # it has nothing to do any more: this does not wait

    def _forget(self, result: Any, done: Deferred[list[Outcome]]) -> Any:
        self._active.discard(done)
        return result

    # -- which mailbox -----------------------------------------------------------------------------------------------

    async def _deliver(self, recipients: list[QueuedRecipient]) -> list[Outcome]:
        receipts: Receipts = {}
        small: dict[int, Job] = {}
        large: dict[str, dict[int, Job]] = {}
        files: dict[int, Job] = {}
        owner = os.geteuid()
        for at, account in enumerate(await self._accounts(recipients)):
            job = self._job(recipients[at], account, owner)
            if isinstance(job, Receipt):
                receipts[at] = job
            elif job.recipient.message.storage == MAILDIR and self._find_form is not None:
                files[at] = job
            elif job.recipient.message.size <= self._settings.small_octets:
                small[at] = job
            else:
                large.setdefault(job.message.queue_id, {})[at] = job
        waiting = [self._deliver_small(small)] if small else []
        waiting += [self._deliver_large(group) for group in large.values()]
        if files:
            waiting.append(Deferred.fromCoroutine(self._deliver_files(files)).addErrback(self._failed, files))
        for done in await gatherResults(waiting) if waiting else ():
            receipts.update(done)
        return [self._outcome(recipient, receipts[at]) for at, recipient in enumerate(recipients)]

    async def _accounts(self, recipients: list[QueuedRecipient]) -> list[Account | Receipt | None]:
        found: list[Any] = []
        for recipient in recipients:
            account: Any = None
            if recipient.account_id is not None:
                account = self._directory.account_by_id(recipient.account_id)
            if isinstance(account, Deferred):
                account.addErrback(self._account_unknown)
            found.append(account)
        return [await account if isinstance(account, Deferred) else account for account in found]

    def _account_unknown(self, failure: Failure) -> Receipt:
        if not isinstance(failure.value, Unavailable):
            self.log.failure("an account could not be looked up", failure)
        return Receipt(TRY_AGAIN)

    def _job(self, recipient: QueuedRecipient, account: Account | Receipt | None, owner: int) -> Job | Receipt:
        if isinstance(account, Receipt):
            return account
        if account is None:
            return Receipt(UNKNOWN_RECIPIENT)
        if not account.active:
            return Receipt(DISABLED)
        try:
            if account.uid is not None and account.uid != owner:
                raise MaildirRefused(f"it belongs to uid {account.uid}, and the server runs as uid {owner}")
            path = names.locate(self._mail_root, account.maildir)
        except MaildirRefused as problem:
            return refusal(problem)
        message = recipient.message
        # A recipient that was just committed has epoch 0: nobody can have tried it, so there is no look for an earlier copy.
        may_repeat = recipient.attempts > 0 or recipient.epoch > 0
        key = names.delivery_key(message.created, message.queue_id, recipient.number)
        return Job(recipient, path, owner, names.render_unique(key, self._hostname), may_repeat)

    # -- small messages ----------------------------------------------------------------------------------------------

    def _deliver_small(self, jobs: dict[int, Job]) -> Deferred[Receipts]:
        contents: dict[str, bytes] = {}
        for job in jobs.values():
            message = job.recipient.message
            if message.inline is None:
                return Deferred.fromCoroutine(self._read_and_deliver(jobs)).addErrback(self._failed, jobs)
            contents[message.queue_id] = message.inline
        return self._batches.perform(jobs, contents).addErrback(self._failed, jobs)

    async def _read_and_deliver(self, jobs: dict[int, Job]) -> Receipts:
        contents: Contents = {
            job.message.queue_id: await self._read_all(job.message)
            for job in {job.message.queue_id: job for job in jobs.values()}.values()
        }
        receipts = {
            at: Receipt(INCOMPLETE, alarm=True)
            for at, job in jobs.items()
            if len(contents[job.message.queue_id]) != job.message.size
        }
        whole = {at: job for at, job in jobs.items() if at not in receipts}
        return {**receipts, **await self._batches.perform(whole, contents)} if whole else receipts

    async def _read_all(self, message: QueuedMessage) -> bytes:
        """The content, or what could be read of it."""
        if message.inline is not None:
            return message.inline
        pieces, have = [], 0
        try:
            while have < message.size and (piece := await self._read(message, have, message.size - have)):
                pieces.append(piece)
                have += len(piece)
        except Exception as problem:
            self._unreadable(message, problem)
        return b"".join(pieces)

    # -- large messages in the form of a Maildir ---------------------------------------------------------------------

    async def _deliver_files(self, jobs: dict[int, Job]) -> Receipts:
        assert self._find_form is not None
        receipts: Receipts = {}
        forms: dict[str, MaildirForm] = {}
        for at, job in jobs.items():
            message = job.message
            if message.queue_id in forms:
                continue
            try:
                form = await self._find_form(message)
            except Unavailable as problem:
                self._unreadable(message, problem)
                form = None
            if form is None:
                receipts[at] = Receipt(INCOMPLETE, alarm=True)
            else:
                forms[message.queue_id] = form
        there = {at: job for at, job in jobs.items() if at not in receipts}
        return {**receipts, **await self._large_thread().submit(write_files, there, forms)}

    # -- large messages: this thread and another in turn -------------------------------------------------------------

    def _deliver_large(self, jobs: dict[int, Job]) -> Deferred[Receipts]:
        streamed: Deferred[Receipts] = self._streams.run(
            lambda: Deferred.fromCoroutine(self._stream_to_all(list(jobs.items())))
        )
        return streamed.addErrback(self._failed, jobs)

    def _large_thread(self) -> Workers:
        if self._large is None:
            self._large = Workers(self._answers, "large-mail", 1, self._make_large_writer, MaildirWriter.close)
        return self._large

    async def _stream_to_all(self, jobs: list[tuple[int, Job]]) -> Receipts:
        thread = self._large_thread()
        receipts: Receipts = {}
        for start in range(0, len(jobs), self._settings.copies):
            copies = LargeMessage()
            try:
                await self._stream(thread, dict(jobs[start : start + self._settings.copies]), copies)
            finally:
                await thread.submit(copies.abandon, Receipt(TRY_AGAIN))
            receipts.update(copies.receipts)
        return receipts

    async def _stream(self, thread: Workers, jobs: dict[int, Job], copies: LargeMessage) -> None:
        message = next(iter(jobs.values())).message
        offset, piece_octets = 0, self._settings.piece_octets
        try:
            piece = await self._read(message, 0, piece_octets)
            await thread.submit(copies.begin, jobs, piece)
            while piece and copies.wanted:
                offset += len(piece)
                ahead = self._read(message, offset, piece_octets)
                try:
                    await thread.submit(copies.write, piece)
                finally:
                    piece = await ahead
        except Unavailable as problem:
            self._unreadable(message, problem)
        if offset == message.size:
            await thread.submit(copies.publish)
        else:
            await thread.submit(copies.abandon, Receipt(INCOMPLETE, alarm=True))

    # -- outcomes ----------------------------------------------------------------------------------------------------

    def _unreadable(self, message: QueuedMessage, problem: BaseException) -> None:
        self.log.failure("the content of {queue_id} cannot be read", Failure(problem), queue_id=message.queue_id)

    def _failed(self, failure: Failure, jobs: dict[int, Job]) -> Receipts:
        self.log.failure("local delivery met something unforeseen", failure)
        return {at: Receipt(TRY_AGAIN, alarm=True) for at in jobs}

    def _unforeseen(self, failure: Failure, recipients: Sequence[QueuedRecipient]) -> list[Outcome]:
        self._failed(failure, {})
        return [self._outcome(recipient, Receipt(TRY_AGAIN, alarm=True)) for recipient in recipients]

    def _outcome(self, recipient: QueuedRecipient, receipt: Receipt) -> Outcome:
        reply = receipt.reply
        if reply.is_positive:
            return Outcome(recipient, _DELIVERED, str(reply), remote="local")
        if receipt.alarm:
            self._alarm(recipient, reply)
        if reply.is_permanent:
            return Outcome(recipient, RecipientState.FAILED, str(reply), remote="local")
        later = self._now() + self._settings.retry_seconds
        return Outcome(recipient, RecipientState.QUEUED, str(reply), next_attempt=later, remote="local")

    def _alarm(self, recipient: QueuedRecipient, reply: Reply) -> None:
        """Once a minute for each fault: a full disk must not fill the log as well."""
        told, now = str(reply), time.monotonic()
        if now - self._alarms.get(told, -_ALARM_SECONDS) >= _ALARM_SECONDS:
            if len(self._alarms) >= _ALARMS:
                self._alarms.clear()
            self._alarms[told] = now
            fields = {"queue_id": recipient.message.queue_id, "recipient": str(recipient.forward_path), "reply": told}
            self._record_event("alarm", fields)


def _tell(result: Any, other: Deferred[None]) -> Any:
    other.callback(None)
    return result
