# SPDX-License-Identifier: MIT
"""What the POP3 engine gives to a session, and the replies that a session gives back: frozen values.

RFC 1939 §3 (replies), RFC 2449 §8 and RFC 3206 (response codes in brackets).
"""

from __future__ import annotations

import re

from attrs import field, frozen

_UNPRINTABLE = re.compile(r"[^\x20-\x7e]")
_MAX_TEXT = 480  # the whole line has 512 octets at most (RFC 1939 §3, RFC 2449 §4)


def _printable(text: str) -> str:
    return _UNPRINTABLE.sub("?", text[:_MAX_TEXT])


@frozen
class Pop3Reply:
    """One status line. `code` is a response code without brackets, "" for none; nothing in it can forge another line."""

    ok: bool
    text: str = field(converter=_printable)
    code: str = ""

    @property
    def octets(self) -> bytes:
        """The line with its CRLF."""
        code = f"[{self.code}] " if self.code else ""
        return f"{'+OK' if self.ok else '-ERR'} {code}{self.text}".rstrip().encode("ascii") + b"\r\n"


def ok(text: str = "") -> Pop3Reply:
    """+OK"""
    return Pop3Reply(True, text)


def err(text: str, code: str = "") -> Pop3Reply:
    """-ERR"""
    return Pop3Reply(False, text, code)


GOODBYE = ok("Goodbye")
NO_SUCH_MESSAGE = err("No such message")
BAD_CREDENTIALS = err("Name or password is wrong", "AUTH")
IN_USE = err("Another session has the maildrop, try again later", "IN-USE")
TRY_AGAIN = err("Temporary problem here, try again later", "SYS/TEMP")
OUT_OF_ORDER = err("The maildrop cannot be used, ask your administrator", "SYS/PERM")
SHUTTING_DOWN = err("Service is shutting down, try again later", "SYS/TEMP")
TOO_MANY_CONNECTIONS = err("Too many connections or errors from your network, try again later", "SYS/TEMP")
TOO_MANY_LOGINS = err("Too many wrong logins from your network, try again later", "SYS/TEMP")
TOO_BUSY = err("Too busy now, try again in a minute", "SYS/TEMP")
TOO_MANY_ERRORS = err("Too many errors, closing the connection")
UNKNOWN_COMMAND = err("Command not recognised")
WRONG_STATE = err("Command not valid now")
BAD_ARGUMENT = err("Bad argument")
LINE_TOO_LONG = err("Line too long")
NEED_TLS = err("No password in clear here: use STLS first")
NEED_USER = err("USER first")
NO_TLS = err("TLS is not available now", "SYS/TEMP")
OUT_OF_STEP = err("Nothing may follow STLS before its reply")
UNKNOWN_MECHANISM = err("Authentication mechanism not supported")
AUTH_CANCELLED = err("Authentication cancelled")
BAD_BASE64 = err("Cannot decode that base64")


@frozen
class Known:
    """The engine knows the answer already. `is_error`: it counts against the client; `closes`: nothing is read after it."""

    reply: Pop3Reply
    is_error: bool = True
    closes: bool = False


@frozen
class Capa:
    """CAPA (RFC 2449)."""


@frozen
class ListMechanisms:
    """AUTH without an argument: which mechanisms there are."""


@frozen
class Stls:
    """STLS (RFC 2595 §4): nothing was pipelined behind it."""


@frozen
class Login:
    """USER and PASS together."""

    name: str
    password: bytes = field(repr=False)


@frozen
class Auth:
    """AUTH (RFC 5034). `initial` is decoded; None where there was none."""

    mechanism: str  # upper case, one of those offered
    initial: bytes | None = field(repr=False)


@frozen
class AuthResponse:
    """A response to a challenge, decoded; None: the client cancels."""

    octets: bytes | None = field(repr=False)


@frozen
class Stat:
    """STAT."""


@frozen
class List:
    """LIST; `number` is None for all messages."""

    number: int | None


@frozen
class Uidl:
    """UIDL; `number` is None for all messages."""

    number: int | None


@frozen
class Retr:
    """RETR."""

    number: int


@frozen
class Top:
    """TOP: the header section and so many lines of the body."""

    number: int
    lines: int


@frozen
class Dele:
    """DELE."""

    number: int


@frozen
class Rset:
    """RSET."""


@frozen
class Noop:
    """NOOP."""


@frozen
class Quit:
    """QUIT. `update`: the login is done, so what is marked deleted goes now (RFC 1939 §6)."""

    update: bool


Event = (
    Known
    | Capa
    | ListMechanisms
    | Stls
    | Login
    | Auth
    | AuthResponse
    | Stat
    | List
    | Uidl
    | Retr
    | Top
    | Dele
    | Rset
    | Noop
    | Quit
)
