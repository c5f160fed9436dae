# SPDX-License-Identifier: MIT
"""The server's side of SMTP, without I/O: octets in; events out, one at a time; replies to octets.

Guarantees: each event but Content is answered exactly once before the next is given; how the octets were sliced does not
matter; what the table of states does not allow is 503; no octet that came before TLS is used inside it; memory is bounded
by what the caller puts in between two calls of `next_event`.

Never: raises on what a client sends; knows policy (the caller asks policy between `next_event` and `answer`).

RFC 5321, RFC 1870, RFC 2034, RFC 2920, RFC 3207, RFC 4954, RFC 6152; HOSTILE F1-F9, A7 and section 2.
"""

from __future__ import annotations

import enum
import re
from binascii import b2a_base64
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

from attrs import frozen

from polarismail.values import reply as replies
from polarismail.values.reply import Reply
from polarismail.wire.content import ContentReader
from polarismail.wire.smtp_events import (
    Auth,
    AuthResponse,
    Content,
    Data,
    EndOfData,
    Event,
    Hello,
    Help,
    Mail,
    Noop,
    Quit,
    Rcpt,
    Refused,
    Rset,
    StartTls,
    Vrfy,
)
from polarismail.wire.smtp_grammar import decode_base64, parse_auth, parse_hello, parse_mail, parse_rcpt, printable

__all__ = [
    "LEGAL",
    "Auth",
    "AuthResponse",
    "Content",
    "Data",
    "EndOfData",
    "Event",
    "Hello",
    "Help",
    "Mail",
    "Noop",
    "Quit",
    "Rcpt",
    "Refused",
    "Rset",
    "ServerSettings",
    "SmtpServer",
    "StartTls",
    "State",
    "Vrfy",
]


class State(enum.Enum):
    """Where a session stands (RFC 5321 §4.1.4)."""

    CONNECTED = "the banner is not sent yet"
    GREETED = "no EHLO or HELO yet"
    READY = "no mail transaction"
    MAIL = "a reverse-path, no recipient"
    RCPT = "at least one recipient"
    CONTENT = "reading content"
    AUTH = "a challenge is out"
    TLS = "STARTTLS was answered with 220"
    CLOSED = "nothing more is read"


_COMMANDS = frozenset({State.GREETED, State.READY, State.MAIL, State.RCPT})

LEGAL: dict[str, frozenset[State]] = {
    "EHLO": _COMMANDS,
    "HELO": _COMMANDS,
    "MAIL": frozenset({State.READY}),
    "RCPT": frozenset({State.MAIL, State.RCPT}),
    "DATA": frozenset({State.RCPT}),
    "RSET": _COMMANDS,
    "NOOP": _COMMANDS,
    "VRFY": _COMMANDS,
    "HELP": _COMMANDS,
    "QUIT": _COMMANDS,
    "STARTTLS": frozenset({State.READY}),
    "AUTH": frozenset({State.READY}),
}
"""Which command is legal when; anything else is 503 and changes nothing (HOSTILE F8)."""

# Behind these a client must wait for the reply (RFC 2920 §3.1): what stands behind them is an attack (HOSTILE F6).
_LAST_OF_ITS_GROUP = frozenset({"EHLO", "HELO", "DATA", "STARTTLS"})
_NOT_IMPLEMENTED = frozenset({"EXPN", "TURN", "SEND", "SOML", "SAML", "ETRN", "ATRN", "BURL", "XCLIENT", "XFORWARD"})
_OTHER_PROTOCOLS = frozenset({"GET", "POST", "CONNECT", "PUT", "HEAD", "OPTIONS", "DELETE", "PATCH", "TRACE", "PRI"})
_HEADER_FIELD = re.compile(r"(?!MAIL|RCPT)[A-Z][A-Z0-9-]*:")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_TLS_HANDSHAKE = 0x16
_LF, _CR = 0x0A, 0x0D

_OUT_OF_STEP = Refused(replies.OUT_OF_STEP, closes=True)
_DATA, _RSET, _NOOP, _QUIT, _STARTTLS = Data(), Rset(), Noop(), Quit(), StartTls()


@frozen
class ServerSettings:
    """What one listener's engine allows (HOSTILE section 0). Lines are counted with their CRLF, text lines without."""

    hostname: str = "localhost"
    max_message_octets: int = 52428800
    max_discarded_octets: int = 52428800  # how much beyond that is read, and thrown away, to find the end of data
    max_recipients: int = 1000
    max_null_path_recipients: int = 5  # a DSN has one recipient (HOSTILE section 5)
    require_auth: bool = False
    bare_line_ends: Literal["normalise", "refuse"] = "normalise"
    max_text_line_octets: int = 65536
    max_command_octets: int = 2048
    max_auth_octets: int = 12288
    max_discarded_line_octets: int = 65536
    max_header_octets: int = 102400
    max_header_lines: int = 1000
    offers_pipelining: bool = True
    offers_dsn: bool = False
    offers_smtputf8: bool = False

    @property
    def extensions(self) -> frozenset[str]:
        """Parameters that MAIL and RCPT may carry beyond SIZE, BODY and AUTH."""
        return _extensions(self.offers_dsn, self.offers_smtputf8)


@lru_cache(maxsize=4)
def _extensions(dsn: bool, smtputf8: bool) -> frozenset[str]:
    return frozenset(name for name, offered in (("DSN", dsn), ("SMTPUTF8", smtputf8)) if offered)


def submission_settings(hostname: str = "localhost", **others: Any) -> ServerSettings:
    """The defaults of a submission listener: a login is needed, and content must keep the rules (HOSTILE 0, F1)."""
    strict: dict[str, Any] = {"require_auth": True, "bare_line_ends": "refuse", "max_text_line_octets": 998}
    return ServerSettings(hostname=hostname, **{**strict, **others})


class SmtpServer:
    """One SMTP session's engine.

    Put octets in with `receive`; pull with `next_event` until it returns None; answer each event but Content with
    `answer` (or `challenge`), and send what that returns. The banner is the first answer, owed before any event.

    `tls_available`: STARTTLS is offered. `auth_mechanisms(tls_active)`: the names of what AUTH offers now.
    """

    def __init__(
        self,
        settings: ServerSettings,
        *,
        tls_available: bool,
        tls_active: bool = False,
        auth_mechanisms: Callable[[bool], tuple[str, ...]],
    ) -> None:
        self.settings = settings
        self.state = State.CONNECTED
        self.authenticated = False
        self.recipients = 0  # accepted in this transaction
        self.out_of_step = False
        self.tls_active = tls_active
        self._tls_available = tls_available
        self._auth_mechanisms = auth_mechanisms
        self._extensions = settings.extensions
        self._buffer = b""
        self._offset = 0
        self._skipped = 0  # octets of an over-long line that are gone already
        self._owed: Event | Literal["banner"] | None = "banner"
        self._next: Event | None = None  # decided already
        self._content: ContentReader | None = None
        self._transaction: Mail | None = None
        self._tried_recipients = 0

    # -- octets in, events out ---------------------------------------------------------------------------------------

    @property
    def buffered(self) -> int:
        """Octets that wait to be read by `next_event`."""
        return len(self._buffer) - self._offset

    @property
    def awaiting_command(self) -> bool:
        """Nothing is owed, no content or exchange is under way: the client may be told goodbye (RFC 5321 §3.8)."""
        return self._owed is None and self.state in _COMMANDS

    @property
    def content_octets(self) -> int:
        """Octets of the present content that have been read, kept or not; 0 outside of one."""
        return self._content.received if self._content is not None else 0

    def receive(self, octets: bytes) -> None:
        """Append to what waits. Nothing is parsed."""
        if self.state is not State.CLOSED:
            self._buffer = self._buffer[self._offset :] + octets if self._offset < len(self._buffer) else octets
            self._offset = 0

    def next_event(self) -> Event | None:
        """What the client did next; None when more octets are needed, or the session is over."""
        if self._owed is not None:
            raise RuntimeError("the last event has not been answered")
        event = self._next
        if event is not None:
            self._next = None
        elif self.state is State.CONTENT:
            event = self._read_content()
        elif self.state in _READING:
            event = self._read_command()
        if event is not None and type(event) is not Content:
            self._owed = event
        return event

    # -- replies out -------------------------------------------------------------------------------------------------

    def answer(self, reply: Reply) -> bytes:
        """The reply to the last event: the state follows it. Returns the octets to send.

        They are empty where the client turned out not to have waited for this reply (HOSTILE F6): the next event is then
        the refusal. Without an event to answer, nothing changes.
        """
        owed, self._owed = self._owed, None
        if reply.code == 421:
            self._close()
            return reply.octets
        if owed is not None:
            follow = _FOLLOW.get(type(owed))
            if follow is not None and not follow(self, owed, reply):
                self.out_of_step = True
                self._next = _OUT_OF_STEP
                return b""
        return reply.octets

    def challenge(self, octets: bytes) -> bytes:
        """Go on with an AUTH exchange: 334. The next event is AuthResponse, or Refused where it is no base64."""
        self._owed = None
        self.state = State.AUTH
        return b"334 " + b2a_base64(octets, newline=False) + b"\r\n"

    def ehlo_reply(self, greeting: str) -> Reply:
        """The reply to EHLO: the extensions that are honoured right now. `greeting` is its first line."""
        settings = self.settings
        keywords = ["PIPELINING"] if settings.offers_pipelining else []
        keywords.append(f"SIZE {settings.max_message_octets}")
        if self._tls_available and not self.tls_active:
            keywords.append("STARTTLS")
        mechanisms = () if self.authenticated else self._auth_mechanisms(self.tls_active)
        if mechanisms:
            keywords.append("AUTH " + " ".join(mechanisms))
        keywords += ["8BITMIME", "ENHANCEDSTATUSCODES"]
        if settings.offers_dsn:
            keywords.append("DSN")
        if settings.offers_smtputf8:
            keywords.append("SMTPUTF8")
        return _ehlo_reply(greeting, "\n".join(keywords))

    def tls_started(self) -> None:
        """TLS begins: back to the state before EHLO, everything forgotten (RFC 3207 §4.2)."""
        if self.buffered:
            # In clear, behind STARTTLS: dropped, and the connection with it (HOSTILE section 2).
            self.out_of_step = True
            self._next = _OUT_OF_STEP
        self._buffer, self._offset, self._skipped = b"", 0, 0
        self.tls_active, self.authenticated = True, False
        self.state = State.GREETED
        self._forget_transaction()

    # -- reading -----------------------------------------------------------------------------------------------------

    def _read_content(self) -> Event | None:
        reader = self._content
        assert reader is not None
        octets = self._buffer[self._offset :] if self._offset else self._buffer
        if not octets:
            return None
        self._buffer, self._offset = b"", 0
        piece = reader.receive(octets)
        limit = self.settings.max_message_octets + self.settings.max_discarded_octets
        if reader.rest is not None:
            self._buffer = reader.rest
            end = EndOfData(reader.size, reader.bare, reader.problem)
        elif reader.received > limit:
            end = EndOfData(reader.size, reader.bare, reader.problem or replies.TOO_BIG, closes=True)
        else:
            return Content(piece) if piece else None
        self._content = None
        self._forget_transaction()
        if piece:
            self._next = end
            return Content(piece)
        return end

    def _read_command(self) -> Event | None:
        buffer, start = self._buffer, self._offset
        end = buffer.find(b"\n", start)
        if end < 0:
            return self._read_part_of_line()
        if end == start or buffer[end - 1] != _CR:
            return self._refuse_bare_line_feed()
        self._offset = end + 1
        if end + 1 - start > self.settings.max_command_octets or self._skipped:
            length, self._skipped = self._skipped + end - 1 - start, 0
            if length > self._max_line_octets(start) - 2:
                return self._refuse_long_line(length)
        if self.state is State.AUTH:
            return self._read_response(buffer[start : end - 1])
        text = buffer[start : end - 1].decode("utf-8", "replace").rstrip(" \t")
        if not text.isprintable() and _CONTROL.search(text):
            foreign = buffer[start] == _TLS_HANDSHAKE
            return _FOREIGN if foreign else Refused(replies.BAD_OCTET)
        verb, _, argument = text.partition(" ")
        verb = verb.upper()
        if verb in _LAST_OF_ITS_GROUP and self._offset < len(buffer):
            self.out_of_step = True
            return _OUT_OF_STEP
        parse = _PARSE.get(verb)
        if parse is None:
            return _refuse_unknown(verb)
        if self.state not in LEGAL[verb]:
            if verb == "DATA" and self._tried_recipients:
                return Refused(replies.NO_VALID_RECIPIENTS)
            return Refused(replies.BAD_SEQUENCE)
        event = parse(self, argument.strip(" "))
        return Refused(event) if type(event) is Reply else event

    def _read_part_of_line(self) -> Event | None:
        """No line end yet: wait, unless enough is known already. Over-long lines are dropped as they come."""
        buffer, start = self._buffer, self._offset
        if start == len(buffer):
            self._buffer, self._offset = b"", 0
            return None
        if buffer[start] == _TLS_HANDSHAKE and not self._skipped and self.state is not State.AUTH:
            return _FOREIGN
        held = 1 if buffer[-1] == _CR else 0
        length = self._skipped + len(buffer) - start - held
        if length > self._max_line_octets(start) - 2:
            if length > self.settings.max_discarded_line_octets:
                return self._refuse_long_line(length)
            self._skipped = length
            self._buffer, self._offset = b"\r" if held else b"", 0
        return None

    def _max_line_octets(self, start: int) -> int:
        if self._skipped:
            return 0  # found to be too long before
        if self.state is State.AUTH or self._buffer[start : start + 5].upper() == b"AUTH ":
            return self.settings.max_auth_octets
        return self.settings.max_command_octets

    def _refuse_long_line(self, length: int) -> Refused:
        reply = replies.LINE_TOO_LONG
        if self.state is State.AUTH:
            reply, self.state = replies.AUTH_LINE_TOO_LONG, State.READY
        return Refused(reply, closes=length > self.settings.max_discarded_line_octets)

    def _refuse_bare_line_feed(self) -> Refused:
        # Whoever takes LF for the end of a line and whoever does not would see different commands: this ends here.
        if self._buffer[self._offset] == _TLS_HANDSHAKE and self.state is not State.AUTH:
            return _FOREIGN
        return Refused(replies.BARE_COMMAND, closes=True)

    def _read_response(self, line: bytes) -> Event:
        self.state = State.READY
        if line == b"*":
            return AuthResponse(None)
        octets = decode_base64(line)
        return AuthResponse(octets) if octets is not None else Refused(replies.BAD_BASE64)

    # -- commands: the event, or the reply that refuses it -----------------------------------------------------------

    def _parse_mail(self, argument: str) -> Event | Reply:
        settings = self.settings
        if settings.require_auth and not self.authenticated:
            if self._tls_available and not self.tls_active and not self._auth_mechanisms(False):
                return replies.NEED_TLS
            return replies.NEED_AUTH
        return parse_mail(argument, self._extensions, settings.max_message_octets)

    def _parse_rcpt(self, argument: str) -> Event | Reply:
        mail = self._transaction
        assert mail is not None
        self._tried_recipients += 1
        settings = self.settings
        event = parse_rcpt(argument, self._extensions, mail.smtputf8)
        limit = settings.max_recipients if mail.reverse_path is not None else settings.max_null_path_recipients
        if self.recipients >= limit and type(event) is Rcpt:
            return replies.TOO_MANY_RECIPIENTS
        return event

    def _parse_starttls(self, argument: str) -> Event | Reply:
        if argument:
            return replies.BAD_SYNTAX
        if self.tls_active:
            return replies.BAD_SEQUENCE
        return _STARTTLS if self._tls_available else replies.NOT_IMPLEMENTED

    def _parse_auth(self, argument: str) -> Event | Reply:
        if self.authenticated:
            return replies.BAD_SEQUENCE
        mechanisms = self._auth_mechanisms(self.tls_active)
        if not mechanisms:
            if self._tls_available and not self.tls_active and self._auth_mechanisms(True):
                return replies.ENCRYPTION_NEEDED
            return replies.NOT_IMPLEMENTED
        event = parse_auth(argument)
        if isinstance(event, Auth) and event.mechanism not in mechanisms:
            return replies.UNKNOWN_MECHANISM
        return event

    # -- what follows from a reply: False when the client did not wait for it ----------------------------------------

    def _follow_banner(self, _: Any, reply: Reply) -> bool:
        if self.buffered:
            self.state = State.GREETED
            return False
        # A 554 in the banner's place leaves nothing but QUIT (RFC 5321 §3.1); the caller closes.
        self.state = State.GREETED
        return True

    def _follow_hello(self, _: Any, reply: Reply) -> bool:
        if reply.code < 400:
            self.state = State.READY
            self._forget_transaction()
            return not self.buffered
        return True

    def _follow_mail(self, mail: Any, reply: Reply) -> bool:
        if reply.code < 400:
            self.state, self._transaction = State.MAIL, mail
            self.recipients = self._tried_recipients = 0
        return True

    def _follow_rcpt(self, _: Any, reply: Reply) -> bool:
        if reply.code < 400:
            self.state = State.RCPT
            self.recipients += 1
        return True

    def _follow_data(self, _: Any, reply: Reply) -> bool:
        if reply.code >= 400:
            self._forget_transaction()
        elif self.buffered:
            self._forget_transaction()
            return False
        else:
            settings = self.settings
            self.state = State.CONTENT
            self._content = ContentReader(
                max_octets=settings.max_message_octets,
                max_line_octets=settings.max_text_line_octets,
                refuse_bare=settings.bare_line_ends == "refuse",
                max_header_octets=settings.max_header_octets,
                max_header_lines=settings.max_header_lines,
            )
        return True

    def _follow_end_of_data(self, end: Any, _: Reply) -> bool:
        if end.closes:
            self._close()
        return True

    def _follow_rset(self, _: Any, reply: Reply) -> bool:
        if reply.code < 400:
            self._forget_transaction()
        return True

    def _follow_auth(self, _: Any, reply: Reply) -> bool:
        self.authenticated = self.authenticated or reply.code == 235
        return True

    def _follow_starttls(self, _: Any, reply: Reply) -> bool:
        if reply.code < 400:
            self.state = State.TLS
            return not self.buffered
        return True

    def _follow_refused(self, refused: Any, _: Reply) -> bool:
        if refused.closes:
            self._close()
        return True

    def _follow_quit(self, _: Any, reply: Reply) -> bool:
        self._close()
        return True

    def _forget_transaction(self) -> None:
        self._transaction = None
        self.recipients = self._tried_recipients = 0
        if self.state in (State.MAIL, State.RCPT, State.CONTENT):
            self.state = State.READY

    def _close(self) -> None:
        self.state = State.CLOSED
        self._buffer, self._offset = b"", 0
        self._next = self._content = self._transaction = None


_READING = _COMMANDS | {State.AUTH}

_FOREIGN = Refused(replies.FOREIGN_PROTOCOL, junk=True, closes=True)


def _refuse_unknown(verb: str) -> Refused:
    if verb in _OTHER_PROTOCOLS or _HEADER_FIELD.match(verb):
        return _FOREIGN
    # What follows an unexpected BDAT may be content (RFC 3030): it must not be read as commands.
    if verb == "BDAT":
        return Refused(replies.NOT_IMPLEMENTED, junk=True, closes=True)
    return Refused(replies.NOT_IMPLEMENTED if verb in _NOT_IMPLEMENTED else replies.UNKNOWN_COMMAND, junk=True)


@lru_cache(maxsize=256)
def _ehlo_reply(greeting: str, keywords: str) -> Reply:
    return Reply(250, None, f"{greeting}\n{keywords}")


def _bare(event: Event) -> Callable[[SmtpServer, str], Event | Reply]:
    """A command that takes no argument."""
    return lambda server, argument: replies.BAD_SYNTAX if argument else event


_PARSE: dict[str, Callable[[SmtpServer, str], Event | Reply]] = {
    "EHLO": lambda server, argument: parse_hello("EHLO", argument),
    "HELO": lambda server, argument: parse_hello("HELO", argument),
    "MAIL": SmtpServer._parse_mail,
    "RCPT": SmtpServer._parse_rcpt,
    "DATA": _bare(_DATA),
    "RSET": _bare(_RSET),
    "NOOP": lambda server, argument: _NOOP,
    "VRFY": lambda server, argument: Vrfy(printable(argument)) if argument else replies.BAD_SYNTAX,
    "HELP": lambda server, argument: Help(printable(argument)),
    "QUIT": _bare(_QUIT),
    "STARTTLS": SmtpServer._parse_starttls,
    "AUTH": SmtpServer._parse_auth,
}

_FOLLOW: dict[type, Callable[[SmtpServer, Any, Reply], bool]] = {
    str: SmtpServer._follow_banner,
    Hello: SmtpServer._follow_hello,
    Mail: SmtpServer._follow_mail,
    Rcpt: SmtpServer._follow_rcpt,
    Data: SmtpServer._follow_data,
    EndOfData: SmtpServer._follow_end_of_data,
    Rset: SmtpServer._follow_rset,
    Auth: SmtpServer._follow_auth,
    AuthResponse: SmtpServer._follow_auth,
    StartTls: SmtpServer._follow_starttls,
    Refused: SmtpServer._follow_refused,
    Quit: SmtpServer._follow_quit,
}
