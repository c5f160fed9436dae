# SPDX-License-Identifier: MIT
"""Messages a second from reception to the Maildir: polarismail and Debian's Postfix in turn, in one run.

The load is Postfix's smtp-source: 20 sessions, 4 KB messages, sessions kept open (`-d`) or a new one for each message.
The figure is COUNT divided by the time until all COUNT messages are files in the Maildir's new/. Each row is the median
of several rounds after a warm-up, and the ratio ours / Postfix.

usage: python -m benchmarks.receive [--count N] [--rounds N] [--octets N] [--sessions N] [--json FILE]      (needs root)
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.peers import RECIPIENT, Polarismail, Postfix, cpu_seconds, write_results

ASKED = {"kept": 2.0, "new": 1.0}


def count_files(directory: Path) -> int:
    """Files in a directory; 0 where it is not there yet."""
    try:
        return sum(1 for _ in os.scandir(directory))
    except FileNotFoundError:
        return 0


def measure(peer: Polarismail | Postfix, count: int, octets: int, sessions: int, keep: bool) -> tuple[float, float]:
    """One round: (accepted, delivered) messages a second.

    Nothing is deleted between rounds: ext4 looks at each inode that was freed within the last seconds before it makes a
    new file, so that emptying a Maildir would slow down whoever comes next. What the round before left in memory is on
    disk before the clock starts.
    """
    os.sync()
    time.sleep(0.5)
    before = count_files(peer.new)
    command = ["smtp-source", *(["-d"] if keep else []), "-s", str(sessions), "-m", str(count), "-l", str(octets)]
    command += ["-f", "a@remote.test", "-t", RECIPIENT, f"127.0.0.1:{peer.port}"]
    began = time.monotonic()
    subprocess.run(command, check=True, timeout=300)
    accepted = time.monotonic()
    while (there := count_files(peer.new) - before) < count:
        if time.monotonic() - accepted > 120:
            raise SystemExit(f"{peer.name}: {there} of {count} messages were delivered after two minutes")
        time.sleep(0.05)
    delivered = time.monotonic()
    return count / (accepted - began), count / (delivered - began)


def run(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """All rounds of all rows."""
    with tempfile.TemporaryDirectory(prefix="polarismail-bench-", dir=arguments.directory) as directory:
        os.chmod(directory, 0o755)
        peers = [Polarismail(Path(directory) / "pm"), Postfix(Path(directory) / "pf")]
        rows = []
        started = []
        try:
            for peer in peers:
                peer.start()
                started.append(peer)
            for way in ("kept", "new"):
                for peer in peers:
                    measure(peer, arguments.count // 4, arguments.octets, arguments.sessions, way == "kept")
                rates: dict[str, list[float]] = {peer.name: [] for peer in peers}
                cpu: list[float] = []
                for _ in range(arguments.rounds):
                    for peer in peers:
                        before = cpu_seconds(peer.pid) if isinstance(peer, Polarismail) else 0.0
                        _, rate = measure(peer, arguments.count, arguments.octets, arguments.sessions, way == "kept")
                        rates[peer.name].append(rate)
                        if isinstance(peer, Polarismail):
                            cpu.append((cpu_seconds(peer.pid) - before) / arguments.count * 1e6)
                        print(f"  {way:5} {peer.name:12} {rate:7.0f}/s", file=sys.stderr)
                ours, theirs = (statistics.median(rates[peer.name]) for peer in peers)
                rows.append(
                    {
                        "work": f"receive and deliver, {arguments.octets} octets, sessions {way}",
                        "polarismail": round(ours),
                        "postfix": round(theirs),
                        "ratio": round(ours / theirs, 2),
                        "asked": ASKED[way],
                        "cpu_microseconds": round(statistics.median(cpu)),
                    }
                )
        finally:
            for peer in started:
                peer.stop()
        return rows


def main() -> None:
    """Print the table; exit 1 when a ratio is below what is asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=6000, help="messages a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--octets", type=int, default=4096)
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--directory", default=None, help="where both keep their mail (default: the system's temp)")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    rows = run(arguments)
    print(f"{'work':52} {'polarismail':>12} {'postfix':>9} {'ratio':>6} {'asked':>6} {'CPU us':>7}")
    for row in rows:
        print(
            f"{row['work']:52} {row['polarismail']:>10}/s {row['postfix']:>7}/s {row['ratio']:>6} {row['asked']:>6} "
            f"{row['cpu_microseconds']:>7}"
        )
    if arguments.json:
        write_results(arguments.json, rows)
    if any(float(str(row["ratio"])) < float(str(row["asked"])) for row in rows):
        raise SystemExit("below what is asked")


if __name__ == "__main__":
    main()
