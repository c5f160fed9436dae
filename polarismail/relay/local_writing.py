# SPDX-License-Identifier: MIT
"""The disk's side of local delivery: what runs on its two threads, and nothing else.

The batch thread takes whatever waits, writes it as one batch, and wakes the reactor once. The stream's functions write
several copies of one large message side by side; what fails for one copy fails for that one only.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from attrs import frozen
from twisted.internet.defer import Deferred

from polarismail.message.headers import has_field
from polarismail.message.inspection import has_been_in
from polarismail.message.trace import delivery_fields
from polarismail.store.interfaces import QueuedMessage, QueuedRecipient
from polarismail.store.maildir import MaildirRefused
from polarismail.store.maildir_delivery import Delivery, DiskContent, Draft, MaildirWriter, Receipt, refusal, to_disk
from polarismail.store.threads import Answers
from polarismail.values.address import Mailbox
from polarismail.values.envelope import ReversePath
from polarismail.values.reply import HAS_BEEN_HERE


@frozen
class Job:
    """One recipient whose mailbox is known. `unique` is the file's name without sizes."""

    recipient: QueuedRecipient
    maildir: str
    owner: int
    unique: str
    may_repeat: bool

    @property
    def message(self) -> QueuedMessage:
        return self.recipient.message


Jobs = Mapping[int, Job]  # by their place in the caller's list
Receipts = dict[int, Receipt]
Contents = Mapping[str, bytes]  # by queue id


@lru_cache(maxsize=1024)
def _own_fields_on_disk(reverse_path: ReversePath, forward_path: Mailbox) -> DiskContent:
    return to_disk(delivery_fields(reverse_path, forward_path))


def loops(recipient: QueuedRecipient, head: bytes) -> bool:
    """Whether the message says that it has been in this mailbox before (HOSTILE 5)."""
    return has_field(head, b"delivered-to") and has_been_in(head, recipient.forward_path)


def write_small(writer: MaildirWriter, jobs: list[Job], contents: Contents) -> list[Receipt]:
    """Write a batch of small messages; receipts in the order of `jobs`."""
    # What is the same for all recipients of a message is found out once.
    known: dict[str, tuple[DiskContent, bool]] = {}
    receipts: list[Receipt | None] = []
    deliveries = []
    for job in jobs:
        message = job.recipient.message
        queue_id = message.queue_id
        shared = known.get(queue_id)
        if shared is None:
            octets = contents[queue_id]
            shared = known[queue_id] = to_disk(octets), has_field(octets, b"delivered-to")
        content, may_loop = shared
        if may_loop and has_been_in(contents[queue_id], job.recipient.forward_path):
            receipts.append(Receipt(HAS_BEEN_HERE))
            continue
        head = _own_fields_on_disk(message.reverse_path, job.recipient.forward_path)
        deliveries.append(Delivery(job.maildir, job.owner, job.unique, head, content, job.may_repeat))
        receipts.append(None)
    written = iter(writer.deliver(deliveries))
    return [receipt or next(written) for receipt in receipts]


class BatchThread:
    """One thread that writes small messages, up to `limit` a batch. It starts with the first of them.

    `writer` is closed at the end.
    """

    def __init__(self, answers: Answers, writer: MaildirWriter, limit: int) -> None:
        self._answers, self._writer, self._limit = answers, writer, limit
        self._waiting: queue.SimpleQueue[tuple[Jobs, Contents, Deferred[Receipts]] | Deferred[None]] = (
            queue.SimpleQueue()
        )
        self._thread: threading.Thread | None = None

    def perform(self, jobs: Jobs, contents: Contents) -> Deferred[Receipts]:
        """Write these, together with others that wait."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="local-mail", daemon=True)
            self._thread.start()
        done: Deferred[Receipts] = Deferred()
        self._waiting.put((jobs, contents, done))
        return done

    def stop(self) -> Deferred[None]:
        """Fires when everything that was given before is done."""
        done: Deferred[None] = Deferred()
        if self._thread is None:
            done.callback(None)
        else:
            self._waiting.put(done)
        return done

    def _run(self) -> None:
        ending: Deferred[None] | None = None
        while ending is None:
            group, ending = self._take()
            if group:
                self._perform(group)
            # Or the last batch would stay in memory until the next one comes.
            del group
        self._writer.close()
        self._answers.put([(ending, None, None)])

    def _take(self) -> tuple[list[tuple[Jobs, Contents, Deferred[Receipts]]], Deferred[None] | None]:
        group: list[tuple[Jobs, Contents, Deferred[Receipts]]] = []
        size = 0
        item = self._waiting.get()
        while not isinstance(item, Deferred):
            group.append(item)
            size += len(item[0])
            if size >= self._limit:
                return group, None
            try:
                item = self._waiting.get_nowait()
            except queue.Empty:
                return group, None
        return group, item

    def _perform(self, group: list[tuple[Jobs, Contents, Deferred[Receipts]]]) -> None:
        contents: dict[str, bytes] = {}
        for _, more, _ in group:
            contents.update(more)
        jobs = [job for some, _, _ in group for job in some.values()]
        try:
            receipts = iter(write_small(self._writer, jobs, contents))
        except Exception as problem:
            self._answers.put([(done, None, problem) for _, _, done in group])
        else:
            self._answers.put([(done, {at: next(receipts) for at in some}, None) for some, _, done in group])


class LargeMessage:
    """Copies of one large message for several maildirs, written side by side. Its methods run on the thread of `writer`."""

    def __init__(self) -> None:
        self._drafts: dict[int, Draft] = {}
        self.receipts: Receipts = {}

    @property
    def wanted(self) -> bool:
        """Whether any copy still wants octets."""
        return bool(self._drafts)

    def begin(self, writer: MaildirWriter, jobs: Jobs, head: bytes) -> None:
        """Open a draft for each mailbox that the message has not been in; `head` is its first piece."""
        for at, job in jobs.items():
            if loops(job.recipient, head):
                self.receipts[at] = Receipt(HAS_BEEN_HERE)
                continue
            fields = delivery_fields(job.message.reverse_path, job.recipient.forward_path)
            try:
                self._drafts[at] = writer.open_draft(
                    job.maildir, job.owner, job.unique, fields, may_repeat=job.may_repeat
                )
            except (OSError, MaildirRefused) as problem:
                self.receipts[at] = refusal(problem)

    def write(self, writer: MaildirWriter, piece: bytes) -> None:
        """Append a piece to each copy."""
        for at, draft in list(self._drafts.items()):
            self._attempt(draft.write, at, piece)

    def publish(self, writer: MaildirWriter) -> None:
        """All octets are there: give the copies their names, durably."""
        for at, draft in list(self._drafts.items()):
            self._attempt(draft.finish, at)
        drafts, self._drafts = self._drafts, {}
        self.receipts.update(zip(drafts, writer.publish(list(drafts.values())), strict=True))

    def abandon(self, writer: MaildirWriter, receipt: Receipt) -> None:
        """Remove what is not published; those copies get this receipt."""
        for at in list(self._drafts):
            self._drop(at, receipt)

    def _attempt(self, function: Callable[..., None], at: int, *args: Any) -> None:
        try:
            function(*args)
        except OSError as problem:
            self._drop(at, refusal(problem))

    def _drop(self, at: int, receipt: Receipt) -> None:
        self.receipts[at] = receipt
        draft = self._drafts.pop(at)
        try:
            draft.abandon()
        except OSError:
            return  # close() of a file that is thrown away: the receipt says already that it is not delivered
