# SPDX-License-Identifier: MIT
"""What an SMTP session may do when, as a table, and how much of it: whatever affects the state machine is settled here.

RFC 5321 §4.1.4, RFC 3030 §2; HOSTILE section 0 and F8.
"""

from __future__ import annotations

import enum
from typing import Any, Literal

from attrs import field, frozen


class State(enum.Enum):
    """Where a session stands (RFC 5321 §4.1.4)."""

    CONNECTED = "the banner is not sent yet"
    GREETED = "no EHLO or HELO yet"
    READY = "no mail transaction"
    MAIL = "a reverse-path, no recipient"
    RCPT = "at least one recipient"
    BDAT = "some chunks, not the last one"
    CHUNK = "reading a chunk"
    CONTENT = "reading content"
    AUTH = "a challenge is out"
    TLS = "STARTTLS was answered with 220"
    CLOSED = "nothing more is read"

    # Members are compared by identity and looked up for each command: Enum's own hash is a Python function.
    __hash__ = object.__hash__


COMMAND_STATES = frozenset({State.GREETED, State.READY, State.MAIL, State.RCPT, State.BDAT})
CONTENT_STATES = frozenset({State.BDAT, State.CHUNK, State.CONTENT})
"""Some of the content has come, or may come at any moment."""

LEGAL: dict[str, frozenset[State]] = {
    "EHLO": COMMAND_STATES,
    "LHLO": COMMAND_STATES,
    "HELO": COMMAND_STATES,
    "MAIL": frozenset({State.READY}),
    "RCPT": frozenset({State.MAIL, State.RCPT}),
    "DATA": frozenset({State.RCPT}),
    "BDAT": frozenset({State.RCPT, State.BDAT}),
    "RSET": COMMAND_STATES,
    "NOOP": COMMAND_STATES,
    "VRFY": COMMAND_STATES,
    "HELP": COMMAND_STATES,
    "QUIT": COMMAND_STATES,
    "STARTTLS": frozenset({State.READY}),
    "AUTH": frozenset({State.READY}),
    "XCLIENT": frozenset({State.GREETED, State.READY}),
    "XFORWARD": frozenset({State.READY}),
}
"""Which command is legal when; anything else is 503 and changes nothing (HOSTILE F8)."""


def _check_recipients(_: object, __: object, number: int) -> None:
    if not 1 <= number <= 50000:
        raise ValueError(f"max_recipients: expected 1 to 50000, found {number}")


@frozen
class ServerSettings:
    """What one listener's engine allows (HOSTILE section 0). Lines are counted with their CRLF, text lines without."""

    hostname: str = "localhost"
    max_message_octets: int = 52428800
    max_discarded_octets: int = 52428800  # how much beyond that is read, and thrown away, to find the end of data
    max_recipients: int = field(default=1000, validator=_check_recipients)
    max_null_path_recipients: int = 5  # a DSN has one recipient (HOSTILE section 5)
    require_auth: bool = False
    lmtp: bool = False  # RFC 2033: LHLO, and a reply for each recipient
    bare_line_ends: Literal["normalise", "refuse"] = "normalise"
    max_text_line_octets: int = 65536
    max_command_octets: int = 2048
    max_auth_octets: int = 12288
    max_discarded_line_octets: int = 65536
    max_header_octets: int = 102400
    max_header_lines: int = 1000
    offers: frozenset[str] = frozenset({"PIPELINING", "CHUNKING"})
    """Keywords of RFCs that this listener offers beyond SIZE, 8BITMIME, ENHANCEDSTATUSCODES and HELP, which each one does."""
    max_hold_seconds: int = 604800
    """What FUTURERELEASE says (RFC 4865); the reception judges."""


def submission_settings(hostname: str = "localhost", **others: Any) -> ServerSettings:
    """The defaults of a submission listener: a login is needed, and content must keep the rules (HOSTILE 0, F1)."""
    strict: dict[str, Any] = {"require_auth": True, "bare_line_ends": "refuse", "max_text_line_octets": 998}
    return ServerSettings(hostname=hostname, **{**strict, **others})
