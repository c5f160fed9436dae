# SPDX-License-Identifier: MIT
"""One scripted session that makes a server do everything once: what the systematic faults are aimed at.

It accepts (small and large, one and several recipients), delivers into maildirs, relays, puts off, bounces with a report to a
local account, and expires what is left when the clock is moved.
"""

from __future__ import annotations

import asyncio
import contextlib

from tests.crash.history import Answer, History
from tests.crash.load import ACCOUNTS, Client

LARGE = 100_000


async def play(history: History, mx: int, submission: int, *, seconds: float = 20.0) -> str:
    """Everything once; ends early where the server goes away. Returns the last reply that was not a yes, or ""."""
    stranger = Client(history, mx)
    account = Client(history, submission, login=ACCOUNTS[0])
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        return await asyncio.wait_for(_play(history, stranger, account), seconds)
    return ""


async def _play(history: History, stranger: Client, account: Client) -> str:
    no = ""
    async with stranger.connected() as first, account.connected() as second:
        for connection, octets, recipients in (
            (first, 1000, ACCOUNTS[:2]),
            (second, 1000, ("a@there.test", "b@never.test", "c@later.test", "d@expire.test", ACCOUNTS[3])),
            (first, LARGE, ACCOUNTS[1:3]),
            (first, LARGE, ACCOUNTS[4:5]),  # whose content becomes the maildir's file
            (second, LARGE, ("e@there.test", "f@busy.test")),
        ):
            sender = account.login if connection is second else "someone@else.test"
            message = history.begin(sender, octets)
            await connection.send(message, list(recipients))
            if message.answer is not Answer.YES:
                no = connection.last
    return no
