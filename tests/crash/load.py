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
from collections.abc import Callable

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
    random: random.Random
    login: str = ""  # an account's address: at the submission port
    going: Callable[[], bool] = field(default=lambda: True)
    greeted: Callable[[], None] = field(default=lambda: None)
    busy: bool = field(default=False, init=False)

    async def run(self) -> None:
        """Returns after the last transaction is answered, or its connection is gone."""
        while self.going():
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await self._session()
            await asyncio.sleep(0.005)

    async def _session(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            await _reply(reader)
            self.greeted()
            writer.write(b"EHLO client.test\r\n")
            await _reply(reader)
            if self.login:
                plain = base64.b64encode(f"\0{self.login}\0{PASSWORD}".encode())
                writer.write(b"AUTH PLAIN " + plain + b"\r\n")
                if await _reply(reader) // 100 != 2:
                    raise ConnectionError("no login")
            while self.going():
                await self._transaction(reader, writer)
        finally:
            writer.close()

    async def _transaction(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        message, wanted = self._compose()
        commands = [f"MAIL FROM:<{message.reverse_path}>", *(f"RCPT TO:<{each}>" for each in wanted), "DATA"]
        writer.write("".join(f"{each}\r\n" for each in commands).encode())
        if await _reply(reader) // 100 != 2:
            raise ConnectionError("no mail transaction now")
        accepted, strangers = [], []
        for recipient in wanted:
            code = await _reply(reader)
            if code // 100 == 2:
                accepted.append(recipient)
            elif code // 100 == 5:
                strangers.append(recipient)
        message.strangers = strangers
        if await _reply(reader) != 354:
            message.strangers += accepted
            return
        message.recipients = accepted
        octets = message.content(self.history.seed)
        if message.refused:
            octets = octets[:-2] + b"\0\r\n"
        stuffed = (octets[:1] == b"." and b"." or b"") + octets.replace(b"\r\n.", b"\r\n..")
        if message.bare:
            # In the header section, and in the last line: a line that begins with a dot is not touched.
            stuffed = stuffed.replace(b"\r\nX-Crash", b"\nX-Crash", 1)
        writer.write(stuffed[:-2])
        await writer.drain()
        message.answer = Answer.NONE
        writer.write(b"\r\n.\r\n")
        code, text = await _reply_text(reader)
        message.answer = {2: Answer.YES, 4: Answer.LATER}.get(code // 100, Answer.NO)
        if message.answer is Answer.YES:
            message.queue_id = text.rpartition(" ")[2]

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


async def _reply(reader: asyncio.StreamReader) -> int:
    return (await _reply_text(reader))[0]


async def _reply_text(reader: asyncio.StreamReader) -> tuple[int, str]:
    """Raises asyncio.IncompleteReadError where the connection ends before the reply."""
    while True:
        line = await reader.readuntil(b"\n")
        if line[3:4] != b"-":
            return int(line[:3]), line.decode().strip()
