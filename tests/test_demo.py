# SPDX-License-Identifier: MIT
"""`make run`: what it prints works when it is copied into a shell, and a second start finds everything again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from polarismail.demo import ACCOUNTS, PORTS
from tests.e2e.server import ROOT, free_port, wait_until


def free_offset() -> int:
    """An offset that makes every port of the demonstration a free one."""
    for _ in range(100):
        offset = free_port() - PORTS["mx"]
        try:
            for number in PORTS.values():
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", number + offset))
        except OSError:
            continue
        return offset
    raise AssertionError("no room for six ports")


@contextmanager
def started(directory: Path, offset: int) -> Iterator[tuple[str, str]]:
    """The demonstration, running; the two lines that it prints."""
    words = [sys.executable, "-m", "polarismail.demo", "--directory", "var", "--port-offset", str(offset)]
    output = directory / "output"
    with open(output, "wb") as sink:
        process = subprocess.Popen(words, cwd=directory, env=environment(), stdout=sink, stderr=subprocess.STDOUT)
    try:

        def serving() -> bool:
            assert process.poll() is None, output.read_text()
            try:
                socket.create_connection(("127.0.0.1", PORTS["pop3s"] + offset), 5).close()
            except OSError:
                return False
            return True

        wait_until(serving, "the demonstration to listen")
        lines = [line.strip() for line in output.read_text().splitlines()]
        yield lines[lines.index("Send a message:") + 1], lines[lines.index("Read it:") + 1]
        process.send_signal(signal.SIGTERM)
        process.wait(45)
    finally:
        process.kill()
        process.wait()


def environment() -> dict[str, str]:
    """Where the checkout is not installed, it is found by its path."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def shell(line: str, directory: Path) -> str:
    """A line as a person would paste it."""
    done = subprocess.run(
        ["/bin/bash", "-c", line], cwd=directory, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, (line, done)
    return done.stdout


def test_printed_lines_send_and_read_a_message_and_var_is_used_again(tmp_path: Path) -> None:
    offset = free_offset()
    with started(tmp_path, offset) as (send, read):
        assert "Queued as" in shell(send, tmp_path)
        found = wait_until(lambda: shell(read, tmp_path), "the message")
        assert "Subject: First mail" in found and "It works." in found
    demo = json.loads((tmp_path / "var" / "demo.json").read_text())
    assert demo["host"] == "127.0.0.1" and demo["ca"] == str(tmp_path / "var" / "ca.pem")
    assert demo["ports"] == {name: number + offset for name, number in PORTS.items()}
    assert [each["address"] for each in demo["accounts"]] == list(ACCOUNTS)
    assert all(len(each["password"]) >= 12 for each in demo["accounts"])
    assert os.stat(tmp_path / "var" / "demo.json").st_mode & 0o077 == 0
    with started(tmp_path, offset) as (_, again):
        assert again == read
        assert "It works." in shell(again, tmp_path)
    assert json.loads((tmp_path / "var" / "demo.json").read_text()) == demo


def test_an_interrupted_first_start_is_finished_by_the_second(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "polarismail.demo", "--prepare-only"]
    subprocess.run(words, cwd=tmp_path, env=environment(), check=True, capture_output=True, timeout=60)
    for name in ("key.pem", "state/polarismail.db"):
        os.unlink(tmp_path / "var" / name)
    subprocess.run(words, cwd=tmp_path, env=environment(), check=True, capture_output=True, timeout=60)
    assert (tmp_path / "var" / "key.pem").exists() and (tmp_path / "var" / "state" / "polarismail.db").exists()


def test_ports_are_the_documented_ones() -> None:
    assert PORTS == {"mx": 2025, "mx-alt": 2026, "submission": 2587, "submissions": 2465, "pop3": 2110, "pop3s": 2995}
