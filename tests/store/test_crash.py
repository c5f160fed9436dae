# SPDX-License-Identifier: MIT
"""SIGKILL in the middle of commits: everything that was acknowledged is there, and nothing that was removed comes back."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from polarismail.store.interfaces import QueuedRecipient
from polarismail.values.envelope import RecipientState
from tests.databases import KINDS
from tests.reactor import run
from tests.store.committing_child import content
from tests.store.spools import LEASE_SECONDS, TRACE, Place, Process, done, open_place

KILLS = 3


def kill_in_the_middle(place: Place, seconds: float) -> tuple[dict[str, int], set[str], set[str]]:
    """Let a child work for so long after its first promise; returns what it had said: accepted with size, those of them
    that it had not begun to remove, removed."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.store.committing_child", place.url, str(place.directory / "content")],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent.parent,
    )
    assert child.stdout is not None
    said = bytearray(os.read(child.stdout.fileno(), 65536))
    assert said, "the child said nothing"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        said += os.read(child.stdout.fileno(), 65536)
    child.send_signal(signal.SIGKILL)
    said += child.stdout.read()
    child.stdout.close()
    child.wait(20)
    lines = said.decode().splitlines()
    accepted = {line[1:14]: int(line[15:]) for line in lines if line[0] == "+"}
    begun = {line[1:14] for line in lines if line[0] == "~"}
    return accepted, accepted.keys() - begun, {line[1:14] for line in lines if line[0] == "-"}


def claim_all(process: Process, count: int) -> list[object]:
    found: list[object] = []
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        more = process.claim(process.clock + 10**9, 1000)
        found += more
        if not more:
            if len(found) >= count:
                break
            time.sleep(0.2)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_acknowledged_survives_sigkill(kind: str, tmp_path: Path) -> None:
    with open_place(kind, tmp_path) as place:
        for at in range(KILLS):
            accepted, kept, removed = kill_in_the_middle(place, 0.2 + at * 0.15)
            assert kept, "the child was killed before it had done anything"
            # A PostgreSQL lease must run out before anybody takes over; the child's is 30 seconds long.
            survivor = place.open()
            if kind == "postgresql":
                expire_leases(survivor)
            claimed = claim_all(survivor, 2 * len(kept))
            there = {one.message.queue_id: one.message for one in claimed}  # type: ignore[attr-defined]
            assert kept <= there.keys()
            assert not removed & there.keys()
            for queue_id, message in there.items():
                if queue_id in accepted:
                    assert survivor.read_all(message) == TRACE + content(accepted[queue_id])
            survivor.record([done(one, RecipientState.RELAYED) for one in claimed])  # type: ignore[arg-type]
            assert survivor.counts().messages == 0
            survivor.stop()
        final = place.open()
        assert final.files() == []


def test_a_process_that_is_stopped_past_its_lease_disturbs_nobody_when_it_goes_on(tmp_path: Path) -> None:
    """SIGSTOP in the middle of its work, PostgreSQL: another takes over what it held; after SIGCONT its outcomes for that
    change nothing, and it accepts again under another incarnation."""
    with open_place("postgresql", tmp_path) as place:
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.store.committing_child", place.url, str(place.directory / "content")],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent.parent.parent,
            env={**os.environ, "LEASE_SECONDS": str(LEASE_SECONDS)},
        )
        assert child.stdout is not None
        said = bytearray()
        try:
            while said.count(b"+") < 100:
                said += os.read(child.stdout.fileno(), 65536)
            child.send_signal(signal.SIGSTOP)
            while select.select([child.stdout], [], [], 0.1)[0]:
                said += os.read(child.stdout.fileno(), 65536)
            asleep_at = len(said)
            survivor = place.open()
            held = accepted_and_kept(said)
            taken: dict[str, list[QueuedRecipient]] = {}
            deadline = time.monotonic() + 30
            while not held <= taken.keys() and time.monotonic() < deadline:
                for one in survivor.claim(survivor.clock + 10**9, 10_000):
                    taken.setdefault(one.message.queue_id, []).append(one)
                time.sleep(0.05)
            assert held <= taken.keys(), "what a sleeper holds is taken over"
            survivor.record([done(one) for ones in taken.values() for one in ones])
            child.send_signal(signal.SIGCONT)
            while b"+" not in said[asleep_at:] or len(accepted_and_kept(said[asleep_at:])) < 100:
                more = os.read(child.stdout.fileno(), 65536)
                assert more, "it ended when it woke"
                said += more
        finally:
            child.send_signal(signal.SIGCONT)
            child.kill()
            said += child.stdout.read()
            child.stdout.close()
            child.wait(20)
        expire_leases(survivor)
        after = {one.message.queue_id for one in claim_all(survivor, 100)}  # type: ignore[attr-defined]
        assert not after & taken.keys(), "what the survivor has finished does not come back"
        assert accepted_and_kept(said[asleep_at:]) <= after | taken.keys()


def accepted_and_kept(said: bytes | bytearray) -> set[str]:
    """Queue ids that the child was promised, and had not begun to remove."""
    lines = bytes(said).decode().splitlines()
    begun = {line[1:14] for line in lines if line[0] == "~"}
    return {line[1:14] for line in lines if line[0] == "+"} - begun


def expire_leases(process: Process) -> None:
    """Pretend that the time of every other process is over."""
    from sqlalchemy import update

    from polarismail.store import schema

    nodes, mine = schema.nodes, process.database.incarnation
    run(
        process.database.write,
        lambda connection: connection.execute(update(nodes).where(nodes.c.incarnation != mine).values(lease_until=0.0)),
    )
