# SPDX-License-Identifier: MIT
"""An SMTP server on loopback for tests: real sockets, Twisted's own checker (ann, `secret`), and a reception whose answers
can be held back, so that a client may do anything while one is awaited.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from twisted.cred.checkers import AllowAnonymousAccess, ICredentialsChecker, InMemoryUsernamePasswordDatabaseDontUse
from twisted.cred.error import UnauthorizedLogin
from twisted.cred.portal import IRealm, Portal
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import deferLater
from twisted.logger import globalLogPublisher
from twisted.protocols.tls import TLSMemoryBIOFactory
from zope.interface import implementer

from polarismail.auth.interfaces import IReception, IVouchedCredentials
from polarismail.net.contracts import TransportSettings
from polarismail.net.limits import ConnectionCounter, ConnectionLimits
from polarismail.net.listeners import Listener
from polarismail.net.shares import alone
from polarismail.net.tls import CertificateStore, make_self_signed
from polarismail.policy.limits import ClientLimits, RateLimits
from polarismail.serve.smtp import ESMTPFactory
from polarismail.serve.smtp_context import SessionSettings
from polarismail.store.interfaces import IDraft
from polarismail.values import reply as replies
from polarismail.values.address import Mailbox
from polarismail.values.envelope import Recipient
from polarismail.values.errors import Unavailable
from polarismail.values.reply import Reply
from polarismail.wire.smtp_states import ServerSettings
from tests.reactor import reactor, run


def eventually(condition: Callable[[], Any], what: str, seconds: float = 10) -> Any:
    """Wait until `condition()` is true, and return it."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, f"waited in vain: {what}"
        time.sleep(0.01)
    return found


@implementer(IDraft)
class Draft:
    """Content in memory that knows its fate."""

    queue_id = "0"
    trace = b""

    def __init__(self, world: SmtpWorld) -> None:
        self.world, self.octets, self.abandoned = world, b"", 0

    @property
    def size(self) -> int:
        return len(self.octets)

    def write(self, octets: bytes) -> Deferred[None] | None:
        self.octets += octets
        return self.world.answer("write", None)

    def head(self, octets: int) -> bytes:
        return self.octets[:octets]

    def abandon(self) -> None:
        self.abandoned += 1


@implementer(IReception)
class Reception:
    """Says yes, when the world lets it."""

    def __init__(self, world: SmtpWorld, name: str) -> None:
        self.world, self.name, self.account = world, name, None

    def check_mail(self, facts: Any, mail: Any) -> Any:
        self.world.facts.append(facts)
        return self.world.answer("mail", replies.SENDER_OK)

    def check_rcpt(self, facts: Any, envelope: Any, rcpt: Any) -> Any:
        path = rcpt.forward_path
        self.world.envelopes.append(envelope)
        if path.local.startswith("unknown"):
            return replies.UNKNOWN_RECIPIENT, ()
        if path.local.startswith("later"):
            return replies.GREYLISTED, ()
        if self.name == "stranger" and path.domain != "here.test":
            return replies.RELAY_DENIED, ()
        # all@ stands for two recipients, one of which may have an address of its own, too.
        targets = (path,) if path.local != "all" else (Mailbox("bob", path.domain), Mailbox("eve", path.domain))
        recipients = tuple(Recipient(target, path, path.domain) for target in targets)
        return self.world.answer("rcpt", (replies.RECIPIENT_OK, recipients))

    def begin_content(self, facts: Any, envelope: Any) -> Draft:
        if self.world.draft_error is not None:
            raise self.world.draft_error
        self.world.drafts.append(Draft(self.world))
        return self.world.drafts[-1]

    def end_of_data(self, facts: Any, envelope: Any, draft: Draft, end: Any) -> Any:
        if end.problem is not None:
            draft.abandon()
            return succeed(end.problem)
        done = self.world.answer("commit", replies.OK)
        done = done if isinstance(done, Deferred) else succeed(done)

        def committed(reply: Reply) -> Reply:
            self.world.messages.append((facts, envelope, draft.octets))
            return reply

        return done.addCallback(committed)


@implementer(IRealm)
class Realm:
    def __init__(self, world: SmtpWorld) -> None:
        self.world = world

    def requestAvatar(self, avatarId: Any, mind: Any, *interfaces: Any) -> Any:
        name = avatarId.decode() if isinstance(avatarId, bytes) else "stranger"
        self.world.logins.append(name)
        login = IReception, Reception(self.world, name), lambda: self.world.logouts.append(name)
        return self.world.answer("login", login)


@implementer(ICredentialsChecker)
class Vouching:
    """Knows ann, whoever vouches for her."""

    credentialInterfaces = (IVouchedCredentials,)

    def requestAvatarId(self, credentials: Any) -> Any:
        if credentials.authcid == "broken":
            raise Unavailable("the directory is away")
        if credentials.authcid != "ann":
            raise UnauthorizedLogin
        return b"ann"


class SmtpWorld:
    """One listener. Use as a context manager; settings go by keyword.

    `hold` names stages (login, mail, rcpt, write, commit) whose answers wait for `release(stage)`; `fail` those that raise.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        tls: Any = "none",
        plaintext_auth: Any = "always",
        role: Any = "mx",
        session: SessionSettings | None = None,
        engine: ServerSettings | None = None,
        transport: TransportSettings | None = None,
        limits: ConnectionLimits | None = None,
        rates: RateLimits | None = None,
        xclient_networks: tuple[str, ...] = (),
    ) -> None:
        self.hold: set[str] = set()
        self.fail: set[str] = set()
        self.held: dict[str, list[tuple[Deferred[Any], Any]]] = {}
        self.drafts: list[Draft] = []
        self.draft_error: Exception | None = None
        self.messages: list[tuple[Any, Any, bytes]] = []
        self.facts: list[Any] = []
        self.envelopes: list[Any] = []
        self.logins: list[str] = []
        self.logouts: list[str] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.logged: list[dict[str, Any]] = []
        options = None
        if tls != "none":
            assert folder is not None
            pem = [str(folder / name) for name in ("cert.pem", "key.pem", "ca.pem")]
            make_self_signed("localhost", pem[0], pem[1], ca_path=pem[2])
            options = CertificateStore(pem[0], pem[1])
            self.client_tls = ssl.create_default_context(cafile=pem[2])
        self.now = 1000.0 * 86400  # for rates
        self.implicit = tls == "implicit"
        self.counter = ConnectionCounter(limits or ConnectionLimits())
        judge = None
        if rates is not None:
            judge = ClientLimits(rates, alone(), now=lambda: self.now, record_event=self._record_event)
            self.counter.trusted, self.counter.may_connect = judge.trusted, judge.may_connect
        self.factory = ESMTPFactory(
            Portal(
                Realm(self),
                [InMemoryUsernamePasswordDatabaseDontUse(ann=b"secret"), Vouching(), AllowAnonymousAccess()],
            ),
            listener=Listener(
                "smtp",
                0,
                role,
                tls,
                "127.0.0.1",
                plaintext_auth,
                ("127.0.0.2/32",),
                xclient_networks=xclient_networks,
            ),
            hostname="mail.here.test",
            reactor=reactor,
            tls_options=lambda: options,
            record_event=self._record_event,
            settings=engine,
            session_settings=session or SessionSettings(soft_error_delay_seconds=0.0),
            transport_settings=transport or TransportSettings(),
            counter=self.counter,
            limits=judge,
        )
        self._served: Any = TLSMemoryBIOFactory(options, False, self.factory) if self.implicit else self.factory

    def __enter__(self) -> SmtpWorld:
        globalLogPublisher.addObserver(self._observe)
        self._port = run(lambda: reactor.listenTCP(0, self._served, interface="127.0.0.1"))
        self.port = self._port.getHost().port
        return self

    def __exit__(self, *_: Any) -> None:
        run(self._stop)
        globalLogPublisher.removeObserver(self._observe)

    async def _stop(self) -> None:
        await self._port.stopListening()
        for connection in list(self.factory.connections):
            connection.transport.abortConnection()
        await deferLater(reactor, 0.01)

    def _record_event(self, name: str, fields: dict[str, Any]) -> None:
        self.events.append((name, fields))

    def _observe(self, event: dict[str, Any]) -> None:
        if event.get("log_failure") is not None:
            self.logged.append(event)

    def answer(self, stage: str, value: Any) -> Any:
        """What a stage returns: the value now, later, or never."""
        if stage in self.fail:
            raise RuntimeError(f"{stage} is broken")
        if stage not in self.hold:
            return value
        waiting: Deferred[Any] = Deferred()
        self.held.setdefault(stage, []).append((waiting, value))
        return waiting

    def wait_for(self, stage: str) -> None:
        """Wait until an answer of this stage is held."""
        eventually(lambda: self.held.get(stage), f"{stage} to be asked")

    def release(self, stage: str, outcome: Any = None) -> None:
        """Let the answers of a stage come: the value, or `outcome` (an exception fails it)."""

        def come() -> None:
            for waiting, value in self.held.pop(stage, []):
                if isinstance(outcome, Exception):
                    waiting.errback(outcome)
                else:
                    waiting.callback(value if outcome is None else outcome)

        run(come)

    @property
    def connections(self) -> int:
        """Connections that are counted now."""
        return int(run(lambda: self.counter.total))

    def wait_until_empty(self) -> None:
        """Wait until no connection is left, and nothing was counted twice."""
        eventually(lambda: self.connections == 0, "the last connection to go")
        assert not self.factory.connections

    @contextlib.contextmanager
    def client(self, *, hello: bool = True, tls: bool | None = None) -> Iterator[Client]:
        """A client that was greeted."""
        raw = socket.create_connection(("127.0.0.1", self.port), 10)
        client = Client(raw, self)
        try:
            if self.implicit if tls is None else tls:
                client.start_tls()
            assert client.reply() == 220
            if hello:
                client.hello()
            yield client
        finally:
            client.socket.close()


class Client:
    """Speaks in octets, reads replies."""

    def __init__(self, raw: socket.socket, world: SmtpWorld) -> None:
        self.socket, self._world, self._buffer, self.lines = raw, world, b"", [""]
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def start_tls(self) -> None:
        self.socket = self._world.client_tls.wrap_socket(self.socket, server_hostname="localhost")

    def hello(self) -> list[str]:
        """EHLO; the lines of the reply."""
        assert self.say("EHLO me.test") == 250
        return self.lines

    def send(self, octets: bytes) -> None:
        self.socket.sendall(octets)

    def say(self, line: str) -> int | None:
        """One command, its reply's code."""
        self.send(line.encode() + b"\r\n")
        return self.reply()

    def reply(self) -> int | None:
        """The code of the next reply, whose texts are then in `lines`; None when the server has closed."""
        self.lines = []
        while True:
            while b"\r\n" not in self._buffer:
                try:
                    octets = self.socket.recv(65536)
                except ConnectionResetError:
                    octets = b""
                if not octets:
                    assert not self.lines and not self._buffer, "closed within a reply"
                    return None
                self._buffer += octets
            line, _, self._buffer = self._buffer.partition(b"\r\n")
            self.lines.append(line[4:].decode())
            if line[3:4] != b"-":
                return int(line[:3])

    def begin(self, recipient: str = "bob@here.test") -> None:
        """MAIL, RCPT, DATA."""
        self.send(f"MAIL FROM:<a@b.test>\r\nRCPT TO:<{recipient}>\r\nDATA\r\n".encode())
        assert [self.reply() for _ in range(3)] == [250, 250, 354]
