# SPDX-License-Identifier: MIT
"""`python -m tests.crash`: power cuts by the hundred, then every write of a scripted session; ends with 1 if a promise broke.

--cuts N         how many random power cuts (default 2000)
--seconds S      stop after so long, however many there were
--seed N         the first round's seed; round k has seed N + k. A failure names its round's seed: --seed IT --cuts 25
                 replays the same load, moments and clock (the machine's own timing is never twice the same)
--workers N      server processes, as in the configuration that the bench measures
--jobs N         rounds at a time (default: one for each core)
--skip-points    only the random cuts
--json FILE      the result, for machines
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from typing import Any

from attrs import asdict, fields_dict

from polarismail.config import Config
from tests.crash import disk, points
from tests.crash.jobs import cut_in_jobs


def main() -> int:
    """The exit status: 0 where every promise was kept, or where nothing could be tried, which is said."""
    summary, _, options = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m tests.crash", description=summary, epilog=options, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cuts", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--workers", type=int, default=2 if "workers" in fields_dict(Config) else 1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--skip-points", action="store_true")
    parser.add_argument("--json", default="")
    chosen = parser.parse_args()
    reason = disk.why_not()
    if reason:
        print(f"SKIPPED: no power was cut, nothing was shown: {reason}", flush=True)
        return 0
    seed = chosen.seed if chosen.seed is not None else random.SystemRandom().randrange(1 << 30)
    began = time.monotonic()
    print(f"power cuts: {chosen.cuts}, seeds from {seed}, workers = {chosen.workers}", flush=True)
    verdict, cuts = cut_in_jobs(seed, chosen.cuts, chosen.jobs, chosen.workers, chosen.seconds, _tell)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "seed": seed,
        "workers": chosen.workers,
        "cuts": cuts,
        "seconds": round(time.monotonic() - began, 1),
        **asdict(verdict),
    }
    _print_cuts(result)
    failures = list(verdict.failures)
    if not chosen.skip_points:
        found = points.run_all(seed, chosen.workers, told=_tell)
        result["points"] = asdict(found)
        failures += found.failures
        print(f"\na fault at each of {found.points} write-like system calls of one session: {found.fired} fired")
    if chosen.json:
        with open(chosen.json, "w") as file:
            json.dump(result, file, indent=2)
    for failure in failures[:50]:
        print(f"FAILED: {failure}")
    print(f"{len(failures)} failures in {time.monotonic() - began:.0f} s", flush=True)
    return 1 if failures or not cuts else 0


def _print_cuts(result: dict[str, Any]) -> None:
    rate = result["cuts"] / max(result["seconds"], 0.001) * 60
    print(f"\n{result['cuts']} cuts in {result['seconds']} s ({rate:.0f} a minute), seeds from {result['seed']}")
    print(f"  acknowledged  {result['acknowledged']} messages for {result['promises']} recipients")
    print(f"  lost          {result['lost']}")
    print(f"  in maildirs {result['delivered']}, at the remote {result['relayed']}, in reports {result['reported']}")
    for what, count in sorted(result["duplicates"].items()):
        print(f"  {count:6} {what}")
    print(f"  longest time from a remote's final dot to the fault: {result['longest_open_seconds']:.2f} s", flush=True)


def _tell(count: int) -> None:
    print("." * count, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
