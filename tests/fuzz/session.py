# SPDX-License-Identifier: MIT
"""Whole sessions: a scripted client and the server's engine, of every kind of listener, whole and in slices.

An input is a header of octets that decide (the settings of the engine, one field of ServerSettings after the other, so that
a new setting is varied from the day that it exists; TLS; AUTH; where to cut; what the policy answers), then what the client
says, in turns that 0xFF separates: a client that keeps to RFC 2920 waits for the replies to one turn before it begins the next.
Before the first 0xFF stands what comes before the greeting.

What must hold:

- nothing raises; each event is owed one reply, and gets exactly one;
- what waits in the engine is bounded by the longest command;
- the content is what the octet-by-octet specification says it is, and it ends where that says, or where BDAT said: not an
  octet of it is taken as a command, and no command as content;
- slices do not matter. A client that does not wait where it must is noticed by what stands behind its command when the
  command is read, or when it is answered. So the same input is played three times: whole; in slices with the answers to
  those commands held back until the turn has come (the same replies, always); and in slices with every answer given at
  once (the same replies wherever the client waited as it must).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import attrs

from polarismail.values import reply as replies
from polarismail.values.reply import Reply
from polarismail.wire import sasl, smtp_events
from polarismail.wire.smtp_client import ReplyReader
from polarismail.wire.smtp_parameters import DEFAULT_OFFERS, OFFERABLE
from polarismail.wire.smtp_server import SmtpServer
from polarismail.wire.smtp_states import ServerSettings, State, submission_settings
from tests.fuzz.slicing import Choices, cut
from tests.wire.test_framing import Specification

TURN = b"\xff"
KEYWORDS = (*OFFERABLE, "REQUIRETLS", "DELIVERBY")
# Small limits are met by small inputs.
NUMBERS = (None, 20, 60, 200, 1000)
_HINTS = get_type_hints(ServerSettings)
_FIELDS = [field for field in attrs.fields(ServerSettings) if field.name != "hostname"]
# What leaves no doubt; more is refused, and ends the session.
_BDAT = re.compile(rb"BDAT +([0-9]{1,9})(?: +[ -~\x80-\xff]*)?[ \t]*\r\n", re.IGNORECASE)
_LINE_END = re.compile(rb"\r\n|\r|\n")
_AUTH = ("never", "tls", "always")
_NO = (replies.TRY_AGAIN, replies.UNKNOWN_RECIPIENT, replies.NO_ROOM)
# A client must wait behind these; a 421 in their place would come before the engine can see whether it did.
_WAITED_FOR = (smtp_events.Hello, smtp_events.Data, smtp_events.StartTls)


@attrs.frozen
class Script:
    """One input, understood."""

    settings: ServerSettings
    tls: str
    auth: str
    clear_in_tls: bool  # octets come in clear between STARTTLS and the handshake
    front_end: bool  # the client may say XCLIENT
    verdicts: int  # which replies the policy gives
    cuts: int
    turns: tuple[bytes, ...]


def read(octets: bytes) -> Script:
    """Any octets are a script."""
    choices = Choices(octets)
    flags = choices.octet()
    verdicts, cuts = choices.octet(), choices.octet()
    given = {field.name: value for field in _FIELDS if (value := _choose(field, choices)) is not None}
    make: Any = submission_settings if flags & 1 else ServerSettings
    try:
        settings = make(**given)
    except ValueError:
        settings = make()
    tls = ("none", "available", "active", "available")[flags >> 1 & 3]
    turns = tuple(choices.rest().split(TURN))
    auth = _AUTH[(flags >> 3 & 3) % 3]
    return Script(settings, tls, auth, bool(flags & 64), bool(flags & 128), verdicts, cuts, turns)


def write(options: Mapping[str, str], turns: list[bytes], cuts: int = 7) -> bytes:
    """The input for a dialogue's options and turns."""
    flags = (1 if options.get("listener") == "submission" else 0) | (
        {"none": 0, "available": 1, "active": 2}[options.get("tls", "available")] << 1
    )
    flags |= _AUTH.index(options.get("auth", "tls")) << 3 | (128 if "front_end" in options else 0)
    role = options.get("listener", "mx")
    keywords = options["offers"].split() if "offers" in options else DEFAULT_OFFERS[role]
    header = bytearray((flags, 0, cuts))
    for field in _FIELDS:
        if _HINTS[field.name] == frozenset[str]:
            mask = sum(1 << at for at, keyword in enumerate(KEYWORDS) if keyword in keywords)
            header += bytes((mask & 255, mask >> 8))
        else:
            header.append(1 if field.name == "lmtp" and role == "lmtp" else 0)
    return bytes(header) + TURN.join([b"", *turns])


def _choose(field: Any, choices: Choices) -> Any:
    """A value for one setting; None: its default."""
    hint = _HINTS[field.name]
    if hint == frozenset[str]:
        mask = choices.octet() | choices.octet() << 8
        return frozenset(keyword for at, keyword in enumerate(KEYWORDS) if mask >> at & 1)
    octet = choices.octet()
    if hint is bool:
        return bool(octet & 1) if octet else None
    if get_origin(hint) is Literal:
        return get_args(hint)[octet % len(get_args(hint))] if octet else None
    return NUMBERS[octet % len(NUMBERS)] if hint is int else None


@attrs.define
class Playing:
    """One way through a script. `said`: every reply; `kept`: contents that may be stored."""

    script: Script
    slices: bool
    holds: bool
    engine: SmtpServer = attrs.field(init=False)
    said: list[bytes] = attrs.field(factory=list)
    kept: list[bytes] = attrs.field(factory=list)
    closed: bool = False
    _pieces: list[bytes] = attrs.field(factory=list)
    _held: Any = None
    _exchange: Any = None
    _content: Specification | None = None
    _decoded: bytes = b""
    _chunks: bytes | None = None  # what BDAT brought so far, as it was sent
    _received: bytes = b""  # by the engine, since the beginning
    _at: int = 0  # up to where events have used what was received
    _verdict: int = 0

    def __attrs_post_init__(self) -> None:
        script = self.script

        def mechanisms(tls_active: bool) -> tuple[str, ...]:
            offered = script.auth == "always" or (script.auth == "tls" and tls_active)
            return tuple(sasl.MECHANISMS) if offered else ()

        self.engine = SmtpServer(
            script.settings,
            tls_available=script.tls == "available",
            tls_active=script.tls == "active",
            auth_mechanisms=mechanisms,
        )
        self.engine.is_front_end = script.front_end
        self._verdict = script.verdicts

    def play(self) -> Playing:
        """From the connection to the end."""
        first, *turns = self.script.turns
        for piece in self._cut(first):
            self._receive(piece)
        self._say(self.engine.answer(Reply(220, None, "here")))
        self._pump(last=True)
        for turn in turns:
            if self.engine.state is State.TLS and not self.script.clear_in_tls:
                self.engine.tls_started()
            pieces = self._cut(turn)
            for at, piece in enumerate(pieces):
                if self.closed:
                    return self
                self._receive(piece)
                self._pump(last=at + 1 == len(pieces))
        return self

    def _cut(self, octets: bytes) -> list[bytes]:
        return cut(octets, self.script.cuts) if self.slices else [octets] if octets else []

    def _receive(self, piece: bytes) -> None:
        self.engine.receive(piece)
        self._received += piece
        if self._content is not None and self._content.rest is None:
            self._decoded += self._content.receive(piece)
        elif self._content is not None:
            assert self._content.rest is not None
            self._content.rest += piece

    def _pump(self, last: bool) -> None:
        engine = self.engine
        if self._held is not None:
            if not last:
                return
            event, self._held = self._held, None
            self._perform(event)
        while not self.closed:
            before = engine.state
            event = engine.next_event()
            if event is None:
                break
            if not isinstance(event, smtp_events.Content):
                self._judge_place(event, before)
            # Refused: it may be one of those commands, refused.
            if self.holds and not last and isinstance(event, (*_WAITED_FOR, smtp_events.Refused)):
                self._held = event
                return
            self._perform(event)
        if not self.closed:
            settings = self.script.settings
            longest = max(settings.max_command_octets, settings.max_auth_octets)
            assert engine.buffered <= longest + 1, f"{engine.buffered} octets wait"
            assert self._content is None or self._content.rest is None, "the end of data was not seen"

    def _perform(self, event: Any) -> None:
        engine = self.engine
        if isinstance(event, smtp_events.Content):
            assert event.octets, "an empty piece of content"
            self._pieces.append(event.octets)
            return
        if isinstance(event, smtp_events.Bdat):
            self._chunks, self._pieces = b"", []
            engine.read_chunks(None if self._policy(replies.OK).is_positive else replies.NO_ROOM)
            return
        if isinstance(event, smtp_events.EndOfChunk):
            self._say(engine.answer(event.problem or replies.OK))
        elif isinstance(event, smtp_events.EndOfData):
            (self._judge_content if self._content is not None else self._judge_chunks)(event)
            self.closed = event.closes
            self._say(engine.answer(event.problem or self._policy(replies.OK)))
        elif isinstance(event, smtp_events.Refused):
            self.closed = event.closes
            self._say(engine.answer(event.reply))
        elif isinstance(event, smtp_events.Auth):
            self._exchange = sasl.MECHANISMS[event.mechanism]()
            self._step(event.initial)
        elif isinstance(event, smtp_events.AuthResponse):
            if event.octets is None:
                self._say(engine.answer(replies.AUTH_CANCELLED))
            else:
                self._step(event.octets)
        elif isinstance(event, smtp_events.XClient):
            reply = self._policy(Reply(220, None, "here"))
            self._say(engine.answer(reply))
            if reply.is_positive:
                engine.client_changed(authenticated=False)
        elif isinstance(event, smtp_events.Quit):
            self.closed = True
            self._say(engine.answer(replies.GOODBYE))
        elif isinstance(event, _WAITED_FOR):
            reply = {
                smtp_events.Hello: lambda: engine.ehlo_reply("here"),
                smtp_events.Data: lambda: self._policy(replies.GO_AHEAD),
                smtp_events.StartTls: lambda: self._policy(replies.READY_FOR_TLS),
            }[type(event)]()
            self._say(engine.answer(reply))
            if engine.state is State.CONTENT:
                self._content, self._decoded, self._pieces = Specification(), b"", []
        else:
            reply = self._policy(replies.OK)
            if self._verdict & 0x1F == 0x1F:
                reply, self.closed = replies.SHUTTING_DOWN, True
            self._say(engine.answer(reply))

    def _step(self, response: bytes | None) -> None:
        outcome = self._exchange.step(response)
        if isinstance(outcome, sasl.Challenge):
            self._say(self.engine.challenge(outcome.octets))
        elif isinstance(outcome, sasl.Malformed):
            self._say(self.engine.answer(Reply(501, (5, 5, 2), outcome.reason)))
        else:
            good = self._policy(replies.AUTHENTICATED).is_positive
            self._say(self.engine.answer(replies.AUTHENTICATED if good else replies.BAD_CREDENTIALS))

    def _judge_place(self, event: Any, before: State) -> None:
        """A BDAT that can be understood has taken exactly as many octets as it said, whatever became of them."""
        at, self._at = self._at, len(self._received) - self.engine.buffered
        if self._content is not None or before is State.AUTH or getattr(event, "closes", False):
            return
        if isinstance(event, smtp_events.Bdat):
            self._at = at  # its octets are judged with its end
            return
        found = _BDAT.match(self._received, at)
        if found is None or len(found[0]) > self.script.settings.max_command_octets:
            assert not isinstance(event, smtp_events.EndOfChunk), "the end of no chunk"
            return
        end = found.end() + int(found[1])
        while self.script.settings.lmtp and self._at > end and (found := _BDAT.match(self._received, end)):
            end = found.end() + int(found[1])  # before it was one that nobody gets a reply to (RFC 2033 §4.3)
        if not self.script.settings.lmtp or isinstance(event, smtp_events.EndOfChunk):
            assert self._at == end, f"{self._at - end} octets behind a chunk were taken with it"
        if self._chunks is not None and isinstance(event, smtp_events.EndOfChunk | smtp_events.EndOfData):
            self._chunks += self._received[found.end() : end]

    def _judge_chunks(self, end: Any) -> None:
        chunks, self._chunks = self._chunks, None
        content, self._pieces = b"".join(self._pieces), []
        if end.problem is not None or chunks is None:
            assert chunks is not None or not content, "content of no chunk"
            return
        wanted = _LINE_END.sub(b"\r\n", chunks)
        bare = len(_LINE_END.findall(chunks)) - chunks.count(b"\r\n")
        wanted += b"" if wanted.endswith(b"\r\n") or not wanted else b"\r\n"
        assert content == wanted, "the content is not what the chunks held"
        assert (end.size, end.bare) == (len(content), bare), "miscounted"
        self.kept.append(content)

    def _judge_content(self, end: Any) -> None:
        specification, self._content = self._content, None
        assert specification is not None, "an end of data without data"
        content, self._pieces = b"".join(self._pieces), []
        if end.closes:
            assert end.problem is not None
            return
        assert specification.rest is not None, "the end of data came too early"
        assert len(specification.rest) == self.engine.buffered, "octets behind the end of data were lost, or won"
        assert (end.size, end.bare) == (len(self._decoded), specification.bare), "miscounted"
        if end.problem is None:
            assert content == self._decoded, "the content is not what was sent"
            self.kept.append(content)
        else:
            assert self._decoded.startswith(content), "some of the content was made up"

    def _policy(self, yes: Reply) -> Reply:
        """What somebody who decides would say: mostly yes."""
        state = self._verdict = (self._verdict * 1103515245 + 12345) & 0x7FFFFFFF if self._verdict else 0
        return _NO[(state >> 20) % 3] if state >> 16 & 7 == 1 else yes

    def _say(self, octets: bytes) -> None:
        if not octets:
            self.closed = False  # the engine has more to say: the client did not wait
            event = self.engine.next_event()
            assert isinstance(event, smtp_events.Refused) and event.reply is replies.OUT_OF_STEP, event
            self._perform(event)
            return
        reader = ReplyReader()
        reader.receive(octets)
        assert reader.next_reply() is not None and reader.is_empty, f"not one reply: {octets!r}"
        self.said.append(octets)


def check(octets: bytes) -> None:
    """Raises where a promise is broken."""
    script = read(octets)
    whole = Playing(script, slices=False, holds=False).play()
    held = Playing(script, slices=True, holds=True).play()
    assert (held.said, held.kept) == (whole.said, whole.kept), f"in slices: {held.said[-3:]}, whole: {whole.said[-3:]}"
    if not whole.engine.out_of_step:
        prompt = Playing(script, slices=True, holds=False).play()
        assert (prompt.said, prompt.kept) == (whole.said, whole.kept), (
            f"answered at once: {prompt.said[-3:]}, whole: {whole.said[-3:]}"
        )
        assert prompt.engine.state is whole.engine.state
