# SPDX-License-Identifier: MIT
"""A POP3 server on loopback for tests: real sockets and maildirs, and a portal of Twisted's own making.

Accounts: anna and bert (password `secret`); the name `down` meets a database that does not answer.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from attrs import evolve
from twisted.cred.checkers import ICredentialsChecker, InMemoryUsernamePasswordDatabaseDontUse
from twisted.cred.credentials import IUsernamePassword
from twisted.cred.portal import IRealm, Portal
from twisted.internet.defer import Deferred, fail
from twisted.protocols.tls import TLSMemoryBIOFactory
from zope.interface import implementer

from polarismail.net.contracts import TransportSettings
from polarismail.net.limits import ConnectionCounter, ConnectionLimits
from polarismail.net.listeners import Listener
from polarismail.net.shares import alone
from polarismail.net.tls import CertificateStore, make_self_signed
from polarismail.policy.limits import ClientLimits, RateLimits
from polarismail.serve.pop3 import MaildropDoors, Pop3Factory, Pop3SessionSettings, Pop3Settings
from polarismail.store import maildir as names
from polarismail.store.interfaces import Account
from polarismail.values.address import Mailbox
from polarismail.values.errors import Unavailable
from tests.reactor import reactor, run

ACCOUNTS = ("anna", "bert")


@implementer(ICredentialsChecker)
class Checker(InMemoryUsernamePasswordDatabaseDontUse):
    """Twisted's, but one name has a database that is down."""

    credentialInterfaces = (IUsernamePassword,)

    def requestAvatarId(self, credentials: Any) -> Deferred[Any]:
        if credentials.username == b"down":
            return fail(Unavailable("no answer"))
        return super().requestAvatarId(credentials)


@implementer(IRealm)
class Realm:
    """Gives each name its door."""

    def __init__(self, maildrops: MaildropDoors, uid: int | None) -> None:
        self._maildrops, self._uid = maildrops, uid
        self.logouts = 0

    def requestAvatar(self, avatarId: Any, mind: Any, *interfaces: Any) -> Any:
        name = avatarId.decode()
        account = Account(1, Mailbox(name, "example.org"), f"example.org/{name}", self._uid, None, "")
        door = self._maildrops.door(account, mind)

        def logout() -> None:
            self.logouts += 1
            door.logout()

        return interfaces[0], door, logout


class Pop3World:
    """One listener, and the maildirs behind it. Use as a context manager; settings go by keyword."""

    def __init__(
        self,
        folder: Path,
        *,
        tls: Any = "starttls",
        plaintext_auth: Any = "always",
        uid: int | None = None,
        session: Pop3SessionSettings | None = None,
        engine: Pop3Settings | None = None,
        transport: TransportSettings | None = None,
        rates: RateLimits | None = None,
        places: int = 100,
    ) -> None:
        self.root = folder / "mail"
        self.root.mkdir(exist_ok=True)
        self._pem = [str(folder / name) for name in ("cert.pem", "key.pem", "ca.pem")]
        if tls != "none" and not Path(self._pem[0]).exists():
            make_self_signed("localhost", self._pem[0], self._pem[1], ca_path=self._pem[2])
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.maildrops = MaildropDoors(reactor, str(self.root))
        self.realm = Realm(self.maildrops, uid)
        options = None if tls == "none" else CertificateStore(self._pem[0], self._pem[1])
        self.implicit = tls == "implicit"
        self.counter = ConnectionCounter(ConnectionLimits(total=places))
        self.factory = Pop3Factory(
            Portal(self.realm, [Checker(**dict.fromkeys(ACCOUNTS, b"secret"))]),
            listener=Listener("pop3", 0, "pop3", tls, "127.0.0.1", plaintext_auth, ("127.0.0.2/32",)),
            hostname="mail.example.org",
            reactor=reactor,
            tls_options=lambda: options,
            record_event=lambda name, fields: self.events.append((name, fields)),
            settings=engine,
            session_settings=session or evolve(Pop3SessionSettings(), soft_error_delay_seconds=0.0),
            transport_settings=transport or TransportSettings(),
            counter=self.counter,
            limits=rates
            and ClientLimits(rates, alone(), now=lambda: 8640000.0, record_event=lambda name, fields: None),
        )
        self._served: Any = TLSMemoryBIOFactory(options, False, self.factory) if self.implicit else self.factory

    def __enter__(self) -> Pop3World:
        self._port = run(lambda: reactor.listenTCP(0, self._served, interface="127.0.0.1"))
        self.port = self._port.getHost().port
        return self

    def __exit__(self, *_: Any) -> None:
        run(self._stop)

    async def _stop(self) -> None:
        await self._port.stopListening()
        for connection in list(self.factory.connections):
            connection.transport.abortConnection()
        gone: Deferred[None] = Deferred()
        reactor.callLater(0, gone.callback, None)
        await gone
        self.maildrops.stop()

    def client_tls(self) -> ssl.SSLContext:
        """A context that trusts the listener's certificate."""
        return ssl.create_default_context(cafile=self._pem[2])

    def put(self, name: str, octets: bytes, account: str = "anna", part: str = "new") -> Path:
        """Put a file into a maildir, as it lies on disk."""
        path = self.root / "example.org" / account
        names.create(str(path), str(self.root))
        (path / part / name).write_bytes(octets)
        return path / part / name

    def files(self, account: str = "anna") -> list[str]:
        """What is in new/ and cur/."""
        path = self.root / "example.org" / account
        return sorted(file.name for part in ("new", "cur") for file in (path / part).iterdir())
