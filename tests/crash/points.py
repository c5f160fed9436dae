# SPDX-License-Identifier: MIT
"""A fault at every write-like system call of one scripted session, one after the other: a SIGKILL, or a power cut.

The server is stopped by the kernel just before the n-th call on its file system, in whichever thread; there it is killed, or
the file system loses its power first. Then it is started again, settles, and every promise is looked up.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from attrs import define, field

from polarismail.testing_disk import FaultyDisk, Operation
from tests.crash import script
from tests.crash.disk import Disk
from tests.crash.history import History, Verdict, judge
from tests.crash.lives import Life, Lives
from tests.crash.remote import ZONE, Remote
from tests.crash.rounds import image_folder
from tests.crash.world import DAY, World
from tests.e2e.server import Helper

KILL, CUT = "kill", "power cut"


@define
class Points:
    """What was tried. `calls`: how often each system call was where it happened."""

    points: int = 0  # of a session without faults
    fired: int = 0
    calls: dict[str, int] = field(factory=dict)
    verdict: Verdict = field(factory=Verdict)

    @property
    def failures(self) -> list[str]:
        """Every broken promise."""
        return self.verdict.failures


@define
class Stage:
    """One server on one file system, on which the session is played again and again."""

    world: World
    remote: Remote
    disk: Disk | None  # None: a file system whose power cannot be cut
    life: Life | None = field(default=None, init=False)  # the last watched one, even while it is being stopped

    async def begin(self, decide: Callable[[Operation], int | None], history: History, **options: Any) -> FaultyDisk:
        """The first life of a server on its remembered disk, under this fault; returns once it greets, or has ended."""
        if self.disk is not None:
            self.disk.recall()
        self.remote.history = history
        self.remote.tries.clear()
        life = self.life = self.world.begin(watched=True, **options)
        assert life.listener is not None
        faults = FaultyDisk(life.listener, str(self.world.path), decide)
        until = time.monotonic() + 20
        while life.ended() is None and time.monotonic() < until:
            if await asyncio.to_thread(self._greets):
                break
            await asyncio.sleep(0.005)
        return faults

    async def play(self, decide: Callable[[Operation], int | None], history: History) -> FaultyDisk:
        """The same, and the scripted session, to its end or the server's. The life goes on where it was not killed."""
        faults = await self.begin(decide, history)
        if self.life is not None and self.life.ended() is None:
            await script.play(history, self.world.ports["mx"], self.world.ports["submission"])
        return faults

    def _greets(self) -> bool:
        try:
            return self.world.greets()
        except AssertionError:
            return False  # killed, as it should be

    async def attempts_made(self, seconds: float = 3.0) -> None:
        """Until nothing is queued but what was put off."""
        until = time.monotonic() + seconds
        life = self.world.life
        while life is not None and life.ended() is None and time.monotonic() < until:
            with contextlib.suppress(sqlite3.Error):  # the power goes while we look
                if self.world.count_messages() <= 2 and len(self.world.queue()) <= 3:
                    return
            await asyncio.sleep(0.01)

    async def settle(self, history: History) -> Verdict:
        """A life without faults until the queue is empty; then all promises are looked up."""
        self.world.clock_offset += 6 * DAY
        self.world.begin()
        await asyncio.to_thread(self.world.wait_for_greeting)
        until = time.monotonic() + 30
        while self.world.count_messages() and time.monotonic() < until:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(self.world.stop)
        verdict = judge(history, self.world.look(history))
        if self.world.queue():
            verdict.failures.append(f"the queue does not run empty: {self.world.queue()[:5]}")
        verdict.failures += [f"an orphan in the spool: {path}" for path in self.world.orphans()]
        return verdict


class Theatre:
    """What all stages need: the process that forks, a DNS server, the remote, a folder."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="polarismail-points-", dir=image_folder()))
        self.lives, self.remote = Lives(), Remote()
        self.dns = Helper(self.folder, "dns", ZONE)
        self._disks: list[Disk] = []
        self._worlds: list[World] = []

    async def open(self) -> Theatre:
        """Listen."""
        await self.remote.listen()
        return self

    def stage(
        self, workers: int = 1, path: Path | None = None, inodes: int | None = None, relay: str = "", schedule: str = ""
    ) -> Stage:
        """A server on an ext4 of its own, or on `path`. `relay`, `schedule`: keys of those tables."""
        disk = None
        beside = self.folder / f"stage-{len(self._worlds)}"
        if path is None:
            disk = Disk(beside, inodes=inodes)
            disk.mount()
            self._disks.append(disk)
            path = disk.path
        beside.mkdir(exist_ok=True)
        world = World(
            path,
            beside,
            self.lives,
            dns_port=self.dns.port,
            remote_port=self.remote.port,
            workers=workers,
            relay=relay,
            schedule=schedule,
        )
        self._worlds.append(world)
        if disk is not None:
            disk.remember()
        return Stage(world, self.remote, disk)

    async def close(self) -> None:
        """End it all."""
        for world in self._worlds:
            if world.life is not None:
                world.kill()
        for disk in self._disks:
            if disk.path.is_mount():
                disk.unmount()
        await self.remote.close()
        self.dns.stop()
        self.lives.close()
        shutil.rmtree(self.folder, ignore_errors=True)


async def count_points(stage: Stage, seed: int) -> tuple[list[Operation], Verdict]:
    """The operations of a session without faults, and the verdict on it: nothing came twice."""
    operations: list[Operation] = []

    def note(operation: Operation) -> None:
        operations.append(operation)

    history = History(seed)
    faults = await stage.play(note, history)
    await stage.attempts_made()
    await asyncio.to_thread(stage.world.stop)
    faults.join()
    verdict = await stage.settle(history)
    if verdict.duplicates:
        verdict.failures.append(f"something came twice without any fault: {dict(verdict.duplicates)}")
    return operations, verdict


async def try_point(stage: Stage, seed: int, number: int, what: str, points: Points) -> None:
    """One fault just before the n-th operation; counted in `points`. A session that was over before counts as not fired."""
    history = History(seed)
    at: list[Operation] = []

    def decide(operation: Operation) -> None:
        if operation.number == number:
            at.append(operation)
            assert stage.life is not None
            if what == CUT:
                assert stage.disk is not None
                stage.life.freeze()
                stage.disk.lose_power()
            stage.life.kill()
            history.faults.append(time.monotonic())

    faults = await stage.play(decide, history)
    if not at:
        await stage.attempts_made()
    await asyncio.to_thread(stage.world.kill if at else stage.world.stop)
    faults.join()
    if at and what == CUT and stage.disk is not None:
        stage.disk.come_back()
    verdict = await stage.settle(history)
    where = f"{at[0].call} of {at[0].path}" if at else "nowhere"
    verdict.failures = [f"{what} at operation {number} ({where}): {failure}" for failure in verdict.failures]
    points.verdict.add(verdict)
    if at:
        points.fired += 1
        points.calls[at[0].call] = points.calls.get(at[0].call, 0) + 1


FEWEST = 3
"""Points that even a slow machine tries."""


async def try_points(
    seed: int,
    workers: int,
    choose: Callable[[int], Sequence[tuple[int, str]]],
    told: Callable[[int], None],
    seconds: float,
) -> Points:
    """Count the points, and try those that `choose` names, for so many seconds, and `FEWEST` of them in any case."""
    theatre = await Theatre().open()
    points = Points()
    until = time.monotonic() + seconds
    try:
        stage = theatre.stage(workers)
        operations, verdict = await count_points(stage, seed)
        points.points = len(operations)
        points.verdict.add(verdict)
        for number, what in choose(len(operations)):
            if time.monotonic() > until and points.fired >= FEWEST:
                break
            await try_point(stage, seed, number, what, points)
            told(1)
    finally:
        await theatre.close()
    if not points.fired:
        points.failures.append("no fault fired: nothing was shown")
    return points


def run_all(seed: int, workers: int, told: Callable[[int], None]) -> Points:
    """Every point, a kill and a power cut at each."""
    return asyncio.run(
        try_points(
            seed, workers, lambda count: [(at, what) for at in range(1, count + 1) for what in (KILL, CUT)], told, 1e9
        )
    )


def run_some(seed: int, workers: int, seconds: float, told: Callable[[int], None] = lambda count: None) -> Points:
    """Points by chance, for so long."""
    luck = random.Random(seed)

    def choose(count: int) -> list[tuple[int, str]]:
        return [(at, luck.choice((KILL, CUT))) for at in luck.sample(range(1, count + 1), count)]

    return asyncio.run(try_points(seed, workers, choose, told, seconds))
