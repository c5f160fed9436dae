# SPDX-License-Identifier: MIT
"""A server whose n-th system call of one kind fails: what its clients read, and whether all is there afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import time

from attrs import define, field, frozen

from polarismail.testing_disk import Operation
from tests.crash.history import Answer, History, Verdict
from tests.crash.load import ACCOUNTS, Client
from tests.crash.points import Stage

PLACES = {"database": "state/polarismail.db", "counters": "state/counters.db", "spool": "state/spool", "mail": "mail/"}


@frozen
class Break:
    """`call` on a file of `place` (see PLACES) fails with `error`, from the n-th on, so many `times`.

    `once_up`: those of the server's start are not counted.
    """

    call: str
    place: str
    error: int
    nth: int = 1
    times: int = 1
    once_up: bool = True


@define
class Outcome:
    """What was seen. `replies`: the last reply of each message, "" where the connection ended without one."""

    fired: list[Operation] = field(factory=list)
    replies: list[str] = field(factory=list)
    probe: str = ""  # the last reply to one more message
    status: int | None = None  # the server's exit status where it ended by itself
    events: str = ""  # the event log of that life
    queued: int = 0  # recipients that wait at the end of that life
    verdict: Verdict = field(factory=Verdict)


MESSAGES: tuple[tuple[int, bool, tuple[str, ...]], ...] = (
    (1000, False, ACCOUNTS[:2]),
    (1000, True, ("a@there.test", "b@never.test", ACCOUNTS[3])),
    (100_000, False, ACCOUNTS[1:3]),
    (100_000, True, ("e@there.test", ACCOUNTS[1])),
    (100_000, False, ACCOUNTS[2:3]),  # a link, and one more to a maildir that is known to be durable
    (100_000, False, ACCOUNTS[2:3]),
)


async def send(stage: Stage, history: History, octets: int, login: bool, recipients: tuple[str, ...]) -> str:
    """One message on a connection of its own; the last reply, "" where there was none."""
    port = stage.world.ports["submission" if login else "mx"]
    client = Client(history, port, login=ACCOUNTS[0] if login else "")
    message = history.begin(ACCOUNTS[0] if login else "someone@else.test", octets)
    last = ""
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        async with asyncio.timeout(20), client.connected() as connection:
            try:
                await connection.send(message, list(recipients))
            finally:
                last = connection.last
    # A 354, or what the commands before it were told, is no answer to the message.
    return last if message.answer is not Answer.NONE and last[:1] != "3" else ""


async def break_and_recover(stage: Stage, seed: int, what: Break) -> Outcome:
    """A life with this fault; then one more message, while the server still runs; then a kill, a start, and the verdict."""
    outcome, history, seen, is_up = Outcome(), History(seed), 0, False

    def decide(operation: Operation) -> int | None:
        nonlocal seen
        path = operation.path.removeprefix(f"{stage.world.path}/")
        if operation.call != what.call or not path.startswith(PLACES[what.place]) or (what.once_up and not is_up):
            return None
        seen += 1
        if not what.nth <= seen < what.nth + what.times:
            return None
        outcome.fired.append(operation)
        history.faults.append(time.monotonic())
        return what.error

    stage.world.events.unlink(missing_ok=True)
    faults = await stage.begin(decide, history)
    is_up = True
    if stage.world.life is not None and stage.world.life.ended() is None:
        for octets, login, recipients in MESSAGES:
            outcome.replies.append(await send(stage, history, octets, login, recipients))
        await stage.attempts_made(1.0)
        outcome.probe = await send(stage, history, 500, False, ACCOUNTS[5:6])
        await stage.attempts_made(0.3)
    assert stage.world.life is not None
    outcome.status = stage.world.life.ended()
    outcome.queued = len(stage.world.queue())
    await asyncio.sleep(0.12)  # what is logged is written within 100 ms
    outcome.events = stage.world.events.read_text() if stage.world.events.exists() else ""
    history.faults.append(time.monotonic())
    await asyncio.to_thread(stage.world.kill)
    faults.join()
    outcome.verdict = await stage.settle(history)
    return outcome
