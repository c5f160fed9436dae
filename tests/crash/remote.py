# SPDX-License-Identifier: MIT
"""The remote side of a crash run: takes, puts off or refuses by the recipient's domain, and forgets nothing.

    there.test   taken                          never.test   550 to RCPT
    later.test   451 to RCPT, once or twice     full.test    554 to the final dot
    busy.test    451 to the final dot, once     expire.test  451 to RCPT, for ever

It lives outside the file system whose power is cut, and keeps what it takes in the history before it says 250.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter

from tests.crash.history import Copy, History

DOMAINS = ("there.test", "later.test", "busy.test", "never.test", "full.test", "expire.test")
MX = "mx.remote.test"
ZONE = {MX: {"A": ["127.0.0.1"]}, **{domain: {"MX": [[10, MX]]} for domain in DOMAINS}}


class Remote:
    """An SMTP server on loopback. `history` is replaced for each run."""

    def __init__(self) -> None:
        self.history = History(0)
        self.tries: Counter[str] = Counter()
        self.port = 0
        self._server: asyncio.Server | None = None

    async def listen(self) -> None:
        """Bind to a free port."""
        self._server = await asyncio.start_server(self._session, "127.0.0.1", limit=32 << 20)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()

    async def _session(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await self._converse(reader, writer)
        writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        recipients: list[str] = []
        faults = len(self.history.faults)
        writer.write(b"220 mx.remote.test ESMTP\r\n")
        while line := await reader.readline():
            verb = line[:4].upper().strip()
            if verb == b"EHLO":
                writer.write(
                    b"250-mx.remote.test\r\n250-PIPELINING\r\n250-8BITMIME\r\n250-ENHANCEDSTATUSCODES\r\n250 SIZE\r\n"
                )
            elif verb == b"MAIL":
                recipients = []
                writer.write(b"250 2.1.0 ok\r\n")
            elif verb == b"RCPT":
                address = line.partition(b"<")[2].partition(b">")[0].decode()
                reply = self._judge_recipient(address)
                if reply.startswith(b"250"):
                    recipients.append(address)
                writer.write(reply)
            elif verb == b"DATA" and recipients:
                writer.write(b"354 go ahead\r\n")
                octets = await reader.readuntil(b"\r\n.\r\n")
                writer.write(self._take(recipients, octets[:-3], faults))
            elif verb == b"DATA":
                writer.write(b"554 5.5.1 no valid recipients\r\n")
            elif verb == b"QUIT":
                writer.write(b"221 2.0.0 bye\r\n")
                return
            else:
                writer.write(b"250 2.0.0 ok\r\n" if verb in (b"RSET", b"NOOP") else b"502 5.5.1 unknown\r\n")

    def _judge_recipient(self, address: str) -> bytes:
        domain = address.rpartition("@")[2]
        self.tries[address] += 1
        if domain == "never.test":
            return b"550 5.1.1 nobody by that name\r\n"
        if domain == "expire.test" or (domain == "later.test" and self.tries[address] <= 1 + len(address) % 2):
            return b"451 4.3.0 not today\r\n"
        return b"250 2.1.5 ok\r\n"

    def _take(self, recipients: list[str], octets: bytes, faults: int) -> bytes:
        domains = {address.rpartition("@")[2] for address in recipients}
        if "full.test" in domains:
            return b"554 5.3.4 no\r\n"
        if "busy.test" in domains and max(self.tries[address] for address in recipients) == 1:
            return b"451 4.3.0 busy\r\n"
        if octets.startswith(b".."):
            octets = octets[1:]
        number, problem = self.history.compare(octets.replace(b"\r\n..", b"\r\n."))
        moment = time.monotonic()
        self.history.taken += [Copy(number, address, problem, moment, faults) for address in recipients]
        return b"250 2.0.0 taken\r\n"
