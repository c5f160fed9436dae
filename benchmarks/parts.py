# SPDX-License-Identifier: MIT
"""Where the CPU of a message goes: microseconds by part of the program, one process, under the load of a row.

The total is exact (/proc); its division follows from samples of the running threads' stacks, which py-spy takes without
stopping them (pip install py-spy). A sample belongs to the innermost frame of ours, and to Twisted, or to what it called
last, where there is none.

usage: python -m benchmarks.parts [--new] [--relay] [--octets N] [--count N] [--modules]
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.load import Mailboxes, Sink, send
from benchmarks.peers import DOMAIN, RECIPIENT, Polarismail
from benchmarks.usage import cpu_of_tree

_FRAME = re.compile(r"(?P<function>[^;]+?) \((?P<file>[^;()]+?)(?::\d+)?\)")
_RATE = 200


def part_of(stack: str, modules: bool = False) -> str:
    """The part that one line of py-spy's raw format belongs to: `thread: room`, or `thread: room/module.py`."""
    thread, _, frames = stack.partition(";")
    name = re.sub(r"thread \((?:0x)?[0-9a-fA-F]+\)(?:: )?|-\d+$", "", thread).strip('" ') or "?"
    name = "reactor" if name == "MainThread" else name
    files = [found["file"] for found in _FRAME.finditer(frames)]
    for file in reversed(files):
        _, found, inside = file.rpartition("/polarismail/")
        if found and "site-packages" not in inside:
            return f"{name}: {inside}" if modules or "/" not in inside else f"{name}: {inside.partition('/')[0]}"
    last = files[-1] if files else ""
    return f"{name}: twisted" if "/twisted/" in last else f"{name}: other"


def divide(raw: str, modules: bool = False) -> dict[str, float]:
    """The share of each part in a raw profile, largest first."""
    counts: Counter[str] = Counter()
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        if count.isdigit():
            counts[part_of(stack, modules)] += int(count)
    total = sum(counts.values())
    return {part: count / total for part, count in counts.most_common()}


def measure(arguments: argparse.Namespace, directory: Path) -> tuple[float, str]:
    """CPU microseconds for each message, and the profile."""
    aliases = {"out": "out@sink.test"} if arguments.relay else {}
    sink = Sink(arguments.port + 20, directory / "counted")
    peer = Polarismail(directory / "server", port=arguments.port, aliases=aliases, smtp_port=sink.port)
    recipient = f"out@{DOMAIN}" if arguments.relay else RECIPIENT
    profile = directory / "profile"
    started: list[Sink | Polarismail] = []
    try:
        for one in (sink, peer):
            one.start()
            started.append(one)

        def work(count: int) -> None:
            mailboxes = Mailboxes(peer.new_directories)
            sink.expect()
            send(peer.port, count, octets=arguments.octets, keep=not arguments.new, recipient=recipient)
            sink.wait(count) if arguments.relay else mailboxes.wait(count)

        work(arguments.count // 4)
        command = ["record", "--pid", str(peer.pid), "--rate", str(_RATE), "--format", "raw", "--output", str(profile)]
        options = ["--threads", "--nonblocking", "--full-filenames", "--function"]
        spy = subprocess.Popen([_py_spy(), *command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(1.0)
        before = cpu_of_tree(peer.roots)
        work(arguments.count)
        used = cpu_of_tree(peer.roots) - before
        spy.send_signal(signal.SIGINT)
        spy.wait(60)
    finally:
        for one in reversed(started):
            one.stop()
    return used / arguments.count * 1e6, profile.read_text()


def _py_spy() -> str:
    found = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if found is None:
        sys.exit("py-spy is missing: .venv/bin/pip install py-spy")
    return found


def main() -> None:
    """Print the parts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--new", action="store_true", help="a connection for each message")
    parser.add_argument("--relay", action="store_true", help="to smtp-sink instead of a Maildir")
    parser.add_argument("--octets", type=int, default=4096)
    parser.add_argument("--count", type=int, default=8000)
    parser.add_argument("--modules", action="store_true", help="by file instead of by room")
    parser.add_argument("--port", type=int, default=2700)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="polarismail-parts-") as directory:
        Path(directory).chmod(0o755)
        total, raw = measure(arguments, Path(directory))
    print(f"{'all':44}{total:8.0f} us")
    for part, share in divide(raw, arguments.modules).items():
        if share >= 0.005:
            print(f"{part:44}{total * share:8.0f} us {share:6.1%}")


if __name__ == "__main__":
    main()
