# SPDX-License-Identifier: MIT
"""Power cuts at random moments of a server under load: rounds of many cuts on one file system, then a reckoning.

A round: a fresh ext4; clients that never stop; after each cut the server's processes are killed, the file system is mounted
again, and the server starts with its clock a little later, so that what was put off is due. Some cuts come while it starts.
Once in a round the clock jumps by six days, so that messages expire. At the end clients stop, the queue runs empty, and every
promise of the round is looked up. Many cuts before one reckoning are cheap, and hide nothing: each acknowledged recipient is
known by name, and what a later cut could repair would have been repaired for a user as well.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from attrs import define, field, frozen

from tests.crash.disk import Disk
from tests.crash.history import History, Verdict, judge
from tests.crash.lives import Lives
from tests.crash.load import ACCOUNTS, Client
from tests.crash.remote import ZONE, Remote
from tests.crash.world import DAY, World
from tests.e2e.server import Helper

CUTS_IN_A_ROUND = 25


@frozen
class Settings:
    """How to run. `fresh_share`: so many of the lives are a new interpreter, which takes most of a second."""

    workers: int = 1
    clients: int = 6
    fresh_share: float = 0.04
    most_messages: int = 80  # acknowledged between a greeting and the cut
    longest_seconds: float = 1.0  # from the one to the other
    megaoctets: int = 384
    careless: str = ""  # see Lives.begin


def image_folder() -> Path:
    """Where file systems in files are quick."""
    return Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())


@define
class Run:
    """What all rounds share: the process that forks, a DNS server, and the remote."""

    settings: Settings
    folder: Path
    lives: Lives
    dns: Helper
    remote: Remote
    verdict: Verdict = field(factory=Verdict)
    cuts: int = 0

    @classmethod
    async def prepare(cls, settings: Settings) -> Run:
        """Start what is shared."""
        folder = Path(tempfile.mkdtemp(prefix="polarismail-crash-", dir=image_folder()))
        remote = Remote()
        await remote.listen()
        return cls(settings, folder, Lives(), Helper(folder, "dns", ZONE), remote)

    async def close(self) -> None:
        """End what is shared."""
        await self.remote.close()
        self.dns.stop()
        self.lives.close()
        if self.verdict.failures:
            print(f"logs and file systems of rounds that failed are kept in {self.folder}")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    async def round(self, seed: int, cuts: int, told: Callable[[int], None] = lambda cuts: None) -> Verdict:
        """One round; `told` hears after each cut. Adds to `verdict`, and returns this round's."""
        folder = self.folder / f"round-{seed}"
        disk = Disk(folder, megaoctets=self.settings.megaoctets)
        disk.mount()
        round_ = Round(self, seed, cuts, disk, told)
        try:
            verdict = await round_.run()
        finally:
            round_.end()
        if verdict.failures:
            verdict.failures = [f"seed {seed}: {failure}" for failure in verdict.failures]
        else:
            shutil.rmtree(folder)
        self.verdict.add(verdict)
        return verdict


class Round:
    """See above; used once."""

    def __init__(self, run: Run, seed: int, cuts: int, disk: Disk, told: Callable[[int], None]) -> None:
        self._run, self._disk, self._told, self._cuts = run, disk, told, cuts
        self._settings = run.settings
        self._random = random.Random(seed)
        self.history = run.remote.history = History(seed)
        run.remote.tries.clear()
        beside = disk.path.parent
        self.world = World(
            disk.path,
            beside,
            run.lives,
            dns_port=run.dns.port,
            remote_port=run.remote.port,
            workers=run.settings.workers,
        )
        self._going = True
        self._greeted = asyncio.Event()

    async def run(self) -> Verdict:
        """Cut, settle, judge."""
        await asyncio.to_thread(self._begin)
        clients = [asyncio.create_task(client.run()) for client in self._clients()]
        jump_at = self._random.randrange(self._cuts) if self._cuts > 1 else -1
        for number in range(self._cuts):
            await self._wait_for_the_moment()
            await asyncio.to_thread(self._cut, DAY * 6 if number == jump_at else self._random.uniform(1, 30))
            self._run.cuts += 1
            self._told(1)
        await self._wait(self._greeted.wait(), "a greeting after the last cut")
        await asyncio.sleep(0.3)
        self._going = False
        await self._wait(asyncio.gather(*clients), "the clients to end")
        await self._settle()
        return await asyncio.to_thread(self._reckon)

    def _clients(self) -> list[Client]:
        ports, made = self.world.ports, []
        for at in range(self._settings.clients):
            login = ACCOUNTS[at % len(ACCOUNTS)] if at % 2 else ""
            port = ports["submission" if login else "mx"]
            luck = random.Random(self._random.random())
            made.append(Client(self.history, port, luck, login, lambda: self._going, self._greeted.set))
        return made

    def _begin(self) -> None:
        self._greeted.clear()
        fresh = self._random.random() < self._settings.fresh_share
        self.world.begin(fresh=fresh, careless=self._settings.careless)

    async def _wait_for_the_moment(self) -> None:
        if self._random.random() < 0.12:
            await asyncio.sleep(self._random.uniform(0, 0.2))  # it is not up yet, or just so
            return
        await self._wait(self._greeted.wait(), "a greeting")
        # Counted in messages, so that a busy machine sees as much as an idle one. Squared: more of the moments are soon
        # after the start, when what was left is being delivered again.
        goal = self.history.acknowledged + int(self._settings.most_messages * self._random.random() ** 2)
        until = time.monotonic() + self._settings.longest_seconds
        while self.history.acknowledged < goal and time.monotonic() < until:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02 * self._random.random())

    def _cut(self, later: float) -> None:
        if self._random.random() < 0.3:
            self.world.read_some(self._random.random)
        life = self.world.life
        assert life is not None
        status = life.ended()
        if status is not None:
            raise AssertionError(f"the server ended by itself, with status {status}:\n{self.world.printed()}")
        # The processor stops with the disk: what a thread would do, or say, after a sync that was cut in two is not done.
        # Measured on Linux 6.18, three processes that append and fdatasync, 400 cuts: without this, 80 of 1,200 were told 0 by
        # an fdatasync that the shutdown overtook, and its octets were gone; with it none.
        life.freeze()
        self._disk.lose_power()
        life.kill()
        self.history.faults.append(time.monotonic())
        self.world.kill()
        self._disk.come_back("commit=1" if self._random.random() < 0.2 else "")
        self.world.clock_offset += later
        self._begin()

    async def _settle(self) -> None:
        """First without another jump, so that most is delivered; then whatever waits expires."""
        until = time.monotonic() + 2
        while time.monotonic() < until and self.world.count_messages():
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self._stop)
        self.world.clock_offset += 6 * DAY
        await asyncio.to_thread(self._begin)
        until = time.monotonic() + 60
        while self.world.count_messages() and time.monotonic() < until:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        self.world.wait_for_greeting()
        status = self.world.stop()
        # Twisted ends by the very signal that it was told to end by.
        assert status in (0, -15), f"the server stopped with status {status}:\n{self.world.printed()}"

    def _reckon(self) -> Verdict:
        places = self.world.look(self.history)
        verdict = judge(self.history, places)
        if places.queued:
            verdict.failures.append(f"the queue does not run empty: {sorted(places.queued)[:5]}")
        else:
            verdict.failures += [f"an orphan in the spool: {path}" for path in self.world.orphans()]
        if not verdict.acknowledged:
            verdict.failures.append("nothing was acknowledged in this round: it shows nothing")
        try:
            self._disk.unmount()
            self._disk.check()
        except OSError as problem:
            verdict.failures.append(str(problem))
        return verdict

    async def _wait(self, awaitable: object, what: str) -> None:
        try:
            await asyncio.wait_for(awaitable, 60)  # type: ignore[arg-type]
        except TimeoutError as problem:
            raise AssertionError(f"waited in vain for {what}:\n{self.world.printed()}") from problem

    def end(self) -> None:
        """Leave nothing running and nothing mounted."""
        self._going = False
        if self.world.life is not None:
            self.world.kill()
        if self._disk.path.is_mount():
            self._disk.unmount()
