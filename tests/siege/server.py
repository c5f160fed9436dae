# SPDX-License-Identifier: MIT
"""The server under siege: one worker, the shipped defaults, and nothing that an operator would not have set.

What differs from ``etc/polarismail.toml``: ports and paths; a resolver that answers "no such name"; greylisting is off, so
that a stranger's message may be accepted at all within a minute (that makes it harder, not easier: whoever greylists reads
no content of strangers); and loopback is nobody special, neither at the gate nor for limits.
"""

from __future__ import annotations

import os
import resource
import tomllib
from pathlib import Path
from typing import Any

from attrs import fields_dict

from benchmarks.usage import cpu_of_tree, pss_octets, tree
from polarismail.config import Config
from tests.e2e.server import ROOT, Helper, Server
from tests.siege.honest import marks_in

_LOOPBACK_IS_NOBODY = {"gate": "allow_networks", "limits": "trusted_networks"}
DESCRIPTORS = 16384
"""What server and attackers each may open: `LimitNOFILE` of the unit that is shipped allows four times as many."""


def allow_descriptors() -> None:
    """For this process and those that it starts. Raises SystemExit where the machine does not allow it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < DESCRIPTORS:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
        except (ValueError, PermissionError):
            raise SystemExit(
                f"{DESCRIPTORS} descriptors are needed, {hard} are allowed: ulimit -Hn {DESCRIPTORS}"
            ) from None
    elif soft < DESCRIPTORS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, hard))


class Besieged(Server):
    """An end-to-end test's server with the shipped cost of passwords, and its figures."""

    def __init__(self, directory: Path, accounts: tuple[str, ...], extra: str = "") -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._names = Helper(directory, "dns")
        for table, key in _LOOPBACK_IS_NOBODY.items():
            if table in fields_dict(Config):
                extra += f"[{table}]\n{key} = []\n"
        super().__init__(directory, accounts=accounts, dns_port=self._names.port, workers=1, extra=extra)

    def write_config(self, **changes: Any) -> None:
        """See Server."""
        super().write_config(**changes)
        text = self.config.read_text()
        before, table, after = text.partition("[auth.passwords]\n")
        assert table
        self.config.write_text(before + after[after.index("[") :])

    def stop(self) -> int:
        """See Server."""
        try:
            return super().stop()
        finally:
            self._names.stop()

    def memory(self) -> int:
        """Octets of all its processes."""
        return pss_octets([self.pid])

    def cpu(self) -> float:
        """Seconds of all its processes."""
        return cpu_of_tree([self.pid])

    def descriptors(self) -> int:
        """Open ones, of all its processes: a client costs one."""
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in tree([self.pid]))

    def delivered(self) -> list[str]:
        """The marks of all messages in all maildirs."""
        return [mark for new in (self.directory / "mail").rglob("new") for mark in marks_in(new.parent)]


def gate_seconds() -> float:
    """How long a stranger waits for the greeting by design."""
    shipped = tomllib.loads((ROOT / "etc" / "polarismail.toml").read_text())
    return float(shipped.get("gate", {}).get("wait_seconds", 0.0))
