# SPDX-License-Identifier: MIT
"""Where the CPU of a message goes: microseconds by part of the program, one process, under the load of a row.

What each thread used is exact (/proc); its division follows from samples of the thread's stack, which py-spy takes without
stopping it (pip install py-spy). A sample belongs to the innermost frame of ours, and to Twisted, or to what it called
last, where there is none.

usage: python -m benchmarks.parts [--new] [--relay] [--octets N] [--count N] [--modules]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.load import Mailboxes, Sink, send
from benchmarks.peers import DOMAIN, RECIPIENT, Polarismail

_FRAME = re.compile(r"(?P<function>[^;]+?) \((?P<file>[^;()]+?)(?::\d+)?\)")
_THREAD = re.compile(r"thread \((?P<number>0x[0-9a-fA-F]+|\d+)\)(?:: )?(?P<name>.*)")
_RATE = 200


def part_of(stack: str, modules: bool = False) -> tuple[int, str]:
    """The thread of one line of py-spy's raw format, by the kernel's number, and the part that the line belongs to:
    `thread: room`, or `thread: room/module.py`."""
    head, _, frames = stack.partition(";")
    found = _THREAD.match(head)
    number, name = (int(found["number"], 0), found["name"] or "?") if found else (0, "?")
    name = "reactor" if name == "MainThread" else re.sub(r"-\d+$", "", name)
    files = [frame["file"] for frame in _FRAME.finditer(frames)]
    for file in reversed(files):
        _, ours, inside = file.rpartition("/polarismail/")
        if ours and "site-packages" not in inside:
            return number, f"{name}: {inside if modules or '/' not in inside else inside.partition('/')[0]}"
    return number, f"{name}: {'twisted' if '/twisted/' in (files or [''])[-1] else 'other'}"


def divide(raw: str, spent: dict[int, float], modules: bool = False) -> dict[str, float]:
    """What each part spent, largest first: the CPU of each thread, which is known, over the samples of that thread."""
    samples: dict[int, dict[str, int]] = {}
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        if count.isdigit():
            number, part = part_of(stack, modules)
            seen = samples.setdefault(number, {})
            seen[part] = seen.get(part, 0) + int(count)
    parts: dict[str, float] = {}
    for number, amount in spent.items():
        seen = samples.get(number, {"threads without a sample": 1})
        for part, times in seen.items():
            parts[part] = parts.get(part, 0.0) + amount * times / sum(seen.values())
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def _cpu_by_thread(pid: int) -> dict[int, float]:
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        found[int(task.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def measure(arguments: argparse.Namespace, directory: Path) -> dict[str, float]:
    """CPU microseconds for each message, by part."""
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
        before = _cpu_by_thread(peer.pid)
        work(arguments.count)
        after = _cpu_by_thread(peer.pid)
        spy.send_signal(signal.SIGINT)
        spy.wait(60)
    finally:
        for one in reversed(started):
            one.stop()
    spent = {number: (seconds - before.get(number, 0.0)) / arguments.count * 1e6 for number, seconds in after.items()}
    return divide(profile.read_text(), spent, arguments.modules)


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
        parts = measure(arguments, Path(directory))
    total = sum(parts.values())
    print(f"{'all':44}{total:8.0f} us")
    for part, microseconds in parts.items():
        if microseconds >= total / 200:
            print(f"{part:44}{microseconds:8.0f} us {microseconds / total:6.1%}")


if __name__ == "__main__":
    main()
