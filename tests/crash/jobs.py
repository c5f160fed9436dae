# SPDX-License-Identifier: MIT
"""Rounds of power cuts in several processes at a time; what each finds comes back over a queue, as it happens."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import queue
import time
from collections.abc import Callable
from typing import Any

from tests.crash.history import Verdict
from tests.crash.rounds import CUTS_IN_A_ROUND, Run, Settings


def cut_in_jobs(
    seed: int, cuts: int, jobs: int, workers: int, seconds: float, told: Callable[[int], None]
) -> tuple[Verdict, int]:
    """So many cuts, in rounds whose seeds go up from `seed`, for so many seconds at most; (the verdict, cuts made)."""
    rounds = [
        (seed + at, min(CUTS_IN_A_ROUND, cuts - first)) for at, first in enumerate(range(0, cuts, CUTS_IN_A_ROUND))
    ]
    until = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    shares = [share for at in range(jobs) if (share := rounds[at::jobs])]
    processes = [
        context.Process(target=_work, args=(at, share, workers, until, answers)) for at, share in enumerate(shares)
    ]
    for process in processes:
        process.start()
    verdict, made = Verdict(), 0
    while True:
        try:
            answer = answers.get(timeout=1.0)
        except queue.Empty:
            if not any(process.is_alive() for process in processes):
                break
            continue
        if isinstance(answer, Verdict):
            verdict.add(answer)
        else:
            made += answer
            told(answer)
    for process in processes:
        process.join()
        if process.exitcode:
            verdict.failures.append(f"a process of this very proof ended with status {process.exitcode}")
    return verdict, made


def _work(job: int, rounds: list[tuple[int, int]], workers: int, until: float, answers: Any) -> None:
    # free_port() gives each of pytest-xdist's workers ports of its own; to it these are such workers.
    os.environ["PYTEST_XDIST_WORKER"] = f"gw{job}"
    asyncio.run(_work_through(rounds, workers, until, answers))


async def _work_through(rounds: list[tuple[int, int]], workers: int, until: float, answers: Any) -> None:
    run = await Run.prepare(Settings(workers=workers))
    try:
        for seed, cuts in rounds:
            if time.monotonic() >= until:
                return
            try:
                answers.put(await run.round(seed, cuts, answers.put))
            except Exception as problem:
                run.verdict.failures.append(f"seed {seed}: {type(problem).__name__}: {problem}")
                answers.put(Verdict(failures=run.verdict.failures[-1:]))
    finally:
        await run.close()
