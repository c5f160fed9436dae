# SPDX-License-Identifier: MIT
"""What an SMTP client has just done, as frozen values: the engine's whole output besides replies.

Every event but Content is owed exactly one `answer()` (`challenge()` in an AUTH exchange, `read_chunks()` for Bdat).
RFC 5321 §4.1, RFC 3030, RFC 3207, RFC 4954.
"""

from __future__ import annotations

from attrs import field, frozen

from polarismail.values.address import Mailbox
from polarismail.values.envelope import NO_DSN_REQUEST, DsnRequest, ReversePath
from polarismail.values.reply import Reply
from polarismail.wire.smtp_xclient import Claims


@frozen
class Hello:
    """EHLO or HELO. `domain` is what the client calls itself: printable ASCII, at most 255 characters, else unjudged."""

    verb: str
    domain: str


@frozen
class Wishes:
    """Parameters of MAIL that need a judgement, or a clock, before anything is granted."""

    priority: int | None = None  # MT-PRIORITY (RFC 6710)
    hold_seconds: int | None = None  # HOLDFOR (RFC 4865)
    hold_until: float | None = None  # HOLDUNTIL, seconds since 1970
    by_seconds: int | None = None  # BY (RFC 2852)
    by_return: bool = False
    by_trace: bool = False
    require_tls: bool = False  # REQUIRETLS (RFC 8689)


@frozen
class Mail:
    """MAIL: begins a mail transaction. `size` is the client's own figure (RFC 1870), `auth` what AUTH= said (RFC 4954 §5)."""

    reverse_path: ReversePath
    size: int | None = None
    body: str | None = None  # 7BIT, 8BITMIME
    smtputf8: bool = False
    ret: str | None = None
    envid: str | None = None
    auth: str | None = None  # "" for AUTH=<>
    wishes: Wishes | None = None


@frozen
class Rcpt:
    """RCPT. The forward-path's domain is "" for the bare `<Postmaster>` (RFC 5321 §4.1.1.3)."""

    forward_path: Mailbox
    dsn: DsnRequest = NO_DSN_REQUEST


@frozen
class Data:
    """DATA, with at least one recipient accepted: answer 354 to read the content."""


@frozen
class Bdat:
    """The first BDAT of a message, with at least one recipient accepted: `read_chunks()` goes on to its octets."""

    octets: int
    last: bool


@frozen
class Content:
    """Some of the content: dots unstuffed, bare CR and LF made CRLF. No answer is owed."""

    octets: bytes = field(repr=False)


@frozen
class EndOfChunk:
    """A chunk has come, and is not the last one. With a `problem` the message is lost: nothing of it is given out any more."""

    octets: int
    problem: Reply | None = None


@frozen
class EndOfData:
    """The content is complete. With a `problem` nothing of it may be kept; octets behind the problem were not given out.

    `size`: octets of content as given out (or as they would have been); `bare`: CRs and LFs that stood alone.
    `closes`: the client sent so far beyond every limit that the connection ends with the reply.
    """

    size: int
    bare: int = 0
    problem: Reply | None = None
    closes: bool = False


@frozen
class Rset:
    """RSET."""


@frozen
class Noop:
    """NOOP."""


@frozen
class Quit:
    """QUIT."""


@frozen
class StartTls:
    """STARTTLS, with nothing behind it: answer 220, begin TLS, then `tls_started()`."""


@frozen
class Vrfy:
    """VRFY and what it asks for, printable."""

    text: str


@frozen
class Help:
    """HELP and its argument, printable."""

    text: str


@frozen
class Auth:
    """AUTH. `initial` is the decoded initial response, b"" for `=`, None where there was none (RFC 4954 §4)."""

    mechanism: str
    initial: bytes | None = field(default=None, repr=False)


@frozen
class AuthResponse:
    """The decoded answer to a challenge; None when the client cancelled with `*`."""

    octets: bytes | None = field(repr=False)


@frozen
class XClient:
    """XCLIENT: a front end speaks for another client from now on. Answer 220 and call `client_changed()`, or refuse."""

    claims: Claims


@frozen
class XForward:
    """XFORWARD: where a front end has the next message from."""

    claims: Claims


@frozen
class Refused:
    """The engine knows the answer: send `reply`. `junk`: no mail command at all. `closes`: and then close."""

    reply: Reply
    junk: bool = False
    closes: bool = False


Event = (
    Hello
    | Mail
    | Rcpt
    | Data
    | Bdat
    | Content
    | EndOfChunk
    | EndOfData
    | Rset
    | Noop
    | Quit
    | StartTls
    | Vrfy
    | Help
    | Auth
    | AuthResponse
    | XClient
    | XForward
    | Refused
)
