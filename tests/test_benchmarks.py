# SPDX-License-Identifier: MIT
"""The benchmark's own arithmetic: bars, tables, and that a missing message is no figure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import load
from benchmarks.bench import Bar, Line
from benchmarks.load import Mailboxes, RoundFailed
from benchmarks.rows import ROWS
from benchmarks.table import read_results, render_csv, render_table, write_results
from benchmarks.usage import cpu_of_tree, pss_octets, tree


def test_a_bar_is_met_from_above_or_from_below() -> None:
    assert Bar(2, 4).is_met(2.0) and not Bar(2, 4).is_met(1.99)
    below = Bar(10, 5, "figure", "below")
    assert below.is_met(9.9) and not below.is_met(10) and not below.is_met(None)
    assert (Bar(3.5, 6).render(3.5), below.render(10), below.render("at 1M")) == ("3.5x", "<10", "at 1M")


def test_a_line_compares_the_ratio_or_our_own_figure() -> None:
    assert Line("kept", "", "", 400.0, 100.0, Bar(3.5, 6)).met is True
    assert Line("kept", "", "", 300.0, 100.0, Bar(3.5, 6)).met is False
    assert Line("idle", "", "", 9.0, None, Bar(10, 5, "figure", "below")).met is True
    assert Line("kept", "", "", 300.0, None, Bar(3.5, 6)).met is False
    assert Line("limit", "", "", None, None).met is None


def test_results_are_kept_by_row_and_rendered_in_the_order_of_the_table(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    details = {
        "polarismail": {"cpu_microseconds": 350},
        "postfix": {"cpu_microseconds": 1500},
        "gauges": {"lag_seconds": 0.0123, "worker_messages": [30, 10]},
    }
    new = Line("new", "new connections", "messages/s", 1000.0, 500.0, Bar(2, 4))
    kept = Line("kept", "kept sessions", "messages/s", 3000.0, 1000.0, Bar(3.5, 6), "a note", details)
    write_results(file, [new.as_json()], workers=2, rounds=5)
    write_results(file, [kept.as_json()], workers=2, rounds=5, update=True)
    lines = read_results(file)
    assert [line["row"] for line in lines] == ["kept", "new"]
    text = render_table(lines)
    assert "3.00x" in text and "NO" in text and "kept sessions: a note" in text and "75%/25%" in text and "12.3" in text
    assert render_csv(lines).splitlines()[2].startswith('new connections,"1,000",500,messages/s,2.00x,2x,4x,yes')
    assert render_csv(lines, gauges=True).splitlines()[1].startswith('kept,350,"1,500",12.3')
    write_results(file, [new.as_json()], workers=2, rounds=5)
    assert len(json.loads(file.read_text())["lines"]) == 1


def test_mail_that_came_is_seen_with_its_time_and_what_is_missing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "_PATIENCE_SECONDS", 0.5)
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    (first / "old").touch()
    mailboxes = Mailboxes([first, second])
    (first / "a").touch()
    with pytest.raises(RoundFailed, match="1 of 2"):
        mailboxes.wait(2)
    second.mkdir()
    (second / "b").touch()
    came = time.time()
    assert abs(mailboxes.wait(2) - came) < 0.05
    (second / "twice").touch()
    with pytest.raises(RoundFailed, match="3 messages where 2"):
        mailboxes.wait(2)


def test_a_tree_of_processes_is_counted_with_those_that_have_ended() -> None:
    busy = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass\n"
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {busy!r}])\nprint('done', flush=True)\ninput()\n"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert cpu_of_tree([process.pid]) >= 0.2
        assert process.pid in tree([os.getpid()])
        assert pss_octets([process.pid]) > 1_000_000
    finally:
        process.communicate(b"\n")


def test_the_rows_of_the_issue_are_all_there() -> None:
    assert list(ROWS) == [
        "limit",
        "kept",
        "new",
        "100k",
        "1m",
        "recipients",
        "relay",
        "submit",
        "submit-uncached",
        "backlog",
        "idle",
        "idle-tls",
    ]
