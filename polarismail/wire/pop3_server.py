# SPDX-License-Identifier: MIT
"""The server's side of POP3, without I/O: octets in; events out, one at a time; replies to octets.

Guarantees: each event is answered exactly once before the next is given, so pipelined commands keep their order; how the
octets were sliced does not matter; what the table of states does not allow is -ERR and changes nothing; no octet that came
before TLS is used inside it; a line that never ends costs no memory.

Never: raises on what a client sends; knows accounts or maildrops.

RFC 1939, RFC 2449 (CAPA), RFC 2595 §4 (STLS), RFC 3206, RFC 5034 (AUTH); HOSTILE F4, F7, F9, A7, I7 and section 2.
"""

from __future__ import annotations

import enum
import re
from binascii import b2a_base64
from collections.abc import Callable, Iterable

from attrs import frozen

from polarismail.wire import pop3_events as events
from polarismail.wire.pop3_events import Event, Known, Pop3Reply
from polarismail.wire.smtp_grammar import decode_base64


class State(enum.Enum):
    """Where a session stands (RFC 1939 §3)."""

    CONNECTED = "the greeting is not sent yet"
    AUTHORIZATION = "nobody has logged in"
    EXCHANGE = "a challenge is out"
    TLS = "STLS was answered with +OK"
    TRANSACTION = "the maildrop is open"
    UPDATE = "QUIT was given"
    CLOSED = "nothing more is read"


_BEFORE = frozenset({State.AUTHORIZATION})
_AFTER = frozenset({State.TRANSACTION})

LEGAL: dict[str, frozenset[State]] = {
    "CAPA": _BEFORE | _AFTER,
    "USER": _BEFORE,
    "PASS": _BEFORE,
    "AUTH": _BEFORE,
    "STLS": _BEFORE,
    "STAT": _AFTER,
    "LIST": _AFTER,
    "UIDL": _AFTER,
    "RETR": _AFTER,
    "TOP": _AFTER,
    "DELE": _AFTER,
    "RSET": _AFTER,
    "NOOP": _AFTER,
    "QUIT": _BEFORE | _AFTER,
}
"""Which command is legal when; anything else is -ERR and changes nothing."""

_PLAIN: dict[str, Event] = {
    "CAPA": events.Capa(),
    "STAT": events.Stat(),
    "RSET": events.Rset(),
    "NOOP": events.Noop(),
}
_ONE_NUMBER: dict[str, Callable[[int], Event]] = {"RETR": events.Retr, "DELE": events.Dele}
_NUMBER_OR_NONE: dict[str, Callable[[int | None], Event]] = {"LIST": events.List, "UIDL": events.Uidl}

_OTHER_PROTOCOLS = frozenset({"GET", "POST", "CONNECT", "PUT", "HEAD", "OPTIONS", "EHLO", "HELO", "MAIL", "PRI"})
_TLS_HANDSHAKE = b"\x16"
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")
_NUMBER = re.compile(r"[0-9]{1,20}")
_MAX_NUMBER = 2**31 - 1


@frozen
class Pop3Settings:
    """What one listener's engine allows. Lines are counted with their CRLF."""

    max_command_octets: int = 2048
    max_auth_octets: int = 12288
    max_discarded_octets: int = 65536  # of one over-long line; beyond that the connection is closed
    max_name_octets: int = 255
    max_password_octets: int = 1024


class Pop3Server:
    """One POP3 session's engine.

    Put octets in with `receive`; pull with `next_event` until it returns None; answer each event with `answer`, `listing` or
    `challenge`, and send what that returns. The greeting is the first answer, owed before any event.

    `tls_available`: STLS is offered. `auth_mechanisms(tls_active)`: the names of what AUTH offers now; where it offers
    nothing, USER and PASS are refused too.
    """

    def __init__(
        self,
        settings: Pop3Settings,
        *,
        tls_available: bool,
        tls_active: bool = False,
        auth_mechanisms: Callable[[bool], tuple[str, ...]],
    ) -> None:
        self.settings = settings
        self.state = State.CONNECTED
        self.tls_active = tls_active
        self._tls_available = tls_available
        self.auth_mechanisms = auth_mechanisms
        self._buffer = b""
        self._offset = 0
        self._skipped = 0  # octets of an over-long line that are gone already
        self._owed: Event | None = None
        self._name: str | None = None  # of USER

    # -- octets in, events out ---------------------------------------------------------------------------------------

    @property
    def buffered(self) -> int:
        """Octets that wait to be read by `next_event`."""
        return len(self._buffer) - self._offset

    def receive(self, octets: bytes) -> None:
        """Append; nothing is parsed yet."""
        if self.state is State.CLOSED:
            return
        self._buffer = self._buffer[self._offset :] + octets if self.buffered else octets
        self._offset = 0

    def next_event(self) -> Event | None:
        """The next thing to be answered; None where more octets are needed, or nothing more will be read."""
        if self.state in (State.CONNECTED, State.TLS, State.UPDATE, State.CLOSED):
            return None
        self._owed = self._read_line()
        return self._owed

    def _read_line(self) -> Event | None:
        if self._buffer[self._offset : self._offset + 1] == _TLS_HANDSHAKE:
            return Known(events.UNKNOWN_COMMAND, closes=True)
        limit = self.settings.max_auth_octets if self._may_be_long() else self.settings.max_command_octets
        end = self._buffer.find(b"\n", self._offset)
        if end < 0:
            if self.buffered + self._skipped > limit:
                return self._skip()
            return None
        line, self._offset = self._buffer[self._offset : end], end + 1
        if self._skipped or len(line) + 1 > limit:
            self._skipped = 0
            return Known(events.LINE_TOO_LONG)
        # People type at this protocol with tools that send a bare LF; here that ends nothing but a command.
        line = line.removesuffix(b"\r")
        return self._parse_response(line) if self.state is State.EXCHANGE else self._parse_command(line)

    def _may_be_long(self) -> bool:
        if self.state is State.EXCHANGE:
            return True
        return self._buffer[self._offset : self._offset + 5].upper() == b"AUTH "

    def _skip(self) -> Known | None:
        """Throw away what is there of an over-long line. TLS and other binary talk has no line ends at all."""
        self._skipped += self.buffered
        self._buffer, self._offset = b"", 0
        if self._skipped > self.settings.max_discarded_octets:
            return Known(events.LINE_TOO_LONG, closes=True)
        return None

    def _parse_command(self, line: bytes) -> Event:
        if _CONTROL.search(line):
            return Known(events.BAD_ARGUMENT)
        word, _, rest = line.partition(b" ")
        verb = word.decode("ascii", "replace").upper()
        if verb not in LEGAL:
            return Known(events.UNKNOWN_COMMAND, closes=verb in _OTHER_PROTOCOLS)
        if self.state not in LEGAL[verb]:
            return Known(events.WRONG_STATE)
        if verb == "PASS":
            return self._parse_pass(rest)  # spaces belong to the password (RFC 1939 §7)
        arguments = rest.decode("utf-8", "replace").split()
        if verb == "USER":
            return self._parse_user(arguments)
        if verb == "AUTH":
            return self._parse_auth(arguments)
        return self._parse_arguments(verb, arguments)

    def _parse_arguments(self, verb: str, arguments: list[str]) -> Event:
        if not arguments:
            if verb in _NUMBER_OR_NONE:
                return _NUMBER_OR_NONE[verb](None)
            if verb in _PLAIN:
                return _PLAIN[verb]
            if verb == "QUIT":
                return events.Quit(self.state is State.TRANSACTION)
            if verb == "STLS":
                return self._parse_stls()
            return Known(events.BAD_ARGUMENT)
        numbers = [min(int(text), _MAX_NUMBER) for text in arguments if _NUMBER.fullmatch(text)]
        if len(numbers) == len(arguments):
            if len(numbers) == 1 and verb in _ONE_NUMBER:
                return _ONE_NUMBER[verb](numbers[0])
            if len(numbers) == 1 and verb in _NUMBER_OR_NONE:
                return _NUMBER_OR_NONE[verb](numbers[0])
            if len(numbers) == 2 and verb == "TOP":
                return events.Top(*numbers)
        return Known(events.BAD_ARGUMENT)

    def _parse_stls(self) -> Event:
        if not self._tls_available or self.tls_active:
            return Known(events.WRONG_STATE)
        if self.buffered:
            # Octets that were sent in clear must not be taken for ones that came inside TLS.
            return Known(events.OUT_OF_STEP, closes=True)
        return events.Stls()

    def _parse_user(self, arguments: list[str]) -> Event:
        self._name = None
        if not self.auth_mechanisms(self.tls_active):
            return Known(events.NEED_TLS)
        if len(arguments) != 1 or len(arguments[0].encode()) > self.settings.max_name_octets:
            return Known(events.BAD_ARGUMENT)
        self._name = arguments[0]
        return Known(events.ok("Now the password"), is_error=False)

    def _parse_pass(self, password: bytes) -> Event:
        name, self._name = self._name, None
        if name is None:
            return Known(events.NEED_USER)
        if not password or len(password) > self.settings.max_password_octets:
            return Known(events.BAD_ARGUMENT)
        return events.Login(name, password)

    def _parse_auth(self, arguments: list[str]) -> Event:
        self._name = None
        if not arguments:
            return events.ListMechanisms()
        mechanisms = self.auth_mechanisms(self.tls_active)
        if not mechanisms:
            return Known(events.NEED_TLS)
        if len(arguments) > 2:
            return Known(events.BAD_ARGUMENT)
        mechanism = arguments[0].upper()
        if mechanism not in mechanisms:
            return Known(events.UNKNOWN_MECHANISM)
        if len(arguments) == 1:
            return events.Auth(mechanism, None)
        # "=" is an initial response of no octets (RFC 5034 §4).
        initial = b"" if arguments[1] == "=" else decode_base64(arguments[1].encode("utf-8", "replace"))
        return Known(events.BAD_BASE64) if initial is None else events.Auth(mechanism, initial)

    def _parse_response(self, line: bytes) -> Event:
        if line == b"*":
            return events.AuthResponse(None)
        octets = decode_base64(line)
        return Known(events.BAD_BASE64) if octets is None else events.AuthResponse(octets)

    # -- replies to octets -------------------------------------------------------------------------------------------

    def answer(self, reply: Pop3Reply) -> bytes:
        """The reply that is owed: the greeting, or the answer to the last event. The state follows it."""
        owed, self._owed = self._owed, None
        if self.state is State.CONNECTED:
            self.state = State.AUTHORIZATION if reply.ok else State.CLOSED
        elif isinstance(owed, (events.Login, events.Auth, events.AuthResponse)):
            self.state = State.TRANSACTION if reply.ok else State.AUTHORIZATION
        elif isinstance(owed, events.Stls) and reply.ok:
            self.state = State.TLS
        elif isinstance(owed, events.Quit):
            self.state = State.UPDATE
        elif isinstance(owed, Known):
            if owed.closes:
                self.state = State.CLOSED
                self._buffer, self._offset = b"", 0
            elif self.state is State.EXCHANGE:
                self.state = State.AUTHORIZATION
        return reply.octets

    def listing(self, reply: Pop3Reply, lines: Iterable[str]) -> bytes:
        """A positive reply to the last event with lines of ours, none of which begins with a dot (RFC 1939 §3)."""
        body = "".join(f"{line}\r\n" for line in lines)
        return self.answer(reply) + body.encode("ascii", "replace") + b".\r\n"

    def challenge(self, octets: bytes) -> bytes:
        """A challenge in the place of an answer to Auth or AuthResponse; an AuthResponse comes next."""
        self._owed = None
        self.state = State.EXCHANGE
        return b"+ " + b2a_base64(octets, newline=False) + b"\r\n"

    def capabilities(self) -> list[str]:
        """What CAPA says now (RFC 2449 §5): only what would be honoured."""
        mechanisms = self.auth_mechanisms(self.tls_active)
        lines = ["TOP", "UIDL", "RESP-CODES", "AUTH-RESP-CODE", "PIPELINING"]
        if self.state is State.AUTHORIZATION:
            if mechanisms:
                lines += ["USER", f"SASL {' '.join(mechanisms)}"]
            if self._tls_available and not self.tls_active:
                lines.append("STLS")
        elif mechanisms:
            lines.append(f"SASL {' '.join(mechanisms)}")
        return [*lines, "EXPIRE NEVER", "IMPLEMENTATION polarismail"]

    def mechanisms(self) -> tuple[str, ...]:
        """What AUTH offers now."""
        return self.auth_mechanisms(self.tls_active)

    def tls_started(self) -> None:
        """TLS is active: everything that was said in clear is forgotten (RFC 2595 §4)."""
        self.state, self.tls_active = State.AUTHORIZATION, True
        self._buffer, self._offset, self._skipped = b"", 0, 0
        self._name, self._owed = None, None
