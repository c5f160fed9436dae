# SPDX-License-Identifier: MIT
"""Honest clients that send one message after the other and know exactly which of them were accepted, and how fast.

Each message has a connection of its own: what is measured is the time from connect() to the 250 that takes the message.
"""

from __future__ import annotations

import smtplib
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

from attrs import define, field, frozen

_MARK = "X-Siege: "
_PATIENCE_SECONDS = 30.0
_PAUSE_SECONDS = 0.2


@frozen
class Sending:
    """One message: when it began (monotonic), how long it took, and why it was not accepted."""

    began: float
    seconds: float
    problem: str = ""


@define
class Honest:
    """One honest client in a thread of its own. `addresses`: where each of its connections comes from."""

    name: str
    port: int
    recipient: str
    addresses: Iterator[str]
    tls: ssl.SSLContext | None = None
    login: tuple[str, str] | None = None
    sent: list[Sending] = field(factory=list)
    accepted: list[str] = field(factory=list)
    _stopped: threading.Event = field(factory=threading.Event)
    _thread: threading.Thread | None = None

    def introduce(self) -> None:
        """Send one message before all others. Raises where it is not accepted."""
        self._send(f"{self.name}-first")
        self.accepted.append(f"{self.name}-first")

    def start(self) -> None:
        """Send until `stop`."""
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Begin no other message."""
        self._stopped.set()

    def wait(self) -> None:
        """See the last message to its end."""
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        for number in count():
            if self._stopped.is_set():
                return
            mark = f"{self.name}-{number}"
            began, problem = time.monotonic(), ""
            try:
                self._send(mark)
                self.accepted.append(mark)
            except (OSError, smtplib.SMTPException) as failure:
                problem = f"{type(failure).__name__}: {failure}"
            self.sent.append(Sending(began, time.monotonic() - began, problem))
            self._stopped.wait(_PAUSE_SECONDS)

    def _send(self, mark: str) -> None:
        address = next(self.addresses)
        client = smtplib.SMTP(timeout=_PATIENCE_SECONDS, local_hostname="honest.example", source_address=(address, 0))
        try:
            code, words = client.connect("127.0.0.1", self.port)
            if code != 220:
                raise smtplib.SMTPConnectError(code, words)
            client._host = "localhost"  # whom the certificate names
            client.ehlo()
            if self.tls is not None:
                client.starttls(context=self.tls)
                client.ehlo()
            if self.login is not None:
                client.login(*self.login)
            sender = self.login[0] if self.login is not None else "friend@honest.example"
            text = (
                f"From: <{sender}>\r\nTo: <{self.recipient}>\r\nSubject: hello\r\n{_MARK}{mark}\r\n\r\n"
                + "Text\r\n" * 100
            )
            client.sendmail(sender, [self.recipient], text)
        finally:
            client.close()


def marks_in(maildir: Path) -> list[str]:
    """The mark of each message that a maildir holds."""
    found = []
    for folder in ("new", "cur"):
        for path in (maildir / folder).glob("*"):
            for line in path.read_text("utf-8", "replace").splitlines():
                if line.startswith(_MARK):
                    found.append(line.removeprefix(_MARK))
                    break
    return found


def one_address(address: str) -> Iterator[str]:
    """Always the same: a server that one knows."""
    while True:
        yield address


def fresh_addresses(name: Callable[[int], str]) -> Iterator[str]:
    """Never the same twice: always a stranger."""
    return (name(number) for number in count())
