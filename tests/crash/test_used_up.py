# SPDX-License-Identifier: MIT
"""Disk, inodes and descriptors used up, and clocks that jump: HOSTILE E1, E3 and E5 against the real server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from tests.crash.breaks import send
from tests.crash.history import Answer, History
from tests.crash.load import ACCOUNTS, Client
from tests.crash.points import Stage, Theatre

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
HOUR = 3600
YES, FULL = "250 2.0.0", "452 4.3.1"


@pytest.fixture
def tmpfs(power: None, tmp_path: Path) -> Iterator[Path]:
    """An empty file system in memory, mounted with what the test's parameter says."""
    path = tmp_path / "memory"
    path.mkdir()
    yield path
    subprocess.run(["umount", "-l", str(path)], capture_output=True)


def mount(path: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "polarismail-crash", str(path)], check=True)


def fill(path: Path, *, inodes: bool) -> list[Path]:
    """Use everything up; the files that did it."""
    made: list[Path] = []
    with contextlib.suppress(OSError):
        while True:
            made.append(path / f"filler-{len(made)}")
            with open(made[-1], "wb", buffering=0) as file:
                while not inodes and file.write(b"x" * 65536):
                    pass
    return made


def begin(stage: Stage, history: History, **options: object) -> None:
    stage.remote.history = history
    stage.remote.tries.clear()
    stage.world.begin(**options)
    stage.world.wait_for_greeting()


@pytest.mark.parametrize("kind", ["octets of a tmpfs", "inodes of a tmpfs", "inodes of an ext4"])
def test_what_is_used_up_refuses_new_mail_and_lets_the_old_go(
    kind: str, theatre: Theatre, runner: asyncio.Runner, tmpfs: Path
) -> None:
    """HOSTILE E1: 452 4.3.1, the server lives, what was promised is kept, and with room again mail is taken."""
    inodes = kind.startswith("inodes")
    if kind.endswith("tmpfs"):
        mount(tmpfs, "size=400m,nr_inodes=80" if inodes else "size=40m")
        stage = theatre.stage(path=tmpfs)
    else:
        stage = theatre.stage(inodes=96)
    history = History(1)
    begin(stage, history)

    async def one(octets: int, *recipients: str) -> str:
        return (await send(stage, history, octets, True, recipients))[:9]

    async def play() -> None:
        assert await one(1000, ACCOUNTS[0], "a@there.test") == YES
        assert await one(1000, "c@later.test") == YES  # is there when the disk is full
        filler = fill(stage.world.path, inodes=inodes)
        replies = [await one(100_000, ACCOUNTS[1]) for _ in range(4)]
        replies += [await one(20_000, "b@there.test") for _ in range(60 if not inodes else 3)]
        assert set(replies) <= {YES, FULL} and FULL in replies, set(replies)
        assert stage.world.life is not None and stage.world.life.ended() is None
        for file in filler:
            file.unlink(missing_ok=True)
        until = time.monotonic() + 20
        while await one(100_000, ACCOUNTS[1]) != YES:
            assert time.monotonic() < until, "there is room again, and no mail is taken"
            await asyncio.sleep(0.2)

    runner.run(play())
    runner.run(asyncio.to_thread(stage.world.stop))
    verdict = runner.run(stage.settle(history))
    assert not verdict.failures and not verdict.duplicates, verdict


def test_too_few_descriptors_never_end_the_server(theatre: Theatre, runner: asyncio.Runner) -> None:
    """HOSTILE E3: clients wait or are turned away; when they are gone, mail is taken again, and none was lost."""
    stage = theatre.stage(relay="[connections]\nper_address = 1000\n")
    history = History(2)
    begin(stage, history, descriptors=120)
    held: list[socket.socket] = []
    greeted = 0
    try:
        for _ in range(120):
            client = socket.socket()
            client.settimeout(0.1 if greeted > 20 else 5)
            held.append(client)
            with contextlib.suppress(OSError):
                client.connect(("127.0.0.1", stage.world.ports["mx"]))
                greeted += client.recv(3) == b"220"
        assert 20 < greeted < 110, f"{greeted} of 120 were greeted with 120 descriptors: this shows nothing"
        time.sleep(0.5)
        assert stage.world.life is not None and stage.world.life.ended() is None, stage.world.printed()
    finally:
        for client in held:
            client.close()
    replies = []
    until = time.monotonic() + 20
    while not replies or replies[-1][:9] != YES:
        assert time.monotonic() < until, f"no mail is taken any more: {replies[-3:]}\n{stage.world.printed()}"
        replies.append(runner.run(send(stage, history, 100_000, True, ("a@there.test", ACCOUNTS[0]))))
        time.sleep(0.1)
    runner.run(asyncio.to_thread(stage.world.stop))
    verdict = runner.run(stage.settle(history))
    assert not verdict.failures, verdict


@pytest.mark.parametrize("jump", [HOUR, -HOUR], ids=["forward", "back"])
def test_a_clock_that_jumps_disturbs_nobody(jump: int, theatre: Theatre, runner: asyncio.Runner) -> None:
    """HOSTILE E5: sessions go on, nothing waits longer than the longest wait, nothing is lost."""
    if not FAKETIME.exists():
        pytest.skip("libfaketime is not installed")
    schedule = "longest_wait_seconds = 600.0\nother_seconds = 600.0\ngreylisted_seconds = 600.0\n"
    stage = theatre.stage(relay="look_seconds = 1.0\n", schedule=schedule)
    clock = stage.world.log.with_name("clock")
    clock.write_text("+0")
    environment = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    history = History(3)
    begin(stage, history, fresh=True, environment=environment)

    async def until(condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end, f"waited in vain for {what}:\n{stage.world.printed()}"
            await asyncio.sleep(0.02)

    async def play() -> None:
        async with Client(history, stage.world.ports["mx"]).connected() as open_before:
            assert (await send(stage, history, 1000, True, ("a@later.test",)))[:9] == YES
            await until(lambda: max(stage.world.due_times(), default=0) > time.time() + 300, "the deferral")
            clock.write_text(f"{jump:+d}")
            message = history.begin("someone@else.test", 1000)
            await open_before.send(message, [ACCOUNTS[0]])
            assert message.answer is Answer.YES, open_before.last
            # The interpreter's clock did move: the log has the time of day.
            await until(lambda: message.queue_id in stage.world.events.read_text(), "the event")
            (line, *_) = (line for line in stage.world.events.read_text().splitlines() if message.queue_id in line)
            moved = datetime.fromisoformat(json.loads(line)["time"]).timestamp() - time.time()
            assert 0.9 < moved / jump < 1.1, "the clock of the process did not jump: this shows nothing"
            assert (await send(stage, history, 1000, True, ("b@there.test", ACCOUNTS[1])))[:9] == YES
            # Ten minutes of the old clock are over, or count as such.
            await until(lambda: len(history.taken) == 2, "what was sent, and what was put off")
            await until(lambda: not stage.world.count_messages(), "the outcomes")

    runner.run(play())
    assert stage.world.life is not None and stage.world.life.ended() is None
    stage.world.kill()  # libfaketime makes a thread's last wait long
    verdict = runner.run(stage.settle(history))
    assert not verdict.failures and not verdict.duplicates, verdict
