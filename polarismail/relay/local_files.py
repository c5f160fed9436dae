# SPDX-License-Identifier: MIT
"""Large messages that lie in the spool as a Maildir keeps them, on their way into maildrops: runs on the large mail's thread.

What is judged here is judged on the file itself: that it is whole, that its front is the one which this recipient gets, that
the message has not been in this mailbox before.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from polarismail.message.headers import MAX_SECTION_OCTETS
from polarismail.message.trace import delivery_fields
from polarismail.relay.local_writing import Job, Jobs, Receipts, loops
from polarismail.store.interfaces import MaildirForm
from polarismail.store.maildir_delivery import Receipt, to_disk
from polarismail.store.maildir_files import FileDelivery, FileWriter
from polarismail.values.reply import HAS_BEEN_HERE, Reply

INCOMPLETE = Reply(451, (4, 3, 0), "The queued message cannot be read in full, try again later")

_FIRST_OCTETS = 4096


def write_files(writer: FileWriter, jobs: Jobs, forms: Mapping[str, MaildirForm]) -> Receipts:
    """Deliver these, with one sync where one will do. `forms` by queue id."""
    receipts: Receipts = {}
    heads: dict[str, bytes | None] = {}
    wanted: dict[int, FileDelivery] = {}
    for at, job in jobs.items():
        queue_id = job.message.queue_id
        form = forms[queue_id]
        if queue_id not in heads:
            heads[queue_id] = _read_head(form)
        head = heads[queue_id]
        if head is None:
            receipts[at] = Receipt(INCOMPLETE, alarm=True)
        elif loops(job.recipient, _header_section(head, form.front_octets)):
            receipts[at] = Receipt(HAS_BEEN_HERE)
        else:
            wanted[at] = _delivery(job, form, head)
    receipts.update(zip(wanted, writer.deliver_files(list(wanted.values())), strict=True))
    return receipts


def _delivery(job: Job, form: MaildirForm, head: bytes) -> FileDelivery:
    message = job.message
    fields = delivery_fields(message.reverse_path, job.recipient.forward_path)
    front = to_disk(fields + form.trace)
    is_ours = form.front_octets == len(front.disk) and head.startswith(front.disk)
    return FileDelivery(
        job.maildir,
        job.owner,
        job.unique,
        front,
        form,
        len(fields) + message.size,
        may_link=is_ours and message.recipient_count == 1,
        may_repeat=job.may_repeat,
    )


def _read_head(form: MaildirForm) -> bytes | None:
    """The front and the header section, as far as it is looked at; None where the file is not what was written."""
    try:
        descriptor = os.open(form.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_size != form.octets:
                return None
            head = os.pread(descriptor, form.front_octets + _FIRST_OCTETS, 0)
            if head.find(b"\n\n", form.front_octets) < 0:
                head = os.pread(descriptor, form.front_octets + MAX_SECTION_OCTETS, 0)
            return head
        finally:
            os.close(descriptor)
    except OSError:
        return None


def _header_section(head: bytes, front_octets: int) -> bytes:
    """With CRLF line ends, without the front; empty where no field in it says whose mail this was."""
    end = head.find(b"\n\n", front_octets)
    section = head[front_octets : end + 1 if end >= 0 else len(head)]
    return section.replace(b"\n", b"\r\n") if b"delivered-to" in section.lower() else b""
