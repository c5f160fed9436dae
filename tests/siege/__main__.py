# SPDX-License-Identifier: MIT
"""`python -m tests.siege`: a server with one worker is attacked for a minute; ends with 1 if honest mail suffered.

All at once, from addresses of 127.0.0.0/8: 5,000 slow clients of 1,250 networks, 1,000 new connections a second, a
recipient harvest, and a flood of lines of 10 MB. Beside them three honest clients send messages one after the other, each over
a connection of its own: one that the server knows, one that is a stranger each time, and one with a login on the
submission port.

--seconds S      how long the attack lasts (default 60)
--slow N  --rate N  --harvesters N  --flooders N      how strong it is (0: none of that kind)
--update         write docs/siege.svg
--json FILE      the result, for machines
--profile FILE   profile the server (cProfile; it is slower then)
--directory DIR  where server and mailboxes are (default: a temporary directory)
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from attrs import define, field

from tests.e2e.server import PASSWORD, ROOT, wait_until
from tests.siege.honest import Honest, Sending, fresh_addresses, one_address
from tests.siege.picture import draw
from tests.siege.server import Besieged, allow_descriptors, gate_seconds

CALM_SECONDS = 10.0
REST_SECONDS = 30.0
BOUND_SECONDS = 5.0
FILLS_SECONDS = 4.0
"""From the beginning of the attack until the gate is full."""
MEMORY_BOUND = 256 * 1024 * 1024
"""Of all processes of the server, at any moment."""
MEMORY_LEFT = 64 * 1024 * 1024
"""How much more than before the attack it may still have after it: the allocator keeps some."""
RATE_MET = 0.95
ACCOUNTS = ("ann@here.test", "known@here.test", "stranger@here.test", "member@here.test")
KNOWN, STRANGER, MEMBER = "a known server", "a stranger", "a user with a login"


@define
class Attackers:
    """One process of them."""

    process: subprocess.Popen[str]
    done: Counter[str] = field(factory=Counter)

    @classmethod
    def begin(cls, server: Besieged, seconds: float, **kinds: int) -> Attackers:
        """Start one that ends by itself."""
        words = [f"{kind}={number}" for kind, number in kinds.items() if number]
        ports = [f"--{name}={server.ports[name]}" for name in ("mx", "submission", "submissions")]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.siege.attackers", *words, *ports, f"--seconds={seconds}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        found = cls(process)
        threading.Thread(target=found._listen, daemon=True).start()
        return found

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.done = Counter(json.loads(line))


@define
class Siege:
    """One run: what was seen, second by second."""

    server: Besieged
    options: argparse.Namespace
    began: float = field(factory=time.monotonic)
    attack: tuple[float, float] = (0.0, 0.0)
    attackers: list[Attackers] = field(factory=list)
    samples: list[dict[str, float]] = field(factory=list)
    honest: dict[str, Honest] = field(factory=dict)

    def run(self) -> dict[str, Any]:
        """Calm, attack, rest."""
        self._meet()
        self._watch(CALM_SECONDS)
        memory_before = self.server.memory()
        begin = time.monotonic()
        options = self.options
        for kinds in (
            {"slow": options.slow, "connections": options.rate},
            {"harvest": options.harvesters, "lines": options.flooders},
        ):
            if any(kinds.values()):
                self.attackers.append(Attackers.begin(self.server, options.seconds, **kinds))
        self._watch(options.seconds)
        self.attack = (begin - self.began, time.monotonic() - self.began)
        for each in self.attackers:
            each.process.terminate()
            each.process.wait()
        self._watch(REST_SECONDS)
        for client in self.honest.values():
            client.stop()
        for client in self.honest.values():
            client.wait()
        return self._judge(memory_before)

    def _meet(self) -> None:
        """The honest clients begin; the known one was here before, so that it need not wait at the gate."""
        ports = self.server.ports
        self.honest = {
            KNOWN: Honest("known", ports["mx"], "known@here.test", one_address("127.1.1.1")),
            STRANGER: Honest(
                "stranger",
                ports["mx"],
                "stranger@here.test",
                fresh_addresses(lambda number: f"127.{128 + (number >> 8)}.{number & 255}.1"),
            ),
            MEMBER: Honest(
                "member",
                ports["submission"],
                "member@here.test",
                one_address("127.1.2.1"),
                self.server.tls,
                ("member@here.test", PASSWORD),
            ),
        }
        self.honest[KNOWN].introduce()
        self.began = time.monotonic()
        for client in self.honest.values():
            client.start()

    def bound(self, name: str, sending: Sending) -> float:
        """How long this message may take. A stranger waits at the gate by design: its whole time where there is room, so that
        is allowed beside the attack, and until its flood has filled the gate."""
        waits = gate_seconds() if name == STRANGER else 0.0
        flooded = self.attack[0] + FILLS_SECONDS <= sending.began - self.began <= self.attack[1] - waits
        return BOUND_SECONDS if flooded else BOUND_SECONDS + waits

    def _watch(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            cpu = self.server.cpu()
            done = self._done()
            self.samples.append(
                {
                    "at": now - self.began,
                    "memory": self.server.memory(),
                    "descriptors": self.server.descriptors(),
                    "cpu": cpu,
                    "opened": done["connections opened"],
                }
            )
            if len(self.samples) % 5 == 0:
                self._tell()
            time.sleep(max(0.0, min(1.0, end - time.monotonic())))

    def _done(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for each in self.attackers:
            total.update(each.done)
        return total

    def _tell(self) -> None:
        now, before = self.samples[-1], self.samples[-5]
        since = self.began + before["at"]
        busy = (now["cpu"] - before["cpu"]) / (now["at"] - before["at"])
        rate = (now["opened"] - before["opened"]) / (now["at"] - before["at"])
        words = []
        for name, client in self.honest.items():
            recent = [each for each in client.sent[:] if each.began >= since]
            failed = sum(bool(each.problem) for each in recent)
            worst = max((each.seconds for each in recent), default=0.0)
            words.append(f"{name} {len(recent) - failed}/{len(recent)} max {worst:.2f} s")
        print(
            f"{now['at']:5.0f} s  CPU {busy:4.0%}  {now['memory'] / 1e6:4.0f} MB  {now['descriptors']:5.0f} descriptors  "
            f"slow {self._done()['slow held']:5}  +{rate:4.0f}/s  | {'; '.join(words)}",
            flush=True,
        )

    def _phase(self, sending: Sending) -> str:
        at = sending.began - self.began
        return "before" if at + sending.seconds < self.attack[0] else "after" if at > self.attack[1] + 1 else "during"

    def _judge(self, memory_before: int) -> dict[str, Any]:
        accepted = {mark for client in self.honest.values() for mark in client.accepted}
        problems: list[str] = []
        try:
            wait_until(lambda: accepted <= set(self.server.delivered()), "every accepted message is in its maildir")
        except AssertionError:
            pass  # counted below
        held = Counter(self.server.delivered())
        lost, doubled = sorted(accepted - set(held)), sorted(mark for mark, times in held.items() if times > 1)
        if lost or doubled:
            problems.append(
                f"{len(lost)} accepted messages lost, {len(doubled)} delivered twice: {(lost + doubled)[:5]}"
            )
        rows: dict[str, dict[str, Any]] = {}
        for name, client in self.honest.items():
            for phase in ("before", "during", "after"):
                sent = [(each, self.bound(name, each)) for each in client.sent if self._phase(each) == phase]
                row = _summary(sent)
                rows[f"{name}, {phase}"] = row
                if row["failed"] or row["late"] or not row["messages"]:
                    problems.append(
                        f"{name}, {phase}: of {row['messages']} messages {row['failed']} were not accepted and {row['late']} "
                        f"took too long ({row['why']})"
                    )
        attack = [each for each in self.samples if each["at"] <= self.attack[1] and each["opened"]]
        done = self._done()
        rate = 0.0
        if len(attack) > 1:
            rate = (attack[-1]["opened"] - attack[0]["opened"]) / (attack[-1]["at"] - attack[0]["at"])
            if rate < self.options.rate * RATE_MET:
                problems.append(
                    f"{rate:.0f} new connections a second instead of {self.options.rate}: the attackers are too slow"
                )
        peak = max(each["memory"] for each in self.samples)
        if peak > MEMORY_BOUND:
            problems.append(f"memory rose to {peak / 1e6:.0f} MB, over {MEMORY_BOUND / 1e6:.0f} MB")
        last = self.samples[-1]
        if last["memory"] > memory_before + MEMORY_LEFT:
            problems.append(f"memory stayed at {last['memory'] / 1e6:.0f} MB, from {memory_before / 1e6:.0f} MB before")
        if last["descriptors"] > self.samples[0]["descriptors"] + 20:
            problems.append(
                f"{last['descriptors']:.0f} descriptors are open after the attack, {self.samples[0]['descriptors']:.0f} before"
            )
        if self.server.process is not None and self.server.process.poll() is not None:
            problems.append(f"the server ended: {self.server.twistd_log()[-2000:]}")
        busy = (attack[-1]["cpu"] - attack[0]["cpu"]) / (attack[-1]["at"] - attack[0]["at"]) if len(attack) > 1 else 0.0
        return {
            "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "seconds": self.options.seconds,
            "honest": rows,
            "accepted": len(accepted),
            "lost": len(lost),
            "doubled": len(doubled),
            "rate": round(rate),
            "cpu": round(busy, 3),
            "memory_before": memory_before,
            "memory_peak": peak,
            "memory_after": last["memory"],
            "descriptors_peak": max(each["descriptors"] for each in self.samples),
            "attackers": dict(done),
            "problems": problems,
        }

    def picture(self) -> str:
        """See docs/hostile.rst."""
        bounds = {f"bound under attack: {BOUND_SECONDS:g} s": BOUND_SECONDS}
        return draw(
            {
                name: [(each.began - self.began, each.seconds, not each.problem) for each in client.sent]
                for name, client in self.honest.items()
            },
            seconds=self.samples[-1]["at"] + 1,
            siege=self.attack,
            bounds=bounds,
            title="From connect to 250, each honest message (a cross: refused)",
        )


def _summary(sent: list[tuple[Sending, float]]) -> dict[str, Any]:
    """Of messages and what each was allowed."""
    sendings = [each for each, _ in sent]
    took = sorted(each.seconds for each in sendings if not each.problem)
    why = Counter(each.problem for each in sendings if each.problem).most_common(2)
    return {
        "messages": len(sendings),
        "failed": len(sendings) - len(took),
        "late": sum(each.seconds > bound for each, bound in sent if not each.problem),
        "median": round(statistics.median(took), 4) if took else None,
        "p99": round(took[int(len(took) * 0.99)], 4) if took else None,
        "max": round(took[-1], 4) if took else None,
        "why": "; ".join(f"{times} x {problem}" for problem, times in why),
    }


def _print(result: dict[str, Any]) -> None:
    print(f"\n{'honest messages':32} {'sent':>5} {'failed':>6} {'too late':>8} {'median':>9} {'p99':>9} {'longest':>9}")
    for name, row in result["honest"].items():
        times = " ".join(
            f"{row[key] * 1000:6.0f} ms" if row[key] is not None else f"{'-':>9}" for key in ("median", "p99", "max")
        )
        print(f"{name:32} {row['messages']:5} {row['failed']:6} {row['late']:8} {times}")
    print(f"\naccepted {result['accepted']}, lost {result['lost']}, delivered twice {result['doubled']}")
    print(
        f"memory {result['memory_before'] / 1e6:.0f} MB before, {result['memory_peak'] / 1e6:.0f} MB at most "
        f"(bound {MEMORY_BOUND / 1e6:.0f}), {result['memory_after'] / 1e6:.0f} MB after; "
        f"{result['descriptors_peak']:.0f} descriptors at most; one worker at {result['cpu']:.0%} of a core"
    )
    print(f"new connections a second, achieved: {result['rate']}")
    for what, number in sorted(result["attackers"].items()):
        print(f"  {number:12,} {what}")


def main() -> int:
    """The exit status: 0 where every promise was kept."""
    summary, _, options = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m tests.siege", description=summary, epilog=options, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--slow", type=int, default=5000)
    parser.add_argument("--rate", type=int, default=1000)
    parser.add_argument("--harvesters", type=int, default=80)
    parser.add_argument("--flooders", type=int, default=8)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--directory", type=Path)
    chosen = parser.parse_args()
    allow_descriptors()
    with ExitStack() as stack:
        directory = chosen.directory or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="polarismail-siege-"))
        )
        server = Besieged(directory, ACCOUNTS)
        profile = ("--profile", str(chosen.profile.absolute()), "--profiler", "cprofile") if chosen.profile else ()
        server.start(twistd=profile)
        try:
            siege = Siege(server, chosen)
            result = siege.run()
        finally:
            server.stop()
    _print(result)
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=2) + "\n")
    if chosen.update:
        (ROOT / "docs" / "siege.svg").write_text(siege.picture())
    for problem in result["problems"]:
        print(f"FAILED: {problem}")
    print(
        "the promises were kept" if not result["problems"] else f"{len(result['problems'])} promises were broken",
        flush=True,
    )
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
