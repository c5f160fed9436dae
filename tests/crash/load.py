# SPDX-License-Identifier: MIT
"""Clients of a crash run: each sends what its seed says, through real sockets, and writes down every answer.

Strangers at the MX port: small and large messages for one to six accounts, some recipients that do not exist, content that
must be refused, bare line feeds. Accounts at the submission port: the remote's domains and our own in one message.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable

from attrs import define, field

from tests.crash.history import Answer, History, Message

DOMAIN = "here.test"
ACCOUNTS = tuple(f"user{number}@{DOMAIN}" for number in range(6))
PASSWORD = "correct horse"
_SMALL, _LARGE = (100, 4000, 12_000), (80_000, 250_000)
_REMOTE = ("there", "there", "there", "there", "later", "busy", "never", "full", "expire")


@define
class Client:
    """One client, for as long as `going()`. It connects again whenever the server is back."""

    history: History
    port: int
    random: random.Random = field(factory=random.Random)
    login: str = ""  # an account's address: at the submission port
    going: Callable[[], bool] = field(default=lambda: True)
    greeted: Callable[[], None] = field(default=lambda: None)

    async def run(self) -> None:
        """Returns after the last transaction is answered, or its connection is gone."""
        while self.going():
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await self._session()
            await asyncio.sleep(0.005)

    async def _session(self) -> None:
        async with self.connected() as connection:
            while self.going():
                await connection.send(*self._compose())

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Connection]:
        """A session, logged in where that is wanted. Raises OSError, asyncio.IncompleteReadError."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        connection = Connection(self.history, reader, writer)
        try:
            await connection.reply()
            self.greeted()
            await connection.command(b"EHLO client.test")
            if self.login:
                plain = base64.b64encode(f"\0{self.login}\0{PASSWORD}".encode())
                if await connection.command(b"AUTH PLAIN " + plain) // 100 != 2:
                    raise ConnectionError("no login")
            yield connection
        finally:
            writer.close()

    def _compose(self) -> tuple[Message, list[str]]:
        luck, pick = self.random.random(), self.random
        octets = pick.choice(_SMALL) if luck < 0.9 else pick.randrange(*_LARGE)
        local = pick.sample(ACCOUNTS, pick.choice((1, 1, 1, 2, 6)))
        if not self.login:
            refused = pick.random() < 0.03
            message = self.history.begin("someone@else.test", octets, bare=pick.random() < 0.1, refused=refused)
            return message, local + [f"nobody{message.number}@{DOMAIN}"] * (pick.random() < 0.1)
        message = self.history.begin(self.login, octets)
        kinds = [pick.choice(_REMOTE) for _ in range(pick.choice((1, 1, 2, 3)))]
        remote = [f"m{message.number}-{at}@{kind}.test" for at, kind in enumerate(kinds)]
        return message, remote + local * (pick.random() < 0.3)


@define
class Connection:
    """One session with the server, greeted."""

    history: History
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    last: str = ""  # the last reply's last line

    async def send(self, message: Message, wanted: list[str]) -> None:
        """One mail transaction; its answers go into `message`. Raises OSError, asyncio.IncompleteReadError."""
        commands = [f"MAIL FROM:<{message.reverse_path}>", *(f"RCPT TO:<{each}>" for each in wanted), "DATA"]
        self.writer.write("".join(f"{each}\r\n" for each in commands).encode())
        if await self.reply() // 100 != 2:
            raise ConnectionError(f"no mail transaction now: {self.last}")
        accepted = []
        for recipient in wanted:
            code = await self.reply()
            if code // 100 == 2:
                accepted.append(recipient)
            elif code // 100 == 5:
                message.strangers.append(recipient)
        if await self.reply() != 354:
            message.strangers += accepted
            return
        message.recipients = accepted
        self.writer.write(self._on_the_wire(message)[:-2])
        await self.writer.drain()
        message.answer = Answer.NONE
        self.writer.write(b"\r\n.\r\n")
        code = await self.reply()
        message.answer = {2: Answer.YES, 4: Answer.LATER}.get(code // 100, Answer.NO)
        if message.answer is Answer.YES:
            message.queue_id = self.last.rpartition(" ")[2]
            message.moment = time.monotonic()
            self.history.acknowledged += 1

    def _on_the_wire(self, message: Message) -> bytes:
        octets = message.content(self.history.seed)
        if message.refused:
            octets = octets[:-2] + b"\0\r\n"
        octets = octets.replace(b"\r\n.", b"\r\n..")
        return octets.replace(b"\r\nX-Crash", b"\nX-Crash", 1) if message.bare else octets

    async def command(self, line: bytes) -> int:
        """Say this; the code of the reply."""
        self.writer.write(line + b"\r\n")
        return await self.reply()

    async def reply(self) -> int:
        """The next reply's code. Raises asyncio.IncompleteReadError where the connection ends before it."""
        while True:
            line = await self.reader.readuntil(b"\n")
            if line[3:4] != b"-":
                self.last = line.decode().strip()
                return int(line[:3])
