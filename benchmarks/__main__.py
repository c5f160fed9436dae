# SPDX-License-Identifier: MIT
"""polarismail and Debian's Postfix side by side, in one run: a table for people, JSON for programs.

Needs root, and Debian's postfix (for its smtp-source and smtp-sink, too) and dovecot-core. Everything is on loopback, in a
temporary directory. A round with a message missing ends the run: it never becomes a figure.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import attrs

from benchmarks.bench import Bench, Line
from benchmarks.load import RoundFailed
from benchmarks.peers import ROOT, PeerFailed
from benchmarks.rows import ROWS
from benchmarks.table import read_results, render_csv, render_table, write_results
from polarismail.config import Config

RESULTS = ROOT / "benchmarks" / "results" / "latest.json"


def main() -> None:
    """Run the chosen rows; exit 1 where one is not what is asked, 2 where it could not be measured."""
    arguments = _parse()
    for program in ("postfix", "smtp-source", "smtp-sink", "dovecot"):
        if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin"):
            sys.exit(f"{program} is missing: apt-get install postfix dovecot-core")
    if os.geteuid() != 0:
        sys.exit("the benchmark starts a Postfix of its own: run it as root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers end, too
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(prefix="polarismail-bench-", dir=arguments.directory) as directory:
        os.chmod(directory, 0o755)
        bench = Bench(
            Path(directory),
            port=arguments.port,
            rounds=arguments.rounds,
            count=arguments.count,
            scale=0.1 if arguments.quick else 1.0,
            workers=arguments.workers,
            backlog=arguments.backlog // (10 if arguments.quick else 1),
        )
        for row in arguments.rows:
            print(f"{row}: {ROWS[row].work}", file=sys.stderr, flush=True)
            try:
                found = ROWS[row].run(bench)
            except (RoundFailed, PeerFailed, subprocess.TimeoutExpired) as problem:
                print(f"{row}: not measured: {problem}", file=sys.stderr)
                sys.exit(2)
            # After each row: what was measured is not lost when a later row cannot be.
            update = arguments.update or bool(lines)
            write_results(
                arguments.json,
                [line.as_json() for line in found],
                workers=arguments.workers,
                rounds=arguments.rounds,
                update=update,
            )
            lines += found
        # Before the directory is emptied, which takes its time.
        results = read_results(arguments.json)
        print(render_table(results))
        if arguments.csv:
            arguments.csv.write_text(render_csv(results))
            arguments.csv.with_name(f"{arguments.csv.stem}-gauges.csv").write_text(render_csv(results, gauges=True))
    if missed := [line.row for line in lines if line.met is False]:
        sys.exit(f"below what is asked: {', '.join(dict.fromkeys(missed))}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rows", type=_rows, default=list(ROWS), metavar="NAME,...", help=f"of: {', '.join(ROWS)} (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=None, help="messages a round, instead of each row's own")
    parser.add_argument("--quick", action="store_true", help="a tenth of the messages: to see that it works, no more")
    parser.add_argument("--workers", type=int, default=_default_workers(), help="processes of ours (default: 2)")
    parser.add_argument("--backlog", type=int, default=200_000, help="recipients that wait (default: %(default)s)")
    parser.add_argument("--port", type=int, default=2600, help="the first of the ports that are used")
    parser.add_argument("--directory", default=None, help="where both keep their mail (default: the system's temp)")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures go (default: %(default)s)")
    parser.add_argument("--update", action="store_true", help="keep the rows of that file that are not measured now")
    parser.add_argument(
        "--csv",
        type=Path,
        default=None,
        help="write the tables of docs/performance.rst, too: FILE, and FILE-gauges.csv",
    )
    return parser.parse_args()


def _rows(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        raise argparse.ArgumentTypeError(f"no row {', '.join(unknown)}")
    return names


def _default_workers() -> int | None:
    """Two, once the configuration knows of workers."""
    return 2 if "workers" in attrs.fields_dict(Config) else None


if __name__ == "__main__":
    main()
