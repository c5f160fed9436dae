# SPDX-License-Identifier: MIT
"""`python -m tests.fuzz`: every target under atheris, each in a process of its own; ends with 1 and a reproducer on a finding.

--seconds N      how long (default 3600)
--only NAME      this target alone; may be repeated
--replay FILE    run one input through the target of --only, with Python's own traceback, and end
--directory DIR  where corpora and findings are kept from one run to the next (default: var/fuzz)
--json FILE      the result, for machines

A finding is an input that breaks a promise (see each target), that takes longer than ten seconds, or that lets the process
grow over its bound of memory. It is written to DIR/NAME/findings. Make a dialogue or a test of it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from attrs import define, field

from tests.fuzz.targets import TARGETS, seeds, words

ROOT = Path(__file__).resolve().parent.parent.parent
INPUT_SECONDS = 10
MEMORY_MB = 640
"""A process with its corpus; the interpreter with what is instrumented takes some 80 of it."""
LONGEST_INPUT = 768
"""Limits are small, so that nothing needs long inputs; but each octet costs time."""
_STATUS = re.compile(
    r"#(?P<runs>\d+)\s+(?P<what>\w+)\s+(?:cov: \d+ )?(?:ft: (?P<ft>\d+) )?corp: (?P<corp>\d+)/\S+"
    r".*?exec/s: (?P<rate>\d+) rss: (?P<rss>\d+)Mb"
)
_WRITTEN = re.compile(r"Test unit written to (\S+)")


@define
class Run:
    """One target's process, and what it said last."""

    name: str
    directory: Path
    seconds: int
    runs: int = 0
    rate: int = 0
    features: int = 0
    corpus: int = 0
    first_rss: int = 0
    rss: int = 0
    finding: str = ""
    said: list[str] = field(factory=list)
    process: subprocess.Popen[str] = field(init=False)
    _thread: threading.Thread = field(init=False)

    def __attrs_post_init__(self) -> None:
        place = self.directory / self.name
        corpus, begin, findings = place / "corpus", place / "seeds", place / "findings"
        for each in (corpus, begin, findings):
            each.mkdir(parents=True, exist_ok=True)
        for old in begin.iterdir():
            old.unlink()
        for at, octets in enumerate(each for each in seeds(self.name) if len(each) <= LONGEST_INPUT):
            (begin / f"{at:04}").write_bytes(octets)
        dictionary = place / "words.dict"
        dictionary.write_text("".join(f'"{_escape(word)}"\n' for word in words(self.name)))
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "tests.fuzz.harness", self.name,
                f"-max_total_time={self.seconds}", f"-timeout={INPUT_SECONDS}", f"-rss_limit_mb={MEMORY_MB}",
                f"-max_len={LONGEST_INPUT}", f"-dict={dictionary}", f"-artifact_prefix={findings}/", "-print_final_stats=1",
                str(corpus), str(begin),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )  # fmt: skip
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = _STATUS.search(line)
            if found is None:
                self.said = [*self.said[-199:], line.rstrip("\n")]
                if written := _WRITTEN.search(line):
                    self.finding = written[1]
                continue
            self.runs, self.rate, self.rss = int(found["runs"]), int(found["rate"]), int(found["rss"])
            self.features, self.corpus = int(found["ft"] or 0), int(found["corp"])
            if found["what"] == "INITED":
                self.first_rss = self.rss

    def end(self) -> None:
        """Wait for it, a little longer than it has."""
        try:
            self.process.wait(self.seconds + 60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.said.append("it did not end by itself: it hangs where no time limit reaches it")
        self._thread.join(10)

    @property
    def failed(self) -> bool:
        """A finding, or no run at all."""
        return bool(self.finding) or self.process.poll() != 0 or self.runs == 0

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "target": self.name, "runs": self.runs, "features": self.features, "corpus": self.corpus,
            "rss_first_mb": self.first_rss, "rss_last_mb": self.rss, "finding": self.finding, "failed": self.failed,
        }  # fmt: skip


def main() -> int:
    """The exit status."""
    summary, _, options = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=summary, epilog=options, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=3600)
    parser.add_argument("--only", action="append", choices=list(TARGETS))
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--directory", type=Path, default=ROOT / "var" / "fuzz")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if chosen.replay is not None:
        if not chosen.only:
            parser.error("--replay needs --only: whose input is it?")
        TARGETS[chosen.only[0]](chosen.replay.read_bytes())
        print("this input breaks nothing")
        return 0
    if importlib.util.find_spec("atheris") is None:
        print('atheris is missing: pip install -e ".[fuzz]"', file=sys.stderr)
        return 2
    began = time.monotonic()
    runs = [Run(name, chosen.directory, chosen.seconds) for name in chosen.only or TARGETS]
    try:
        _watch(runs, began)
    finally:
        for run in runs:
            if run.process.poll() is None:
                run.process.kill()
    result = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "seconds": round(time.monotonic() - began, 1),
        "targets": [run.as_json() for run in runs],
    }
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{'target':10} {'inputs':>12} {'features':>9} {'corpus':>7} {'memory':>14}")
    for run in runs:
        memory = f"{run.first_rss} -> {run.rss} MB"
        verdict = "FAILED" if run.failed else "ok"
        print(f"{run.name:10} {run.runs:12,} {run.features:9,} {run.corpus:7,} {memory:>14}  {verdict}")
    for run in runs:
        if run.failed:
            print("\n".join(["", f"{run.name}:", *run.said[-40:]]))
            if run.finding:
                print(
                    f"the input: {run.finding}\n  .venv/bin/python -m tests.fuzz --only {run.name} --replay {run.finding}"
                )
    return 1 if any(run.failed for run in runs) else 0


def _watch(runs: list[Run], began: float) -> None:
    """Say a line now and then until all have ended; the first finding ends none of the others."""
    next_word = 10.0
    while any(run.process.poll() is None for run in runs):
        time.sleep(0.5)
        at = time.monotonic() - began
        if at >= next_word:
            next_word = at + (10 if at < 120 else 60)
            words = [
                f"{run.name} {run.runs:,} ({run.rate}/s, {run.rss} MB){' FOUND' if run.finding else ''}" for run in runs
            ]
            print(f"{at:6.0f} s  " + "  ".join(words), flush=True)
        if at > runs[0].seconds + 60:
            break
    for run in runs:
        run.end()


def _escape(word: bytes) -> str:
    return "".join(chr(octet) if 32 < octet < 127 and octet not in b'"\\' else f"\\x{octet:02x}" for octet in word)


if __name__ == "__main__":
    sys.exit(main())
