# SPDX-License-Identifier: MIT
"""The promises of the store: what the rooms above it may rely on, whatever is underneath.

Everything asynchronous returns a Deferred that fires on the reactor thread. A database that cannot answer fails with
`polarismail.values.errors.Unavailable`, never with "not found".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from attrs import field, frozen
from twisted.internet.defer import Deferred
from zope.interface import Attribute, Interface

from polarismail.values.address import Mailbox
from polarismail.values.envelope import (
    NO_DSN_REQUEST,
    NO_OPTIONS,
    DsnRequest,
    Envelope,
    MailOptions,
    RecipientState,
    ReversePath,
    SessionFacts,
)
from polarismail.values.reply import Reply


@frozen
class QueuedMessage:
    """A message on stable storage. `size` counts the octets of trace fields and content, as `read` gives them."""

    queue_id: str
    reverse_path: ReversePath
    created: float  # seconds since 1970
    size: int
    account_id: int | None = None
    ret: str | None = None
    envid: str | None = None
    body: str | None = None
    smtputf8: bool = False
    inline: bytes | None = field(default=None, repr=False)
    """All octets (trace + content, CRLF line ends), where they are at hand: a small message just accepted. Else None."""
    recipient_count: int = 0  # at the time of accepting; for the store's own use, as is `storage`
    storage: int = 0
    options: MailOptions = NO_OPTIONS

    @property
    def released(self) -> float:
        """When it could first be delivered."""
        return max(self.created, self.options.hold_until)


@frozen
class MaildirForm:
    """A large content that lies on disk as a Maildir keeps it: LF line ends, and perhaps a front (our fields, and the trace
    fields) for one recipient. With that front the file may become the Maildir's file as it is, by a link.

    `path` is the file's, `octets` its length, `front_octets` how much of it is front; `trace` has CRLF line ends.
    """

    path: str
    octets: int
    front_octets: int
    trace: bytes = field(repr=False)


Front = Callable[[str], tuple[bytes, bytes]]
"""From the queue id to our own fields and the trace fields, CRLF line ends: what a content begins with in a Maildir."""


@frozen
class QueuedRecipient:
    """One recipient that this process owns: nobody else works on it until `record` or `release`.

    `epoch` is the fencing token: a change is refused when somebody else has taken the recipient over since.
    """

    message: QueuedMessage
    number: int  # from 0, within the message
    forward_path: Mailbox
    original: Mailbox
    next_hop: str  # envelope.LOCAL or the domain that routing starts from
    account_id: int | None
    attempts: int  # finished ones
    next_attempt: float
    expires: float
    epoch: int
    dsn: DsnRequest = NO_DSN_REQUEST
    last_reply: str = ""
    warned: bool = False  # a delay DSN has gone out


@frozen
class Outcome:
    """What became of one attempt. `state` is final, or QUEUED for a deferral (then `next_attempt` says when)."""

    recipient: QueuedRecipient
    state: RecipientState
    reply: str  # `str(Reply)` of what the next hop said, or of what we say in its place
    next_attempt: float = 0.0
    remote: str = ""  # "mx.example.org[192.0.2.1]:25", "local", ""
    warned: bool = False  # a delay DSN is among the reports
    passed_dsn: bool = False  # RELAYED, and the next hop answers for what NOTIFY asks


@frozen
class Committed:
    """The message is on stable storage, and its recipients belong to this process; those of a message that is held for the
    future belong to nobody, and are not among `recipients`."""

    message: QueuedMessage
    recipients: tuple[QueuedRecipient, ...]


@frozen
class Refused:
    """An effect refused the message; nothing of it is stored."""

    reply: Reply


# Runs in the accept transaction on the committer's thread, with the SQLAlchemy connection and the message's number.
# Returns None, or the reply that refuses this message alone (the rest of its group commits). It is called again where the
# group was rolled back because of another message: what it does beside the database must bear that.
Effect = Callable[[Any, int], Reply | None]


class IDraft(Interface):
    """Content that is being received; dropped, with all its octets, unless committed."""

    queue_id = Attribute("str: the name the message will have")
    size = Attribute("int: octets written so far")
    trace = Attribute(
        "bytes: trace fields that are on disk with the content already; commit it with these. Else empty."
    )

    def write(octets: bytes) -> Deferred[None] | None:
        """Append. None means go on; a Deferred means wait for it (the spill to disk is behind). Memory stays under
        256 KB whatever is written. Fails with SpoolUnhealthy."""

    def head(octets: int) -> bytes:
        """The first `octets` octets, at most 64 KB: for looking at the header section."""

    def abandon() -> None:
        """Forget it. Idempotent; legal at any time before commit."""


@frozen
class Submission:
    """A draft and all that belongs to it: one message to be committed."""

    draft: Any  # IDraft
    envelope: Envelope
    facts: SessionFacts
    trace: bytes  # trace fields, ready, CRLF line ends; prepended to the content on reading
    effects: Sequence[Effect] = ()
    expires_seconds: float | None = None  # life in the queue; None: the spool's setting
    about: str = ""  # a DSN's: the queue id of the message that it reports on


class ISpool(Interface):
    """Accepted mail until every recipient is done."""

    def draft(front: Front | None = None) -> IDraft:
        """A new draft. Raises SpoolFull, SpoolUnhealthy.

        `front`: every recipient is a maildrop, and each CR and LF to be written is part of a CRLF. A large content is then
        kept in the form that a Maildir has, behind this front, which is asked for once, or behind none where it is empty.
        """

    def commit(submission: Submission) -> Deferred[Committed | Refused]:
        """Put it on stable storage. Once this fires with Committed, a power cut cannot undo it. A failure means that the
        outcome is in doubt: answer 451 and close."""

    def claim(now: float, limit: int, longest_wait_seconds: float | None = None) -> Deferred[list[QueuedRecipient]]:
        """Due recipients (QUEUED, next_attempt <= now, owned by nobody alive), oldest due first; they are ours now.

        Nobody waits longer than `longest_wait_seconds`: where the clock was put back, what was to wait for hours or years
        of the old time is due now (HOSTILE E5). What its sender wants to be held waits until then all the same."""

    def next_due() -> Deferred[float | None]:
        """When the next unclaimed recipient is due, in seconds since 1970; None when none waits."""

    def record(outcomes: Sequence[Outcome], reports: Sequence[Submission] = ()) -> Deferred[list[Committed]]:
        """Write outcomes, and commit the DSNs that follow from them, in one transaction. An outcome whose epoch is stale
        (or whose recipient the operator has deleted) changes nothing, and a report none of whose message's outcomes
        (`about`) counted is not committed. A recipient that is on hold takes a final outcome; a deferral leaves it on hold.
        Fires with the committed reports. Idempotent: after a failure, the same call may be repeated."""

    def release(recipients: Sequence[QueuedRecipient]) -> Deferred[None]:
        """Give recipients back untried: they are due again at once, for anybody."""

    def hand_over(recipients: Sequence[QueuedRecipient], to: int) -> Deferred[list[QueuedRecipient]]:
        """Make these the incarnation `to`'s. Fires with those that were still ours, as their new owner has them (their epochs
        have gone up): it must be told of them, or find them by `owned`."""

    def owned() -> Deferred[list[tuple[str, int, int]]]:
        """Every queued recipient that this process owns, known to it or not: (queue id, number, epoch). For after a fault:
        it looks through the whole queue."""

    def release_keys(keys: Sequence[tuple[str, int, int]]) -> Deferred[None]:
        """Like `release`, for recipients that only `owned` knows."""

    def read(message: QueuedMessage, offset: int, octets: int) -> Deferred[bytes]:
        """Octets of trace + content from `offset`, fewer at the end, b"" behind it."""

    def maildir_form(message: QueuedMessage) -> Deferred[MaildirForm | None]:
        """The content as a Maildir keeps it; None where it is kept otherwise. Fails with Unavailable."""


@frozen
class Account:
    """One mailbox of ours. `maildir` is data, chosen when the account was made; never computed from what a client sends."""

    id: int
    address: Mailbox
    maildir: str  # absolute, or relative to the configured mail root
    uid: int | None
    gid: int | None
    password_hash: str = field(repr=False)
    active: bool = True


@frozen
class Target:
    """Where one address leads in the end: a maildrop (`account`), or a foreign address (`account` None)."""

    mailbox: Mailbox
    account: Account | None = None


@frozen
class Resolution:
    """What an address means here.

    `ours`: its domain is ours. `targets` is empty for a foreign domain, and for an unknown user of ours.
    """

    ours: bool
    targets: tuple[Target, ...] = ()


class IDirectory(Interface):
    """Domains, accounts and aliases, behind a bounded cache."""

    generation = Attribute("int: goes up with each change of any account, alias or domain; -1 while it is not known")

    def resolve(mailbox: Mailbox) -> Resolution | Deferred[Resolution]:
        """What the address means: exact account, alias (expanded, loops cut, 100 targets at most), the account without
        its +detail, catch-all. From the cache at once where possible. Fails with Unavailable."""

    def find_account(name: str) -> Deferred[Account | None]:
        """The active account with this login name (its address, case-folded domain and local part). Fails with
        Unavailable."""

    def account_by_id(account_id: int) -> Account | Deferred[Account | None] | None:
        """The account, cached. Fails with Unavailable."""
