# SPDX-License-Identifier: MIT
"""The pure SMTP engine as the peer of a dialogue, with a session that does what the header says.

Keys: `listener: mx | submission | lmtp`; `offers: KEYWORD ...` instead of what the role's listeners offer; `tls: none |
available | active`; `auth: always | tls | never` (when AUTH is offered); `login: NAME PASSWORD` (accepted credentials, may be
repeated); `refuse: GLOB CODE x.y.z TEXT` (what RCPT answers to a forward-path); `banner: CODE TEXT`; `front_end: yes`; any
integer of ServerSettings by its name.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Mapping
from typing import Any

import attrs

from polarismail.policy.wishes import WishSettings, grant
from polarismail.values import reply as replies
from polarismail.values.reply import Reply
from polarismail.wire import sasl
from polarismail.wire.smtp_events import (
    Auth,
    AuthResponse,
    Bdat,
    Content,
    Data,
    EndOfChunk,
    EndOfData,
    Event,
    Hello,
    Help,
    Mail,
    Quit,
    Rcpt,
    Refused,
    StartTls,
    Vrfy,
    XClient,
)
from polarismail.wire.smtp_parameters import DEFAULT_OFFERS
from polarismail.wire.smtp_server import SmtpServer
from polarismail.wire.smtp_states import ServerSettings, submission_settings

_SETTINGS = {attribute.name for attribute in attrs.fields(ServerSettings) if attribute.type in (int, "int")}
_ANSWERS: dict[type, Reply] = {
    Mail: replies.SENDER_OK,
    Rcpt: replies.RECIPIENT_OK,
    Data: replies.GO_AHEAD,
    Vrfy: replies.CANNOT_VERIFY,
    Help: Reply(214, (2, 0, 0), "See RFC 5321"),
    Quit: replies.GOODBYE,
    StartTls: replies.READY_FOR_TLS,
}


def build_engine(options: Mapping[str, str]) -> SmtpServer:
    """An engine as a header describes it."""
    numbers: dict[str, Any] = {
        name: int(value) for name, value in options.items() if name in _SETTINGS and name != "offers"
    }
    role = options.get("listener", "mx")
    submission = role == "submission"
    numbers["offers"] = frozenset(options["offers"].split() if "offers" in options else DEFAULT_OFFERS[role])
    numbers["lmtp"] = role == "lmtp"
    settings = submission_settings(**numbers) if submission else ServerSettings(**numbers)
    tls, auth = options.get("tls", "available"), options.get("auth", "tls")

    def mechanisms(tls_active: bool) -> tuple[str, ...]:
        return tuple(sasl.MECHANISMS) if auth == "always" or (auth == "tls" and tls_active) else ()

    engine = SmtpServer(
        settings, tls_available=tls == "available", tls_active=tls == "active", auth_mechanisms=mechanisms
    )
    engine.is_front_end = options.get("front_end") == "yes"
    return engine


class EnginePeer:
    """See the module. `messages` are the contents that were accepted, `events` everything that the engine gave."""

    def __init__(self, options: Mapping[str, str]) -> None:
        self.engine = build_engine(options)
        self.events: list[Event] = []
        self.messages: list[bytes] = []
        self.closed = False
        self._logins = {tuple(line.split(" ", 1)) for line in options.get("login", "").splitlines()}
        self._refusals = [_parse_refusal(line) for line in options.get("refuse", "").splitlines()]
        self._content = b""
        self._accepted = 0
        self._exchange: sasl.Mechanism | None = None
        code, _, text = options.get("banner", "220 test ESMTP").partition(" ")
        self._out = self.engine.answer(Reply(int(code), None, text))

    def send(self, octets: bytes) -> None:
        self.engine.receive(octets)
        while not self.closed:
            event = self.engine.next_event()
            if event is None:
                break
            self.events.append(event)
            self._out += self._perform(event)

    def read_line(self) -> bytes | None:
        if not self._out:
            assert self.closed, "the server says nothing"
            return None
        line, crlf, self._out = self._out.partition(b"\r\n")
        assert crlf, f"half a line: {line!r}"
        return line

    def is_quiet(self) -> bool:
        return not self._out and not self.closed

    def start_tls(self) -> None:
        assert not self._out, f"in clear, behind the reply to STARTTLS: {self._out!r}"
        self.engine.tls_started()

    def last_message(self) -> bytes | None:
        return self.messages[-1] if self.messages else b""

    def _perform(self, event: Event) -> bytes:
        engine = self.engine
        if isinstance(event, Content):
            self._content += event.octets
            return b""
        if isinstance(event, EndOfData):
            content, self._content = self._content, b""
            self.closed = event.closes
            if event.problem is None:
                assert event.size == len(content)
                self.messages.append(content)
            reply = event.problem or replies.OK
            # LMTP: the session counts the recipients; they are forgotten by the engine when the content ends.
            repeats = self._accepted - 1 if engine.settings.lmtp else 0
            return engine.answer(reply) + reply.octets * repeats
        if isinstance(event, Bdat):
            engine.read_chunks()
            return b""
        if isinstance(event, EndOfChunk):
            return engine.answer(event.problem or Reply(250, (2, 0, 0), f"{event.octets} octets received"))
        if isinstance(event, Refused):
            self.closed = event.closes
            return engine.answer(event.reply)
        if isinstance(event, Hello):
            reply = engine.ehlo_reply("test", time.time()) if event.verb != "HELO" else Reply(250, None, "test")
            return engine.answer(reply)
        if isinstance(event, Mail) and event.wishes is not None:
            return engine.answer(
                grant(event.wishes, is_known=engine.authenticated, now=time.time(), settings=WishSettings())[0]
            )
        if isinstance(event, Auth):
            self._exchange = sasl.MECHANISMS[event.mechanism]()
            return self._step(event.initial)
        if isinstance(event, AuthResponse):
            return engine.answer(replies.AUTH_CANCELLED) if event.octets is None else self._step(event.octets)
        if isinstance(event, XClient):
            octets = engine.answer(Reply(220, None, "test ESMTP"))
            engine.client_changed(authenticated=False)
            return octets
        self.closed = isinstance(event, Quit)
        if isinstance(event, Mail):
            self._accepted, self._content = 0, b""
        if isinstance(event, Rcpt):
            for glob, reply in self._refusals:
                if fnmatch.fnmatchcase(str(event.forward_path), glob):
                    return engine.answer(reply)
            self._accepted += 1
        return engine.answer(_ANSWERS.get(type(event), replies.OK))

    def _step(self, response: bytes | None) -> bytes:
        assert self._exchange is not None
        outcome = self._exchange.step(response)
        if isinstance(outcome, sasl.Challenge):
            return self.engine.challenge(outcome.octets)
        if isinstance(outcome, sasl.Malformed):
            return self.engine.answer(Reply(501, (5, 5, 2), outcome.reason))
        known = (outcome.authcid, outcome.password) in self._logins
        return self.engine.answer(replies.AUTHENTICATED if known else replies.BAD_CREDENTIALS)


def _parse_refusal(line: str) -> tuple[str, Reply]:
    glob, code, dotted, text = line.split(" ", 3)
    first, second, third = (int(number) for number in dotted.split("."))
    return glob, Reply(int(code), (first, second, third), text)
