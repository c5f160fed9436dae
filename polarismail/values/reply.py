# SPDX-License-Identifier: MIT
"""A reply is a value with a name; its code and its enhanced status cannot disagree.

RFC 5321 §4.2 (codes), RFC 2034 and RFC 3463 (enhanced status). Rendering to octets is cached on the value, because
the same few replies are sent a thousand times a second.
"""

from __future__ import annotations

import re
from functools import cached_property

from attrs import field, frozen

from polarismail.values.errors import BadReply

EnhancedStatus = tuple[int, int, int]

_STATUS = re.compile(r"([245])\.(\d{1,3})\.(\d{1,3})(?:[ \t]+|$)")
_UNPRINTABLE = re.compile(r"[^\t\x20-\x7e\u00a0-\U0010ffff]")
# 512 octets for the whole line, RFC 5321 §4.5.3.1.5; the rest of a longer line goes to a continuation line.
_MAX_TEXT = 480


def _clean(text: str) -> str:
    return "\n".join(_UNPRINTABLE.sub("?", line) for line in text.split("\n"))


@frozen(slots=False)
class Reply:
    """What the peer reads.

    `text` may hold several lines, separated by "\\n"; it never holds CR, and control characters are replaced by "?",
    so that nothing a remote party said can forge a line of ours.

    Raises ValueError when code and status disagree: 4yz wants 4.x.y (RFC 2034 §4).
    """

    code: int
    status: EnhancedStatus | None  # 220, 250 to EHLO, 334 and 354 carry none
    text: str = field(converter=_clean)

    def __attrs_post_init__(self) -> None:
        if not 200 <= self.code <= 599:
            raise ValueError(f"{self.code} is no SMTP reply code")
        if self.status is not None and self.status[0] != self.code // 100:
            raise ValueError("4yz wants 4.x.y, 5yz wants 5.x.y")

    @property
    def is_positive(self) -> bool:
        """2yz or 3yz."""
        return self.code < 400

    @property
    def is_transient(self) -> bool:
        """4yz: the same may work later."""
        return 400 <= self.code < 500

    @property
    def is_permanent(self) -> bool:
        """5yz: it will never work."""
        return self.code >= 500

    @property
    def dotted(self) -> str:
        """The enhanced status as `4.7.1`; a reply without one gets `2.0.0`, `4.0.0` or `5.0.0`."""
        return "%d.%d.%d" % (self.status or (max(2, self.code // 100) if self.code >= 400 else 2, 0, 0))

    @cached_property
    def octets(self) -> bytes:
        """The reply as sent, with its final CRLF. UTF-8 where the text is not ASCII."""
        prefix = "%d.%d.%d " % self.status if self.status else ""
        lines = [piece for line in self.text.split("\n") for piece in _fold(line)]
        last = len(lines) - 1
        return "".join(
            f"{self.code}{' ' if at == last else '-'}{prefix}{line}".rstrip() + "\r\n"
            if prefix or line
            else f"{self.code}{' ' if at == last else '-'}\r\n"
            for at, line in enumerate(lines)
        ).encode("utf-8", "replace")

    def __str__(self) -> str:
        """One line, as logs and DSNs show it: `451 4.7.1 Greylisted`."""
        return self._line

    @cached_property
    def _line(self) -> str:
        status = " %d.%d.%d" % self.status if self.status else ""
        return f"{self.code}{status} {self.text}".replace("\n", " ").strip()

    @classmethod
    def parse(cls, lines: list[bytes]) -> Reply:
        """Read a peer's whole reply, given as lines without their CRLF. Raises BadReply.

        Strict where looseness is dangerous: every line carries the same code (RFC 5321 §4.2.1). Octets that are not
        UTF-8 are shown with a replacement, never trusted.
        """
        if not lines:
            raise BadReply("no line")
        code, texts, status = lines[0][:3], [], None
        if len(code) != 3 or not code.isdigit() or not 200 <= int(code) <= 599:
            raise BadReply(f"no reply code in {lines[0][:80]!r}")
        for at, line in enumerate(lines):
            mark = line[3:4]
            if line[:3] != code or mark not in ((b"-",) if at < len(lines) - 1 else (b" ", b"")):
                raise BadReply(f"continuation line {line[:80]!r} in a reply that began with {code!r}")
            text = line[4:].decode("utf-8", "replace")
            found = _STATUS.match(text)
            if found and int(found[1]) == int(code) // 100:
                status = status or (int(found[1]), int(found[2]), int(found[3]))
                text = text[found.end() :]
            texts.append(text)
        return cls(int(code), status, "\n".join(texts))


def _fold(line: str) -> list[str]:
    return [line[at : at + _MAX_TEXT] for at in range(0, len(line), _MAX_TEXT)] or [""]


def parse_rendered(text: str) -> Reply:
    """Read what `str(reply)` wrote, as the spool keeps it. Raises BadReply."""
    return Reply.parse([text.encode()])


def queued_as(queue_id: str) -> Reply:
    """The reply to the end of data of a message that is on stable storage. One is made for each message: letters and digits
    of our own need no cleaning, so it is born with its octets."""
    reply = object.__new__(Reply)
    text = f"Queued as {queue_id}"
    reply.__dict__.update(code=250, status=(2, 0, 0), text=text, octets=b"250 2.0.0 %s\r\n" % text.encode())
    return reply


OK = Reply(250, (2, 0, 0), "OK")
SENDER_OK = Reply(250, (2, 1, 0), "Sender OK")
RECIPIENT_OK = Reply(250, (2, 1, 5), "Recipient OK")
ALIAS_EXPANDED = Reply(250, (2, 1, 5), "The address is an alias, and the message goes on to several others")
GO_AHEAD = Reply(354, None, "End data with <CR><LF>.<CR><LF>")
GOODBYE = Reply(221, (2, 0, 0), "Goodbye")
FOREIGN_PROTOCOL = Reply(221, (2, 7, 0), "This is SMTP and nothing else, goodbye")
READY_FOR_TLS = Reply(220, (2, 0, 0), "Ready to start TLS")
AUTHENTICATED = Reply(235, (2, 7, 0), "Authentication successful")
CANNOT_VERIFY = Reply(252, (2, 5, 2), "Cannot verify the user, but will take mail for it")

SHUTTING_DOWN = Reply(421, (4, 3, 2), "Service is shutting down, try again later")
TOO_SLOW = Reply(421, (4, 4, 2), "Timed out waiting for you, closing the connection")
TOO_MANY_ERRORS = Reply(421, (4, 7, 0), "Too many errors, closing the connection")
TOO_MANY_CONNECTIONS = Reply(421, (4, 7, 0), "Too many connections or errors from your network, try again later")
TOO_MANY_HANDSHAKES = Reply(421, (4, 7, 0), "Too many TLS handshakes from your address, try again later")
TOO_BUSY = Reply(421, (4, 3, 2), "Too busy now, try again in a minute")
UNHEALTHY = Reply(421, (4, 3, 0), "Mail system is not healthy, try again later")
NOT_QUEUED = Reply(451, (4, 3, 0), "Could not queue the message, try again later")
TRY_AGAIN = Reply(451, (4, 3, 0), "Temporary problem here, try again later")
GREYLISTED = Reply(451, (4, 7, 1), "Greylisted, please try again later")
NO_ROOM = Reply(452, (4, 3, 1), "Mail system is full, try again later")
TOO_MANY_RECIPIENTS = Reply(452, (4, 5, 3), "Too many recipients")
TLS_UNAVAILABLE = Reply(454, (4, 7, 0), "TLS is not available now")
AUTH_UNAVAILABLE = Reply(454, (4, 7, 0), "Temporary authentication failure, try again later")

LINE_TOO_LONG = Reply(500, (5, 5, 2), "Line too long")
BARE_COMMAND = Reply(500, (5, 5, 2), "Command lines end with CRLF, closing the connection")
AUTH_LINE_TOO_LONG = Reply(500, (5, 5, 6), "Authentication exchange line is too long")
UNKNOWN_COMMAND = Reply(500, (5, 5, 2), "Command not recognised")
BAD_SYNTAX = Reply(501, (5, 5, 4), "Syntax error in parameters")
BAD_OCTET = Reply(501, (5, 5, 2), "Control character in a command")
BAD_REVERSE_PATH = Reply(501, (5, 1, 7), "Bad sender address syntax")
BAD_FORWARD_PATH = Reply(501, (5, 1, 3), "Bad recipient address syntax")
AUTH_CANCELLED = Reply(501, (5, 7, 0), "Authentication cancelled")
BAD_BASE64 = Reply(501, (5, 5, 2), "Cannot decode that base64")
NOT_IMPLEMENTED = Reply(502, (5, 5, 1), "Command not implemented")
BAD_SEQUENCE = Reply(503, (5, 5, 1), "Bad sequence of commands")
UNKNOWN_MECHANISM = Reply(504, (5, 5, 4), "Authentication mechanism not supported")
NEED_TLS = Reply(530, (5, 7, 0), "Must issue a STARTTLS command first")
NEED_AUTH = Reply(530, (5, 7, 0), "Authentication required")
BAD_CREDENTIALS = Reply(535, (5, 7, 8), "Authentication credentials invalid")
ENCRYPTION_NEEDED = Reply(538, (5, 7, 11), "Encryption required for requested authentication mechanism")
UNKNOWN_RECIPIENT = Reply(550, (5, 1, 1), "No such mailbox here")
NOT_A_FRONT_END = Reply(550, (5, 7, 0), "Not authorised to speak for other clients")
RELAY_DENIED = Reply(550, (5, 7, 1), "Relaying denied: log in first")
TOO_BIG = Reply(552, (5, 3, 4), "Message too big")
NOT_YOUR_ADDRESS = Reply(553, (5, 7, 1), "Sender address is not one of yours")
NOT_YOUR_FROM = Reply(550, (5, 7, 1), "The address in From is not one of yours")
NEED_SMTPUTF8 = Reply(553, (5, 6, 7), "Address needs SMTPUTF8, which is not offered here")
OUT_OF_STEP = Reply(554, (5, 5, 0), "Protocol synchronisation error")
NO_VALID_RECIPIENTS = Reply(554, (5, 5, 1), "No valid recipients")
TOO_MANY_HOPS = Reply(554, (5, 4, 6), "Too many hops: the message loops")
HAS_BEEN_HERE = Reply(554, (5, 4, 6), "Mail loop: the message has been in this mailbox before")
NUL_IN_CONTENT = Reply(554, (5, 6, 0), "NUL octet in the message")
NEED_LOGIN_TO_HOLD = Reply(550, (5, 7, 1), "Log in to have a message held for the future")
BAD_HOLD = Reply(
    501, (5, 5, 4), "Cannot hold the message until then: expected a time from now on, within FUTURERELEASE's bounds"
)
BARE_LINE_END = Reply(550, (5, 6, 0), "Bare CR or LF in the message: lines end with CRLF")
TEXT_LINE_TOO_LONG = Reply(552, (5, 6, 0), "A line of the message is too long")
HEADER_TOO_BIG = Reply(552, (5, 6, 0), "The header section is too big")
UNKNOWN_PARAMETER = Reply(555, (5, 5, 4), "Parameter not recognised or not implemented")
