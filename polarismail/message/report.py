# SPDX-License-Identifier: MIT
"""Delivery status notifications: what became of a message, for people and for programs, as octets.

RFC 6522 (multipart/report), RFC 3464 (message/delivery-status), RFC 3461 §4.3 and §6.2 (what of the original is returned),
RFC 6533 (addresses and messages beyond ASCII), RFC 3834 (Auto-Submitted). The words of remote servers are shown in printable
ASCII: none of them can end a line, begin a field or a part, or be taken for ours.

Guarantees: CRLF line ends; 7-bit unless `allows_8bit` or `smtputf8`; header fields beyond ASCII only with `smtputf8`; no line
over 998 octets but those of the original, and those too only with `allows_8bit`; at most `MAX_RETURNED_OCTETS` of the original.
"""

from __future__ import annotations

import base64
import re
import textwrap
from collections.abc import Sequence

from attrs import frozen

from polarismail.message.headers import field_values, header_section, render_date
from polarismail.values.address import Mailbox
from polarismail.values.xtext import decode_unitext, decode_xtext, embed_beyond_ascii, encode_unitext

MAX_RETURNED_OCTETS = 50_000
FAILED, DELAYED = "failed", "delayed"
DELIVERED, RELAYED, EXPANDED = "delivered", "relayed", "expanded"

_UNSAFE = re.compile(r"[^\x20-\x7e]+")
_UNSAFE_UTF8 = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]+")
_MESSAGE_ID = re.compile(rb"<[\x21-\x3b\x3d\x3f-\x7e]{1,250}>")
_REMOTE_NAME = re.compile(r"[A-Za-z0-9._-]+")
_MAX_LINE_OCTETS = 998


@frozen
class Fate:
    """What became of one recipient.

    `action` is one of those above. `status` is dotted (`5.1.1`). `diagnostic` is the reply, `remote` the host that said it
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
    smtputf8: bool = False


def status_report(
    *,
    hostname: str,
    queue_id: str,
    reverse_path: Mailbox,
    subject: Subject,
    fates: Sequence[Fate],
    now: float,
    allows_8bit: bool = False,
    smtputf8: bool = False,
) -> bytes:
    """A whole message that tells `reverse_path` about `fates`, to be sent with a null reverse-path.

    `queue_id` is that of the report. `allows_8bit`: its way is known to take 8-bit content and long lines as they are; else
    an original that has such is returned as its header section only. `smtputf8`: it is sent as such, because `reverse_path`
    has no other form; then addresses stand as themselves (RFC 6533 §4).
    """
    returned_type, returned, encoding = _returned(subject, allows_8bit or smtputf8, _is_failure(fates))
    text, status = _text(hostname, subject, fates, now, smtputf8), _status(hostname, subject, fates, smtputf8)
    returned_name = "Undelivered message" if _is_failure(fates) else "Header of the message"
    parts = [
        (f"text/plain; charset={'utf-8' if smtputf8 else 'us-ascii'}", "Notification", _encoding(text), text),
        (f"message/{'global-' if smtputf8 else ''}delivery-status", "Delivery report", _encoding(status), status),
        (returned_type, returned_name, encoding, returned),
    ]
    is_8bit = any(encoding == "8bit" for _, _, encoding, _ in parts)
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
    actions = {fate.action for fate in fates}
    title = next(title for action, title in _TITLES if action in actions)
    lines = [
        f"Date: {render_date(now)}",
        f"From: Mail Delivery System <mailer-daemon@{hostname}>",
        # Beyond ASCII only where the report is sent with SMTPUTF8: its sender has no other address.
        f"To: <{_UNSAFE_UTF8.sub('?', str(reverse_path))}>",
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
    return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "replace")


def _text(hostname: str, subject: Subject, fates: Sequence[Fate], now: float, smtputf8: bool) -> bytes:
    """What a person reads."""
    out = [f"This is the mail system at {hostname}.", ""]
    failed = [fate for fate in fates if fate.action == FAILED]
    delayed = [fate for fate in fates if fate.action == DELAYED]
    if failed:
        out += [*_paragraph("Your message could not be delivered to these recipients:"), ""]
        out += [line for fate in failed for line in _person(fate, smtputf8)]
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
        out += [line for fate in delayed for line in _person(fate, smtputf8)]
    for action, words in _SUCCESSES:
        done = [fate for fate in fates if fate.action == action]
        if done:
            out += [*_paragraph(words), "", *(line for fate in done for line in _person(fate, smtputf8))]
    out += _paragraph(
        f"The message arrived here on {render_date(subject.arrived)}. Should you ask your postmaster about it, give this"
        f" queue id: {subject.queue_id}."
    )
    out += _paragraph("What was returned of it is attached.")
    return ("\r\n".join(out) + "\r\n").encode("utf-8", "replace")


def _person(fate: Fate, smtputf8: bool) -> list[str]:
    address = f"<{_shown(fate.original, smtputf8)}>"
    if fate.forward_path != fate.original:
        address += f" (forwarded to <{_shown(fate.forward_path, smtputf8)}>)"
    said = f"While speaking to {_safe(fate.remote)}: " if fate.remote else ""
    why = f"{'The message has expired. Last: ' if fate.expired else ''}{said}{_safe(fate.diagnostic)}"
    return [*_cut(f"  {address}"), *_paragraph(why, "      "), ""]


def _status(hostname: str, subject: Subject, fates: Sequence[Fate], smtputf8: bool) -> bytes:
    """What a program reads: RFC 3464 §2.2 and §2.3. Parameters are shown without the coding that SMTP needs for them."""
    out = []
    if subject.envid:
        out += _field("Original-Envelope-Id", decode_xtext(subject.envid))
    # "dns" is for full names (RFC 3461 §6.3).
    kind = "dns" if "." in hostname and hostname[0] != "[" else "x-local-hostname"
    out += _field("Reporting-MTA", f"{kind}; {hostname}")
    out += _field("Arrival-Date", render_date(subject.arrived))
    out += _field("X-Polarismail-Queue-ID", subject.queue_id)
    for fate in fates:
        out.append("")
        if fate.orcpt:
            # Only what the sender itself had given may stand here (RFC 3464 §2.3.1).
            out += _address_field("Original-Recipient", _original(fate.orcpt, smtputf8))
        out += _address_field("Final-Recipient", _final(fate.forward_path, smtputf8))
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
    return ("\r\n".join(out) + "\r\n").encode("utf-8", "replace")


def _original(orcpt: str, smtputf8: bool) -> str:
    kind, _, address = orcpt.partition(";")
    if kind.lower() != "utf-8":
        return f"{_safe(kind)}; {_safe(decode_xtext(address))}"
    plain = decode_unitext(address)
    return f"{kind}; {_UNSAFE_UTF8.sub('?', plain) if smtputf8 else encode_unitext(plain)}"


def _final(mailbox: Mailbox, smtputf8: bool) -> str:
    if mailbox.local.isascii():
        return f"rfc822; {_safe(str(mailbox.in_ascii))}"
    text = str(mailbox)
    return f"utf-8; {_UNSAFE_UTF8.sub('?', text) if smtputf8 else encode_unitext(text)}"


def _returned(subject: Subject, allows_8bit: bool, is_failure: bool) -> tuple[str, bytes, str]:
    """The media type, the octets and the encoding of what goes back of the original: of what did not fail the header section
    alone (RFC 3461 §4.3). A header section beyond ASCII is `global`, and encoded for who may not take it (RFC 6533 §4.5)."""
    head = subject.head
    section = header_section(head)
    is_global = subject.smtputf8 and not section.isascii()
    is_whole = subject.size <= MAX_RETURNED_OCTETS and len(head) >= subject.size and not subject.headers_only
    if is_whole and is_failure and (allows_8bit or is_global or _is_plain(head)):
        if is_global and not allows_8bit:
            return "message/global", _base64(head), "base64"
        return "message/global" if is_global else "message/rfc822", head, _encoding(head)
    if len(section) > MAX_RETURNED_OCTETS:
        cut = section.rfind(b"\r\n", 0, MAX_RETURNED_OCTETS)
        section = section[: cut + 2] if cut >= 0 else b""
    if is_global:
        return (
            ("message/global-headers", section, _encoding(section))
            if allows_8bit
            else ("message/global-headers", _base64(section), "base64")
        )
    if not allows_8bit and not _is_plain(section):
        text = section.decode("ascii", "replace").replace("\ufffd", "?")
        section = "\r\n".join(line[:_MAX_LINE_OCTETS] for line in text.split("\r\n")).encode("ascii")
    return "text/rfc822-headers", section, _encoding(section)


# -- lines -----------------------------------------------------------------------------------------------------------------


_TITLES = (
    (FAILED, "Undelivered mail returned to sender"),
    (DELAYED, "Delayed mail, which is still being tried"),
    (DELIVERED, "Delivered mail"),
    (RELAYED, "Mail passed on"),
    (EXPANDED, "Mail for several recipients"),
)
_SUCCESSES = (
    (DELIVERED, "Your message was delivered to these recipients:"),
    (RELAYED, "Your message was passed on to systems that do not report what they deliver, for these recipients:"),
    (EXPANDED, "These addresses stand for several recipients; your message goes on to each of them:"),
)


def _safe(text: str) -> str:
    """Printable ASCII; what is not becomes "?", a run of it one "?"."""
    return _UNSAFE.sub("?", text)


def _shown(mailbox: Mailbox, smtputf8: bool) -> str:
    """An address for people."""
    return _UNSAFE_UTF8.sub("?", str(mailbox)) if smtputf8 else _safe(embed_beyond_ascii(str(mailbox)))


def _encoding(octets: bytes) -> str:
    return "7bit" if octets.isascii() else "8bit"


def _base64(octets: bytes) -> bytes:
    return base64.encodebytes(octets).replace(b"\n", b"\r\n")


def _address_field(name: str, value: str) -> list[str]:
    """One field, folded; its value is fit already."""
    return _fold(f"{name}: {value}")


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
