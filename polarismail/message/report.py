# SPDX-License-Identifier: MIT
"""Delivery status notifications: what became of a message, for people and for programs, as octets.

RFC 6522 (multipart/report), RFC 3464 (message/delivery-status), RFC 3461 §6.2 (what of the original is returned),
RFC 3834 (Auto-Submitted). The words of remote servers are shown in printable ASCII: none of them can end a line, begin a
field or a part, or be taken for ours.

Guarantees: CRLF line ends; 7-bit unless `allows_8bit`; no line over 998 octets but those of the original, and those too
only with `allows_8bit`; at most `MAX_RETURNED_OCTETS` of the original.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from attrs import frozen

from polarismail.message.headers import field_values, header_section, render_date
from polarismail.values.address import Mailbox

MAX_RETURNED_OCTETS = 50_000
FAILED, DELAYED = "failed", "delayed"

_UNSAFE = re.compile(r"[^\x20-\x7e]+")
_MESSAGE_ID = re.compile(rb"<[\x21-\x3b\x3d\x3f-\x7e]{1,250}>")
_REMOTE_NAME = re.compile(r"[A-Za-z0-9._-]+")
_MAX_LINE_OCTETS = 998


@frozen
class Fate:
    """What became of one recipient.

    `action` is FAILED or DELAYED. `status` is dotted (`5.1.1`). `diagnostic` is the reply, `remote` the host that said it
    (`mx.example.org[192.0.2.1]:25`), "" where it was us. `orcpt` is RFC 3461's, verbatim.
    """

    forward_path: Mailbox
    original: Mailbox
    action: str
    status: str
    diagnostic: str
    remote: str = ""
    orcpt: str | None = None
    last_attempt: float | None = None
    retry_until: float | None = None  # of a delay
    expired: bool = False


@frozen
class Subject:
    """The message that the report is about. `head` is its beginning, `MAX_RETURNED_OCTETS` at least if it is as long."""

    queue_id: str
    arrived: float
    size: int
    head: bytes
    headers_only: bool = False  # RET=HDRS
    envid: str | None = None


def failure_report(
    *,
    hostname: str,
    queue_id: str,
    reverse_path: Mailbox,
    subject: Subject,
    fates: Sequence[Fate],
    now: float,
    allows_8bit: bool = False,
) -> bytes:
    """A whole message that tells `reverse_path` about `fates`, to be sent with a null reverse-path.

    `queue_id` is that of the report. `allows_8bit`: its way is known to take 8-bit content and long lines as they are; else
    an original that has such is returned as its header section only.
    """
    returned_type, returned = _returned(subject, allows_8bit)
    is_8bit = not returned.isascii()
    parts = [
        ("text/plain; charset=us-ascii", "Notification", "7bit", _text(hostname, subject, fates, now)),
        ("message/delivery-status", "Delivery report", "7bit", _status(hostname, subject, fates)),
        (returned_type, "Undelivered message", "8bit" if is_8bit else "7bit", returned),
    ]
    boundary = f"=_{queue_id}"
    while any(b"--" + boundary.encode() in body for *_, body in parts):
        boundary += "_"
    out = [_head(hostname, queue_id, reverse_path, subject, fates, now, boundary, is_8bit)]
    for kind, description, encoding, body in parts:
        head = (
            f"Content-Type: {kind}\r\nContent-Description: {description}\r\nContent-Transfer-Encoding: {encoding}\r\n"
        )
        out.append(f"--{boundary}\r\n{head}\r\n".encode("ascii"))
        out.append(body if body.endswith(b"\r\n") else body + b"\r\n")
        out.append(b"\r\n")
    out.append(f"--{boundary}--\r\n".encode("ascii"))
    return b"".join(out)


# -- parts -----------------------------------------------------------------------------------------------------------------


def _head(
    hostname: str,
    queue_id: str,
    reverse_path: Mailbox,
    subject: Subject,
    fates: Sequence[Fate],
    now: float,
    boundary: str,
    is_8bit: bool,
) -> bytes:
    title = "Undelivered mail returned to sender" if _is_failure(fates) else "Delayed mail, which is still being tried"
    lines = [
        f"Date: {render_date(now)}",
        f"From: Mail Delivery System <mailer-daemon@{hostname}>",
        f"To: <{_safe(str(reverse_path))}>",
        f"Subject: {title}",
        f"Message-ID: <{queue_id}@{hostname}>",
    ]
    about = [value for value in field_values(subject.head, b"Message-ID")[:1] if _MESSAGE_ID.fullmatch(value)]
    if about:
        lines += [f"In-Reply-To: {about[0].decode('ascii')}", f"References: {about[0].decode('ascii')}"]
    lines += [
        "Auto-Submitted: auto-replied",
        "MIME-Version: 1.0",
        f'Content-Type: multipart/report; report-type=delivery-status;\r\n\tboundary="{boundary}"',
        f"Content-Transfer-Encoding: {'8bit' if is_8bit else '7bit'}",
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


def _text(hostname: str, subject: Subject, fates: Sequence[Fate], now: float) -> bytes:
    """What a person reads."""
    out = [f"This is the mail system at {hostname}.", ""]
    failed = [fate for fate in fates if fate.action == FAILED]
    delayed = [fate for fate in fates if fate.action != FAILED]
    if failed:
        out += [*_paragraph("Your message could not be delivered to these recipients:"), ""]
        out += [line for fate in failed for line in _person(fate)]
        if any(fate.expired for fate in failed):
            days = _duration(max(0.0, now - subject.arrived))
            out += _paragraph(
                f"Where it says that the message has expired, delivery was tried again and again for {days}, without"
                " success. It will not be tried any more."
            )
            out.append("")
    if delayed:
        out += _paragraph(
            "Your message has not been delivered to these recipients yet. It will be tried further; you need not send"
            " it again."
        )
        out.append("")
        out += [line for fate in delayed for line in _person(fate)]
    out += _paragraph(
        f"The message arrived here on {render_date(subject.arrived)}. Should you ask your postmaster about it, give this"
        f" queue id: {subject.queue_id}."
    )
    out += _paragraph("What was returned of it is attached.")
    return ("\r\n".join(out) + "\r\n").encode("ascii")


def _person(fate: Fate) -> list[str]:
    address = f"<{_safe(str(fate.original))}>"
    if fate.forward_path != fate.original:
        address += f" (forwarded to <{_safe(str(fate.forward_path))}>)"
    said = f"While speaking to {_safe(fate.remote)}: " if fate.remote else ""
    why = f"{'The message has expired. Last: ' if fate.expired else ''}{said}{_safe(fate.diagnostic)}"
    return [*_cut(f"  {address}"), *_paragraph(why, "      "), ""]


def _status(hostname: str, subject: Subject, fates: Sequence[Fate]) -> bytes:
    """What a program reads: RFC 3464 §2.2 and §2.3."""
    out = []
    if subject.envid:
        out += _field("Original-Envelope-Id", subject.envid)
    out += _field("Reporting-MTA", f"dns; {hostname}")
    out += _field("Arrival-Date", render_date(subject.arrived))
    out += _field("X-Polarismail-Queue-ID", subject.queue_id)
    for fate in fates:
        out.append("")
        if fate.orcpt:
            # Only what the sender itself had given may stand here (RFC 3464 §2.3.1).
            kind, _, address = fate.orcpt.partition(";")
            out += _field("Original-Recipient", f"{kind}; {address}")
        out += _field("Final-Recipient", f"rfc822; {fate.forward_path}")
        out += _field("Action", fate.action)
        out += _field("Status", fate.status)
        name = _REMOTE_NAME.match(fate.remote)
        if name:
            out += _field("Remote-MTA", f"dns; {name[0]}")
        out += _field("Diagnostic-Code", f"{'smtp' if name else 'x-polarismail'}; {fate.diagnostic}")
        if fate.last_attempt is not None:
            out += _field("Last-Attempt-Date", render_date(fate.last_attempt))
        if fate.retry_until is not None and fate.action == DELAYED:
            out += _field("Will-Retry-Until", render_date(fate.retry_until))
    return ("\r\n".join(out) + "\r\n").encode("ascii")


def _returned(subject: Subject, allows_8bit: bool) -> tuple[str, bytes]:
    """The media type and the octets of what goes back of the original."""
    head = subject.head
    is_whole = subject.size <= MAX_RETURNED_OCTETS and len(head) >= subject.size and not subject.headers_only
    if is_whole and (allows_8bit or _is_plain(head)):
        return "message/rfc822", head
    section = header_section(head)
    if len(section) > MAX_RETURNED_OCTETS:
        cut = section.rfind(b"\r\n", 0, MAX_RETURNED_OCTETS)
        section = section[: cut + 2] if cut >= 0 else b""
    if not allows_8bit and not _is_plain(section):
        text = section.decode("ascii", "replace").replace("\ufffd", "?")
        section = "\r\n".join(line[:_MAX_LINE_OCTETS] for line in text.split("\r\n")).encode("ascii")
    return "text/rfc822-headers", section


# -- lines -----------------------------------------------------------------------------------------------------------------


def _safe(text: str) -> str:
    """Printable ASCII; what is not becomes "?", a run of it one "?"."""
    return _UNSAFE.sub("?", text)


def _field(name: str, value: str) -> list[str]:
    """One field, folded; its value in printable ASCII."""
    return _fold(f"{name}: {_safe(value)}")


def _fold(line: str) -> list[str]:
    folded = textwrap.wrap(line, 76, subsequent_indent="\t", break_long_words=False, break_on_hyphens=False)
    return [piece for long in folded for piece in _cut(long, "\t")]


def _paragraph(text: str, indent: str = "") -> list[str]:
    wrapped = textwrap.wrap(text, 72, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return wrapped or [indent]


def _cut(line: str, indent: str = "") -> list[str]:
    """A line that is no longer than RFC 5322 §2.1.1 allows, wherever it must be cut."""
    pieces = [line[:_MAX_LINE_OCTETS]]
    width = _MAX_LINE_OCTETS - len(indent)
    pieces += [indent + line[at : at + width] for at in range(_MAX_LINE_OCTETS, len(line), width)]
    return pieces


def _is_plain(octets: bytes) -> bool:
    """Whether any next hop takes it as it is: 7-bit, lines within bounds."""
    return octets.isascii() and max(map(len, octets.split(b"\r\n"))) <= _MAX_LINE_OCTETS


def _is_failure(fates: Sequence[Fate]) -> bool:
    return any(fate.action == FAILED for fate in fates)


def _duration(seconds: float) -> str:
    for size, name in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size * 1.5:
            return f"{round(seconds / size)} {name}s"
    return "a while"
