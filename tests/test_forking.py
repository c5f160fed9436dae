# SPDX-License-Identifier: MIT
"""Forked processes are what executed ones would be: streams, arguments, signals, ends; and none outlives the test run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests import forking
from tests.e2e.server import ROOT, wait_until

_LOOK = """
import json, os, signal, sys
print(json.dumps([
    sys.argv, os.getcwd(), sys.stdin.read(), os.environ.get("ONLY_HERE"), sorted(os.listdir("/proc/self/fd"))[:-1],
    [str(signal.getsignal(each)) for each in signal.Signals if each.name not in ("SIGRTMIN", "SIGRTMAX")],
    sys.stdout.encoding.lower(), sys.stdout.line_buffering, sys.stderr.errors, sys.path[0] in ("", os.getcwd()), __name__,
]))
"""


def run(*arguments: str, fork: bool) -> tuple[int, str, str]:
    with (
        tempfile.TemporaryFile("w+") as given,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        given.write("what is given\n")
        given.seek(0)
        if fork:
            status = forking.spawn(arguments, stdin=given, stdout=out, stderr=err).wait(60)
        else:
            status = subprocess.run(
                [sys.executable, *arguments], stdin=given, stdout=out, stderr=err, cwd=ROOT
            ).returncode
        out.seek(0)
        err.seek(0)
        return status, out.read(), err.read()


@pytest.mark.parametrize(
    "arguments",
    [
        ("-c", _LOOK, "one", "two words"),
        ("-c", "import atexit, sys; atexit.register(print, 'at the end'); sys.exit(7)"),
        ("-c", "import sys; sys.exit('words')"),
        ("-c", "import os; os.kill(os.getpid(), 9)"),
        ("-c", "import threading; threading.Timer(0.1, print, ['from a thread']).start()"),
        ("-m", "polarismail.cli.main", "--version"),
        ("-m", "polarismail.cli.main", "nonsense"),
    ],
    ids=["surroundings", "status", "words", "killed", "thread", "module", "usage"],
)
def test_a_forked_process_is_as_an_executed_one(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONLY_HERE", "x")
    assert run(*arguments, fork=True) == run(*arguments, fork=False)


def test_an_exception_ends_it_with_a_traceback() -> None:
    status, _, complained = run("-c", "1 / 0", fork=True)
    assert status == 1 and complained.endswith("ZeroDivisionError: division by zero\n")


def test_a_session_of_its_own_is_killed_as_a_group(tmp_path: Path) -> None:
    code = "import os, time; print(os.getsid(0), os.fork(), flush=True); time.sleep(60)"
    with open(tmp_path / "out", "w+b") as out:
        process = forking.spawn(["-c", code], stdout=out, stderr=2, new_session=True)
        wait_until(lambda: (tmp_path / "out").read_bytes().count(b"\n") == 2, "both of them")
        assert process.poll() is None
        session, child = map(int, (tmp_path / "out").read_text().splitlines()[0].split())
        assert session == process.pid
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(10) == process.poll() == -signal.SIGKILL
        wait_until(lambda: gone(child) and gone(process.pid), "nobody of the group")


def test_nothing_outlives_a_test_run_that_is_killed(tmp_path: Path) -> None:
    code = f"""
import time
from tests import forking
with open({str(tmp_path / "out")!r}, "w+b") as out:
    process = forking.spawn(["-c", "import time; time.sleep(60)"], stdout=out, stderr=out, new_session=True)
    print(process.pid, forking._forkers[0]._process.pid, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        pids = [int(word) for word in run.stdout.readline().split()]
        assert len(pids) == 2 and not any(gone(pid) for pid in pids)
        run.kill()
    wait_until(lambda: all(gone(pid) for pid in pids), "an end of the forked process and of the one that forks")


def gone(pid: int) -> bool:
    """Whether it runs no more; in a container nobody may come to reap an orphan."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
