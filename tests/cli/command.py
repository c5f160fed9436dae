# SPDX-License-Identifier: MIT
"""Runs the `polarismail` command as people do: a process of its own, with a configuration file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
_CONFIGURATION = """\
hostname = "mail.here.test"
[paths]
state = "state"
spool = "state/spool"
mail = "mail"
control_socket = "control"
[log]
file = "log/events.log"
[tls]
certificate = "certificate.pem"
key = "key.pem"
[auth.passwords]
memory_kib = 64
iterations = 1
"""


class Command:
    """The command in one directory."""

    def __init__(self, directory: Path, extra: str = "") -> None:
        self.directory = directory
        self.config = directory / "polarismail.toml"
        self.config.write_text(_CONFIGURATION + extra)

    def run(self, *words: str, input: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """Run it; standard output, standard error and exit code are in what is returned."""
        return subprocess.run(
            [sys.executable, "-m", "polarismail.cli.main", "-c", str(self.config), *words],
            input=input,
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=60,
            env={**os.environ, "COLUMNS": "200", **environment},
        )

    def ok(self, *words: str, input: str = "") -> str:
        """Run it; it must succeed and say nothing on standard error."""
        done = self.run(*words, input=input)
        assert (done.returncode, done.stderr) == (0, ""), (words, done)
        return done.stdout

    def json(self, *words: str, input: str = "") -> Any:
        """The same with --json."""
        return json.loads(self.ok(*words, "--json", input=input))

    def fails(self, code: int, *words: str, input: str = "") -> str:
        """Run it; it must end with this exit code, without a traceback; what it said."""
        done = self.run(*words, input=input)
        assert done.returncode == code, (words, done)
        assert "Traceback" not in done.stderr
        return done.stderr
