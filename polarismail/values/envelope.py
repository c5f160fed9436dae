# SPDX-License-Identifier: MIT
"""The envelope: reverse-path, recipients, DSN parameters, and the queue id that names a message in every log line.

RFC 5321 §2.3.1; RFC 3461 (NOTIFY, RET, ENVID, ORCPT are kept verbatim).
"""

from __future__ import annotations

import enum

from attrs import frozen

from polarismail.values.address import Mailbox

# The null reverse-path `<>` of DSNs is None (RFC 5321 §4.5.5).
ReversePath = Mailbox | None

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's: no i, l, o, u; sorts as the numbers do
_PAIRS = [first + second for first in _ALPHABET for second in _ALPHABET]
_VALUES = {letter: at for at, letter in enumerate(_ALPHABET)}
QUEUE_ID_LENGTH = 13
# Milliseconds are counted from 2025-01-01T00:00:00Z, so that 40 bits last until 2059.
QUEUE_ID_EPOCH_SECONDS = 1735689600
LOCAL = "local"
"""The next hop of recipients whose maildrop is ours."""
EXPANSION = "(expansion)"
"""The next hop of an alias itself, where its sender is to hear that it led to several others (RFC 3461 §5.2.7.3). No domain
has brackets."""


def render_queue_id(number: int) -> str:
    """63 bits as 13 letters and digits whose order is the order of the numbers."""
    pairs = _PAIRS
    return (
        _ALPHABET[number >> 60 & 31]
        + pairs[number >> 50 & 1023]
        + pairs[number >> 40 & 1023]
        + pairs[number >> 30 & 1023]
        + pairs[number >> 20 & 1023]
        + pairs[number >> 10 & 1023]
        + pairs[number & 1023]
    )


def parse_queue_id(text: str) -> int:
    """The number behind a queue id. Raises ValueError with a text for people."""
    if len(text) != QUEUE_ID_LENGTH or not set(text.lower()) <= _VALUES.keys():
        raise ValueError(f"{text!r} is no queue id: they have {QUEUE_ID_LENGTH} letters and digits")
    number = 0
    for letter in text.lower():
        number = number << 5 | _VALUES[letter]
    return number


class QueueIds:
    """Names for messages: ordered by time, unique over processes and machines, never reused.

    `incarnation` is counted up durably by the database at each start of a process (it wraps at 2**15); the clock is
    an argument and may jump back: numbers of one generator ascend all the same.
    40 bits of milliseconds, 15 of incarnation, 8 of a counter: 256,000 messages a second for each process.
    """

    def __init__(self, incarnation: int) -> None:
        self._node = (incarnation & 0x7FFF) << 8
        self._last_tick = -1
        self._counter = 0

    def next(self, now: float) -> str:
        """A fresh queue id; `now` is seconds since 1970."""
        tick = int((now - QUEUE_ID_EPOCH_SECONDS) * 1000)
        if tick > self._last_tick:
            self._last_tick, self._counter = tick, 0
        elif self._counter == 255:
            self._last_tick, self._counter = self._last_tick + 1, 0
        else:
            self._counter += 1
        return render_queue_id((self._last_tick & 0xFFFFFFFFFF) << 23 | self._node | self._counter)


_FIRST_FINAL = 10


class RecipientState(enum.IntEnum):
    """Where one recipient of a spooled message stands. Numbers are the database's: never renumber.

    QUEUED -> DELIVERED | RELAYED | EXPANDED | FAILED | EXPIRED;  QUEUED <-> HELD;  QUEUED | HELD -> DELETED.
    All but QUEUED and HELD are final; a message all of whose recipients are final leaves the spool.
    """

    QUEUED = 0
    HELD = 1
    DELIVERED = 10
    RELAYED = 11
    EXPANDED = 12
    FAILED = 20
    EXPIRED = 21
    DELETED = 30

    @property
    def is_final(self) -> bool:
        """True when nothing more will happen for this recipient."""
        return self >= _FIRST_FINAL


@frozen
class DsnRequest:
    """What the sender asked about one recipient (RFC 3461 §4.1, §4.2): verbatim, None where not given."""

    notify: str | None = None
    orcpt: str | None = None

    def wants(self, word: str) -> bool:
        """Whether a report of this kind is asked for: SUCCESS, FAILURE or DELAY. Without NOTIFY: the last two."""
        if self.notify is None:
            return word != "SUCCESS"
        return word in self.notify.upper().split(",")


NO_DSN_REQUEST = DsnRequest()


@frozen
class MailOptions:
    """What else was granted to a message; nearly all share NO_OPTIONS. Times are seconds since 1970."""

    priority: int = 0  # -9 to 9 (RFC 6710)
    hold_until: float = 0.0  # 0: nothing is held (RFC 4865)
    deliver_by: float = 0.0  # 0: whenever (RFC 2852)
    by_return: bool = False  # what is not delivered by then goes back (R), else its sender is told (N)
    by_trace: bool = False
    require_tls: bool = False  # RFC 8689

    @property
    def flags(self) -> int:
        """The truths as the database keeps them."""
        return self.require_tls * _REQUIRE_TLS | self.by_return * _BY_RETURN | self.by_trace * _BY_TRACE


# The database's: never renumber.
_REQUIRE_TLS, _BY_RETURN, _BY_TRACE = 1, 2, 4
NO_OPTIONS = MailOptions()


def stored_options(flags: int, priority: int, hold_until: float, deliver_by: float) -> MailOptions:
    """What `flags` and its neighbours stand for; NO_OPTIONS itself for nothing."""
    if not (flags or priority or hold_until or deliver_by):
        return NO_OPTIONS
    return MailOptions(
        priority,
        hold_until,
        deliver_by,
        by_return=bool(flags & _BY_RETURN),
        by_trace=bool(flags & _BY_TRACE),
        require_tls=bool(flags & _REQUIRE_TLS),
    )


@frozen
class Recipient:
    """One forward-path of an envelope, after aliases: where it goes and what the client had said.

    `next_hop` is LOCAL with `account_id` set, EXPANSION, or the domain in A-labels (or an address literal) that routing
    starts from.
    """

    forward_path: Mailbox
    original: Mailbox  # the argument of RCPT; differs from forward_path behind an alias
    next_hop: str
    account_id: int | None = None
    dsn: DsnRequest = NO_DSN_REQUEST


@frozen
class SessionFacts:
    """What a message's session was, as logs, trace fields and the spool keep it."""

    listener: str = ""  # its name, e.g. "mx"
    protocol: str = "SMTP"  # the WITH of RFC 3848: SMTP, ESMTP, ESMTPS, ESMTPA, ESMTPSA, LMTP...
    client_address: str = ""  # "local": over a UNIX socket
    client_port: int = 0
    helo: str = ""
    client_name: str = ""  # reverse DNS where it was looked up
    account: str = ""  # authcid's address where somebody had logged in
    tls: str = ""  # e.g. "TLSv1.3 TLS_AES_256_GCM_SHA384"
    may_relay: bool = False  # the listener lets the client's network send anywhere without a login
    origin: str = ""  # whom a front end has the message from, as it says (XFORWARD): for logs

    @property
    def is_lmtp(self) -> bool:
        """A front end hands on what it has judged, and reads a reply for each recipient (RFC 2033)."""
        return self.protocol.startswith("LMTP")


@frozen
class Envelope:
    """Reverse-path, recipients and parameters of one mail transaction, complete."""

    reverse_path: ReversePath
    recipients: tuple[Recipient, ...]
    ret: str | None = None  # FULL or HDRS (RFC 3461 §4.3)
    envid: str | None = None  # RFC 3461 §4.4
    body: str | None = None  # 7BIT, 8BITMIME (RFC 6152)
    smtputf8: bool = False
    account_id: int | None = None  # who submitted it
    options: MailOptions = NO_OPTIONS
