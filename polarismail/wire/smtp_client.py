# SPDX-License-Identifier: MIT
"""The SMTP client as an engine without I/O: two cursors (what was sent, what was answered) over one list of commands.

RFC 5321 §4.1 and §4.2, RFC 2920 (PIPELINING), RFC 1870 (SIZE), RFC 6152 (8BITMIME), RFC 3207 (STARTTLS), RFC 4954 (AUTH),
RFC 9422 (LIMITS).

Guarantees: a reply is believed only where a command waits for it; nothing that comes too early, too long, or with the
wrong class of code is taken for an answer, it breaks the connection (`Broken`). Each recipient of a transaction gets
exactly one verdict. The final dot goes out only behind a 354 that follows an accepted MAIL and an accepted RCPT, or, where
no recipient was accepted, alone (RFC 2920 §3.1).

Never: content that differs from what was given, but for dot-stuffing; memory beyond 100 lines of 2,048 octets.
"""

from __future__ import annotations

import base64
import enum
from collections import deque
from collections.abc import Mapping, Sequence
from functools import lru_cache

from attrs import define, field, frozen

from polarismail.values.errors import BadReply
from polarismail.values.reply import Reply

MAX_LINE_OCTETS = 2048
MAX_LINES = 100
MAX_VERDICT_CHARACTERS = 1024
_MAX_LIMITS = 20


class Step(enum.Enum):
    """What a reply answers."""

    GREETING = enum.auto()
    EHLO = enum.auto()
    HELO = enum.auto()
    STARTTLS = enum.auto()
    AUTH = enum.auto()
    RSET = enum.auto()
    MAIL = enum.auto()
    RCPT = enum.auto()
    DATA = enum.auto()
    CONTENT = enum.auto()  # the final dot
    QUIT = enum.auto()


# First digits of the replies that mean yes; a yes of another kind is out of sequence.
_YES: dict[Step, tuple[int, ...]] = dict.fromkeys(Step, (2,)) | {Step.DATA: (3,), Step.AUTH: (2, 3)}


@frozen
class Answered:
    """The reply to a command outside of transactions (and to the connection: GREETING)."""

    step: Step
    reply: Reply


@frozen
class SendContent:
    """The next hop waits for the content: `content()` for each piece, then `end_content()`."""


@frozen
class Finished:
    """The transaction is over and `transaction.verdicts` is complete; the connection may be used again."""

    transaction: Transaction


@frozen
class Broken:
    """The connection cannot be used any more: close it. A transaction that was under way has its verdicts."""

    reply: Reply
    transaction: Transaction | None = None


Event = Answered | SendContent | Finished | Broken


@define(eq=False)
class Transaction:
    """One mail transaction. `mail` and `recipients` are paths with their parameters, without `<`...`>` around the line:
    `b"<a@example.org> SIZE=12"`. After the end, `verdicts` has one reply for each recipient."""

    mail: bytes
    recipients: Sequence[bytes]
    verdicts: list[Reply | None] = field(init=False)
    accepted: set[int] = field(init=False, factory=set)  # places of the recipients that RCPT accepted
    answered_any: bool = field(init=False, default=False)

    def __attrs_post_init__(self) -> None:
        self.verdicts = [None] * len(self.recipients)

    def decide_rest(self, reply: Reply) -> None:
        """Give this verdict to each recipient that has none."""
        self.verdicts = [reply if verdict is None else verdict for verdict in self.verdicts]


class ReplyReader:
    """Octets to replies, for any slicing. Lines end with CRLF (RFC 5321 §2.3.8), have one code, and are bounded."""

    def __init__(self) -> None:
        self._buffer = b""
        self._at = 0
        self._lines: list[bytes] = []

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits, not even half a line."""
        return self._at == len(self._buffer) and not self._lines

    def receive(self, octets: bytes) -> None:
        """Append."""
        self._buffer = self._buffer[self._at :] + octets if self._at < len(self._buffer) else octets
        self._at = 0

    def clear(self) -> None:
        """Forget what waits."""
        self._buffer, self._at, self._lines = b"", 0, []

    def next_reply(self) -> Reply | None:
        """The next whole reply; None: more octets are needed. Raises BadReply."""
        while True:
            end = self._buffer.find(b"\n", self._at)
            if (len(self._buffer) if end < 0 else end + 1) - self._at > MAX_LINE_OCTETS:
                raise BadReply("a reply line is too long")
            if end < 0:
                return None
            if self._buffer[end - 1 : end] != b"\r" or end == self._at:
                raise BadReply("a reply line does not end with CRLF")
            line = self._buffer[self._at : end - 1]
            self._at = end + 1
            if self._lines or line[3:4] == b"-":
                if len(self._lines) == MAX_LINES:
                    raise BadReply("a reply has too many lines")
                self._lines.append(line)
                if line[:3] != self._lines[0][:3]:
                    raise BadReply("a reply changes its code from line to line")
                if line[3:4] == b"-":
                    continue
                lines, self._lines = self._lines, []
                return Reply.parse(lines)
            return _parse_line(line)


class DotEncoder:
    """Dot-stuffing (RFC 5321 §4.5.2) of content that comes in pieces of any size.

    Stored content has CRLF line ends only. Should a bare LF be there all the same, a dot behind it is stuffed too: some
    receivers would take LF "." for the end of data.
    """

    def __init__(self) -> None:
        self._tail = b"\r\n"

    def encode(self, octets: bytes) -> bytes:
        """The octets to send for this piece."""
        if not octets:
            return b""
        out = octets.replace(b"\n.", b"\n..") if b"\n." in octets else octets
        if octets[:1] == b"." and self._tail[-1:] == b"\n":
            out = b"." + out
        self._tail = (self._tail + octets[-2:])[-2:]
        return out

    def end(self) -> bytes:
        """The end of data, behind a line end if the content had none."""
        return b".\r\n" if self._tail == b"\r\n" else b"\r\n.\r\n"


class SmtpClient:
    """One connection to a next hop, seen from our side. `output()` has what must be sent after each call."""

    def __init__(self, hostname: str) -> None:
        self._hostname = hostname
        self._reader = ReplyReader()
        self._expected: deque[Step] = deque([Step.GREETING])
        self._out: list[bytes] = []
        self._open = False  # the next hop holds a transaction that must be reset before the next one
        self._broken: Broken | None = None
        self._reported = False
        self._transaction: Transaction | None = None
        self._commands: list[tuple[Step, bytes]] = []
        self._sent = self._answered = 0
        self._mail_accepted = False
        self._encoder: DotEncoder | None = None  # while content is being sent
        self.extensions: dict[str, str] = {}
        self.remote_name = ""
        self.answers = 0  # replies that were taken, so that a transport sees progress

    # -- what the transport asks ---------------------------------------------------------------------------------------

    @property
    def expects(self) -> Step | None:
        """What the next reply will answer; None: we owe the next word."""
        return self._expected[0] if self._expected else None

    @property
    def is_idle(self) -> bool:
        """Whether a transaction may begin."""
        return self._broken is None and self._transaction is None and not self._expected

    def output(self) -> bytes:
        """Octets to send now, once."""
        if not self._out:
            return b""
        out, self._out = self._out, []
        return out[0] if len(out) == 1 else b"".join(out)

    def receive(self, octets: bytes) -> None:
        """Append octets of the next hop."""
        if self._broken is None:
            self._reader.receive(octets)

    def next_event(self) -> Event | None:
        """The next thing to know; None: more octets are needed."""
        while self._broken is None:
            try:
                reply = self._reader.next_reply()
            except BadReply as problem:
                self._break(_violation(str(problem)))
                break
            if reply is None:
                return None
            event = self._take(reply)
            if event is not None:
                return event
        if self._reported or self._broken is None:
            return None
        self._reported = True
        return self._broken

    def lost(self, reply: Reply) -> Broken:
        """The connection is gone, or was too slow; `reply` becomes the verdict of what has none."""
        self._break(reply)
        self._reported = True
        assert self._broken is not None
        return self._broken

    # -- commands outside of transactions --------------------------------------------------------------------------------

    def ehlo(self) -> None:
        """Say EHLO; `extensions` and `remote_name` are set when it is answered."""
        self._say(Step.EHLO, b"EHLO " + self._hostname.encode("ascii") + b"\r\n")

    def helo(self) -> None:
        """Say HELO to one who does not know EHLO (RFC 5321 §3.2)."""
        self.extensions = {}
        self._say(Step.HELO, b"HELO " + self._hostname.encode("ascii") + b"\r\n")

    def starttls(self) -> None:
        """Ask for TLS. Behind the 220 nothing may have come: check `is_clean` before the handshake."""
        self._say(Step.STARTTLS, b"STARTTLS\r\n")

    @property
    def is_clean(self) -> bool:
        """Whether no octet waits that nobody asked for; after STARTTLS it would be plain text that is taken for TLS's."""
        return self._reader.is_empty

    def tls_started(self) -> None:
        """Forget what was said in plain text (RFC 3207 §4.2): the next word is EHLO."""
        self._reader.clear()
        self.extensions = {}
        self.remote_name = ""

    def auth(self, mechanism: str, initial: bytes | None = None) -> None:
        """Begin AUTH; answer each 334 with `auth_response`."""
        word = b"" if initial is None else b" " + (base64.b64encode(initial) or b"=")
        self._say(Step.AUTH, b"AUTH " + mechanism.encode("ascii") + word + b"\r\n")

    def auth_response(self, octets: bytes) -> None:
        """Answer a challenge."""
        self._say(Step.AUTH, base64.b64encode(octets) + b"\r\n")

    def quit(self) -> None:
        """Say goodbye."""
        self._say(Step.QUIT, b"QUIT\r\n")

    # -- a transaction -----------------------------------------------------------------------------------------------------

    def begin(self, transaction: Transaction) -> None:
        """MAIL, RCPT for each recipient, DATA: in one group where PIPELINING is offered. Ends with Finished or Broken."""
        assert self.is_idle and transaction.recipients, "a transaction needs an idle connection and a recipient"
        self._transaction, self._mail_accepted = transaction, False
        self._commands = [(Step.RSET, b"RSET\r\n")] if self._open else []
        self._commands.append((Step.MAIL, b"MAIL FROM:" + transaction.mail + b"\r\n"))
        self._commands += [(Step.RCPT, b"RCPT TO:" + recipient + b"\r\n") for recipient in transaction.recipients]
        self._commands.append((Step.DATA, b"DATA\r\n"))
        self._sent = self._answered = 0
        self._send_commands()

    def content(self, octets: bytes) -> bytes:
        """One piece of content as it is to be sent; the caller writes it, and waits while the next hop does not read."""
        assert self._encoder is not None, "nobody asked for content"
        return self._encoder.encode(octets)

    @property
    def wants_content(self) -> bool:
        """Whether content is under way: between SendContent and `end_content`, unless the connection broke."""
        return self._encoder is not None

    def end_content(self) -> bytes:
        """The end of data, to be sent behind the last piece. The verdict comes with the next reply."""
        assert self._encoder is not None, "nobody asked for content"
        end, self._encoder = self._encoder.end(), None
        return end

    # -- inside ------------------------------------------------------------------------------------------------------------

    def _say(self, step: Step, line: bytes) -> None:
        if self._broken is not None:
            return
        if not self._reader.is_empty:
            # Its "answer" was sent before the question.
            self._break(_violation("the server spoke out of turn"))
            return
        self._expected.append(step)
        self._out.append(line)

    def _send_commands(self) -> None:
        """Move the sent cursor: to the end, or by one where the next hop wants to be asked one by one."""
        if self._sent == self._answered and not self._reader.is_empty:
            self._break(_violation("the server spoke out of turn"))
            return
        until = len(self._commands) if "PIPELINING" in self.extensions else self._sent + 1
        group = self._commands[self._sent : until]
        self._expected.extend([step for step, _ in group])
        self._out.append(b"".join([line for _, line in group]))
        self._sent = until

    def _take(self, reply: Reply) -> Event | None:
        """Match a reply with what was asked first."""
        if not self._expected:
            self._break(reply if reply.code == 421 else _violation("a reply to nothing"))
            return None
        step = self._expected.popleft()
        self.answers += 1
        if reply.is_positive and reply.code // 100 not in _YES[step]:
            self._break(_violation(f"a {reply.code} to {step.name}"))
            return None
        if reply.code == 421 and step is not Step.QUIT:
            # The whole channel is closing, whatever was asked (RFC 5321 §3.8).
            self._break(reply)
            return None
        if step is Step.EHLO and reply.is_positive:
            self._read_extensions(reply)
        if self._transaction is None:
            return Answered(step, reply)
        self._transaction.answered_any = True
        return self._take_in_transaction(step, reply, self._transaction)

    def _take_in_transaction(self, step: Step, reply: Reply, transaction: Transaction) -> Event | None:
        if step is Step.CONTENT:
            return self._take_verdict(_clip(reply), transaction)
        number = self._answered - (1 if self._commands[0][0] is Step.RSET else 0) - 1  # of the recipient
        self._answered += 1
        if step is Step.DATA:
            return self._take_data(reply, transaction)
        if step is Step.RSET:
            if not reply.is_positive:
                self._break(_violation(f"RSET was answered {reply.code}"))
                return None
            self._open = False
        elif step is Step.MAIL:
            self._mail_accepted = self._open = reply.is_positive
            if not reply.is_positive:
                transaction.decide_rest(_clip(reply))
        elif not reply.is_positive:
            transaction.verdicts[number] = transaction.verdicts[number] or _clip(reply)
        elif self._mail_accepted:
            transaction.accepted.add(number)
        else:
            self._break(_violation("a recipient was accepted without a sender"))
            return None
        if self._sent == len(self._commands):
            return None  # the rest of the group is under way
        last = self._sent == len(self._commands) - 1
        if (step is not Step.RSET and not self._mail_accepted) or (last and not transaction.accepted):
            return self._finish(transaction)
        self._send_commands()
        return None

    def _take_data(self, reply: Reply, transaction: Transaction) -> Event | None:
        if not reply.is_positive:
            transaction.decide_rest(_clip(reply))
            return self._finish(transaction)
        self._expected.append(Step.CONTENT)
        if transaction.accepted:
            self._encoder = DotEncoder()
            return SendContent()
        # It said 354 though it had refused all: an empty message to nobody ends this (RFC 2920 §3.1).
        self._out.append(b".\r\n")
        return None

    def _take_verdict(self, reply: Reply, transaction: Transaction) -> Event | None:
        if self._encoder is not None:
            # Said before it had seen the end. A yes to half a message is no yes.
            self._break(_violation("a reply before the end of data") if reply.is_positive else reply)
            return None
        transaction.decide_rest(reply)
        self._open = False
        return self._finish(transaction)

    def _finish(self, transaction: Transaction) -> Finished:
        self._transaction, self._commands = None, []
        return Finished(transaction)

    def _break(self, reply: Reply) -> None:
        if self._broken is None:
            if self._transaction is not None:
                self._transaction.decide_rest(_clip(reply))
            self._broken = Broken(reply, self._transaction)
            self._transaction, self._encoder, self._commands = None, None, []
            self._expected.clear()
            self._out.clear()
            self._reader.clear()

    def _read_extensions(self, reply: Reply) -> None:
        first, *others = reply.text.split("\n")
        self.remote_name = first.split(" ", 1)[0][:255]
        self.extensions = {}
        for line in others:
            keyword, _, parameters = line.strip().partition(" ")
            self.extensions[keyword.upper()] = parameters.strip()


@lru_cache(maxsize=512)
def _parse_line(line: bytes) -> Reply:
    # Cached: a next hop says the same few lines for each message.
    return Reply.parse([line])


def read_limits(extensions: Mapping[str, str]) -> dict[str, int]:
    """What LIMITS says, by upper-case name; what is no number, or none that leaves anything, says nothing (RFC 9422 §4)."""
    limits: dict[str, int] = {}
    for word in extensions.get("LIMITS", "").split()[:_MAX_LIMITS]:
        name, _, value = word.partition("=")
        if value.isascii() and value.isdigit() and 0 < int(value[:7]) < 1_000_000:
            limits[name.upper()] = int(value[:7])
    return limits


def _violation(text: str) -> Reply:
    return Reply(451, (4, 5, 0), f"Protocol error of the remote server: {text}")


def _clip(reply: Reply) -> Reply:
    """A verdict is kept with the recipient and told to people: 200 KB of it serve nobody."""
    if len(reply.text) <= MAX_VERDICT_CHARACTERS:
        return reply
    return Reply(reply.code, reply.status, reply.text[:MAX_VERDICT_CHARACTERS] + "...")
