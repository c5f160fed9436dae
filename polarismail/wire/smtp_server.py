# SPDX-License-Identifier: MIT
"""The server's side of SMTP, without I/O: octets in; events out, one at a time; replies to octets.

Guarantees: each event but Content is answered exactly once before the next is given; how the octets were sliced does not
matter; what the table of states does not allow is 503; no octet that came before TLS is used inside it; memory is bounded
by what the caller puts in between two calls of `next_event`.

Never: raises on what a client sends; knows policy (the caller asks policy between `next_event` and `answer`).

RFC 5321, RFC 1870, RFC 2033, RFC 2034, RFC 2920, RFC 3030, RFC 3207, RFC 4954, RFC 6152; HOSTILE F1-F9, F11, A7 and
section 2.
"""

from __future__ import annotations

import re
from binascii import b2a_base64
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

from attrs import evolve

from polarismail.values import reply as replies
from polarismail.values.reply import Reply
from polarismail.wire.content import ContentReader
from polarismail.wire.framing import ChunkDecoder, DotDecoder, LineProblem, LineReader
from polarismail.wire.smtp_chunks import Chunks
from polarismail.wire.smtp_commands import LINE_PROBLEMS, PARSE, refuse_out_of_order, refuse_unknown
from polarismail.wire.smtp_events import (
    Auth,
    AuthResponse,
    Bdat,
    Content,
    Data,
    EndOfData,
    Event,
    Hello,
    Mail,
    Quit,
    Rcpt,
    Refused,
    Rset,
    StartTls,
)
from polarismail.wire.smtp_grammar import decode_base64
from polarismail.wire.smtp_parameters import offered
from polarismail.wire.smtp_states import COMMAND_STATES, LEGAL, ServerSettings, State
from polarismail.wire.smtp_xclient import XCLIENT_KEYWORD, XFORWARD_KEYWORD

# Behind these a client must wait for the reply (RFC 2920 §3.1): what stands behind them is an attack (HOSTILE F6).
_LAST_OF_ITS_GROUP = frozenset({"EHLO", "HELO", "LHLO", "DATA", "STARTTLS"})
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

_OUT_OF_STEP = Refused(replies.OUT_OF_STEP, closes=True)
# An attribute of an Enum costs five times what a global name does, and a command looks at ten of them.
_CONNECTED, _GREETED, _READY, _MAIL, _RCPT, _BDAT, _CHUNK, _CONTENT, _AUTH, _TLS, _CLOSED = State


class SmtpServer:
    """One SMTP session's engine.

    Put octets in with `receive`; pull with `next_event` until it returns None; answer each event but Content with `answer`
    (or `challenge`, or `read_chunks`), and send what that returns. The banner is the first answer, owed before any event.

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
        self.state = _CONNECTED
        self.authenticated = False
        self.recipients = 0  # accepted in this transaction
        self.out_of_step = False
        self.is_front_end = False  # may say XCLIENT and XFORWARD: the caller knows
        self.tls_active = tls_active
        self.tls_available = tls_available
        self.auth_mechanisms = auth_mechanisms
        self._lines = LineReader(
            settings.max_command_octets,
            long_prefix=b"AUTH ",
            max_long_octets=settings.max_auth_octets,
            max_discarded_octets=settings.max_discarded_line_octets,
        )
        self._owed: Event | Literal["banner"] | None = "banner"
        self._next: Event | None = None  # decided already
        self._content: ContentReader | None = None
        self._chunks: Chunks | None = None
        self._resumes = _READY  # where a chunk outside of a transaction leads back to
        self.transaction: Mail | None = None
        self.tried_recipients = 0

    # -- octets in, events out ---------------------------------------------------------------------------------------

    @property
    def buffered(self) -> int:
        """Octets that wait to be read by `next_event`."""
        return len(self._lines)

    @property
    def content_octets(self) -> int:
        """Octets of the present content that have been read, kept or not; 0 outside of one."""
        reading = self._content or self._chunks
        return reading.received if reading is not None else 0

    def receive(self, octets: bytes) -> None:
        """Append to what waits. Nothing is parsed."""
        if self.state is _TLS:
            self._fall_out_of_step()  # in clear, behind the reply to STARTTLS
        elif self.state is not _CLOSED:
            self._lines.receive(octets)

    def next_event(self) -> Event | None:
        """What the client did next; None when more octets are needed, or the session is over."""
        if self._owed is not None:
            raise RuntimeError("the last event has not been answered")
        event = self._next
        if event is not None:
            self._next = None
        elif not self._lines.buffer:
            return None
        elif self.state is _CONTENT:
            event = self._read_content()
        elif self.state in _READING:
            event = self._read_command()
        elif self.state is _CHUNK:
            event = self._read_chunk()
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
                self._fall_out_of_step()
                return b""
        return reply.octets

    def challenge(self, octets: bytes) -> bytes:
        """Go on with an AUTH exchange: 334. The next event is AuthResponse, or Refused where it is no base64."""
        self._owed = None
        self.state = _AUTH
        return b"334 " + b2a_base64(octets, newline=False) + b"\r\n"

    def read_chunks(self, refusal: Reply | None = None) -> None:
        """Go on after Bdat. With a `refusal` nothing of this message is given out: its chunks are answered with that."""
        bdat, self._owed = self._owed, None
        assert type(bdat) is Bdat
        self._chunks = Chunks(self._make_reader(ChunkDecoder()) if refusal is None else None, refusal)
        self._next = self._start_chunk(self._chunks, bdat.octets, bdat.last)

    def ehlo_reply(self, greeting: str, now: float = 0.0) -> Reply:
        """The reply to EHLO: the extensions that are honoured right now. `greeting` is its first line; `now` is seconds since
        1970, for the end of what FUTURERELEASE takes."""
        settings = self.settings
        offers = settings.offers
        keywords = ["PIPELINING"] if "PIPELINING" in offers else []
        keywords.append(f"SIZE {settings.max_message_octets}")
        if self.tls_available and not self.tls_active:
            keywords.append("STARTTLS")
        mechanisms = () if self.authenticated else self.auth_mechanisms(self.tls_active)
        if mechanisms:
            keywords.append("AUTH " + " ".join(mechanisms))
        keywords += ["8BITMIME", "ENHANCEDSTATUSCODES", "HELP"]
        keywords += offered(offers, settings.max_recipients, settings.max_hold_seconds, now)
        if self.is_front_end:
            keywords += [XCLIENT_KEYWORD, XFORWARD_KEYWORD]
        return _ehlo_reply(greeting, "\n".join(keywords))

    def tls_started(self) -> None:
        """TLS begins: back to the state before EHLO, everything forgotten (RFC 3207 §4.2)."""
        self._lines.drop()
        self.tls_active, self.authenticated = True, False
        self.state = _GREETED
        self._forget_transaction()

    def client_changed(self, *, authenticated: bool) -> None:
        """A front end speaks for another client: back to the state before EHLO."""
        self.authenticated = authenticated
        self.state = _GREETED
        self._forget_transaction()

    # -- reading -----------------------------------------------------------------------------------------------------

    def _read_content(self) -> Event | None:
        reader = self._content
        assert reader is not None
        octets = self._lines.take()
        if not octets:
            return None
        piece = reader.receive(octets)
        limit = self.settings.max_message_octets + self.settings.max_discarded_octets
        if reader.received > limit:  # also where the end came in the same piece: slices do not matter
            end = EndOfData(reader.size, reader.bare, replies.TOO_BIG, closes=True)
        elif reader.rest is not None:
            self._lines.receive(reader.rest)
            end = EndOfData(reader.size, reader.bare, reader.problem)
        else:
            return Content(piece) if piece else None
        self._content = None
        self._forget_transaction()
        if piece:
            self._next = end
            return Content(piece)
        return end

    def begin_chunk(self, octets: int, last: bool | None) -> Event | None:
        """BDAT was read; `last` is None where it has a word too many. What it leads to, None when octets must come first."""
        settings = self.settings
        known = self.content_octets
        if octets + known > settings.max_message_octets + settings.max_discarded_octets:
            return Refused(replies.TOO_BIG, closes=True)
        chunks = self._chunks
        if self.state is _RCPT:
            if last is not None:
                return Bdat(octets, last)
            chunks = self._chunks = Chunks(None, replies.BAD_SYNTAX)
        elif self.state is not _BDAT or chunks is None:
            wanted = replies.BAD_SEQUENCE
            if self.tried_recipients and not settings.lmtp:
                wanted = replies.NO_VALID_RECIPIENTS
            self._resumes = self.state
            chunks = self._chunks = Chunks(None, wanted, outside=True)
        elif last is None:
            chunks.spoil(replies.BAD_SYNTAX)
        event = self._start_chunk(chunks, octets, bool(last))
        # A chunk of no octets has ended already, perhaps without a reply: what waits then is no chunk's.
        return self._read_chunk() if event is None and octets and self._lines else event

    def _start_chunk(self, chunks: Chunks, octets: int, last: bool) -> Event | None:
        chunks.begin(octets, last)
        self.state = _CHUNK
        return None if octets else self._end_chunk(chunks, b"")

    def _read_chunk(self) -> Event | None:
        chunks = self._chunks
        assert chunks is not None
        piece = chunks.receive(self._lines.take_at_most(chunks.left))
        if not chunks.left:
            return self._end_chunk(chunks, piece)
        return Content(piece) if piece else None

    def _end_chunk(self, chunks: Chunks, piece: bytes) -> Event | None:
        tail, end = chunks.end()
        piece += tail
        if chunks.outside:
            return self._end_outside_chunk(chunks, end)
        if chunks.is_last:
            self._forget_transaction()
        else:
            self.state = _BDAT
        if piece:
            self._next = end
            return Content(piece)
        return end

    def _end_outside_chunk(self, chunks: Chunks, refused: Event) -> Event | None:
        self._chunks, self.state = None, self._resumes
        if self.state is _MAIL and chunks.is_last:
            # What was pipelined behind it is the next transaction's.
            self._forget_transaction()
            if self.settings.lmtp:
                return self._read_command()  # as many replies as recipients: none (RFC 2033 §4.3)
        return refused

    def _read_command(self) -> Event | None:
        lines = self._lines
        exchange = self.state is _AUTH
        line = lines.next_line(exchange)
        if line is None:
            return None
        if isinstance(line, LineProblem):
            return self._refuse_line(line)
        if exchange:
            return self._read_response(line)
        text = line.decode("utf-8", "replace").rstrip(" \t")
        if not text.isprintable() and _CONTROL.search(text):
            # Behind a BDAT that nobody understands may be content.
            return Refused(replies.BAD_OCTET, closes=text[:4].upper() == "BDAT")
        verb, _, argument = text.partition(" ")
        if verb.isascii():  # else a letter that Unicode folds to one of ours would make a verb
            verb = verb.upper()
        waits = verb in _LAST_OF_ITS_GROUP
        if waits and lines:
            self.out_of_step = True
            return _OUT_OF_STEP
        parse = PARSE.get(verb)
        if parse is None:
            return refuse_unknown(verb)
        argument = argument.strip(" ")
        event = parse(self, argument) if self.state in LEGAL[verb] else refuse_out_of_order(self, verb, argument)
        if isinstance(event, Reply):
            event = Refused(event)
        # The refusal is waited for as well: what comes before it may be content.
        return evolve(event, waits=True) if waits and type(event) is Refused else event

    def _refuse_line(self, problem: LineProblem) -> Refused:
        if self.state is _AUTH:
            self.state = _READY
            if problem is LineProblem.TOO_LONG:
                return Refused(replies.AUTH_LINE_TOO_LONG)
        return LINE_PROBLEMS[problem]

    def _read_response(self, line: bytes) -> Event:
        self.state = _READY
        if line == b"*":
            return AuthResponse(None)
        octets = decode_base64(line)
        return AuthResponse(octets) if octets is not None else Refused(replies.BAD_BASE64)

    # -- what follows from a reply: False when the client did not wait for it ----------------------------------------

    def _follow_banner(self, _: Any, reply: Reply) -> bool:
        if self._lines:
            self.state = _GREETED
            return False
        # A 554 in the banner's place leaves nothing but QUIT (RFC 5321 §3.1); the caller closes.
        self.state = _GREETED
        return True

    def _follow_hello(self, _: Any, reply: Reply) -> bool:
        if reply.code < 400:
            self.state = _READY
            self._forget_transaction()
        return not self._lines

    def _follow_mail(self, mail: Any, reply: Reply) -> bool:
        if reply.code < 400:
            self.state, self.transaction = _MAIL, mail
            self.recipients = self.tried_recipients = 0
        return True

    def _follow_rcpt(self, _: Any, reply: Reply) -> bool:
        if reply.code < 400:
            self.state = _RCPT
            self.recipients += 1
        return True

    def _follow_data(self, _: Any, reply: Reply) -> bool:
        if self._lines:
            self._forget_transaction()
            return False
        if reply.code >= 400:
            self._forget_transaction()
        else:
            self.state = _CONTENT
            self._content = self._make_reader(DotDecoder())
        return True

    def _make_reader(self, decoder: DotDecoder | ChunkDecoder) -> ContentReader:
        settings = self.settings
        return ContentReader(
            decoder,
            max_octets=settings.max_message_octets,
            max_line_octets=settings.max_text_line_octets,
            refuse_bare=settings.bare_line_ends == "refuse",
            max_header_octets=settings.max_header_octets,
            max_header_lines=settings.max_header_lines,
        )

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
            self.state = _TLS
        return not self._lines

    def _follow_refused(self, refused: Any, _: Reply) -> bool:
        if refused.closes:
            self._close()
        return not (refused.waits and self._lines)

    def _follow_quit(self, _: Any, reply: Reply) -> bool:
        self._close()
        return True

    def _fall_out_of_step(self) -> None:
        """The client did not wait where it must: what it sent is dropped, and the connection with it (HOSTILE F6)."""
        self.out_of_step = True
        self._next = _OUT_OF_STEP
        self._lines.drop()

    def _forget_transaction(self) -> None:
        self.transaction = None
        self.recipients = self.tried_recipients = 0
        self._chunks = None
        if self.state in (_MAIL, _RCPT, _CONTENT, _BDAT, _CHUNK):
            self.state = _READY

    def _close(self) -> None:
        self.state = _CLOSED
        self._lines.drop()
        self._next = self._content = self._chunks = self.transaction = None


_READING = COMMAND_STATES | {_AUTH}


@lru_cache(maxsize=256)
def _ehlo_reply(greeting: str, keywords: str) -> Reply:
    return Reply(250, None, f"{greeting}\n{keywords}")


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
