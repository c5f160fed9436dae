# SPDX-License-Identifier: MIT
"""Drafts: bounded memory, back-pressure, and what a failing disk makes of them."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, gatherResults, succeed

from polarismail.store import content_files
from polarismail.store.content import FILE, HEAD_OCTETS, Draft
from polarismail.store.content_files import ContentFile, ContentFiles
from polarismail.store.interfaces import Committed, Submission
from polarismail.store.spool import SpoolSettings
from polarismail.store.threads import Answers
from polarismail.values.envelope import render_queue_id
from polarismail.values.errors import SpoolFull, SpoolUnhealthy, Unavailable
from tests.databases import KINDS
from tests.reactor import reactor, run
from tests.store.spools import FACTS, TRACE, Place, envelope, open_place


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with open_place(request.param, tmp_path) as opened:
        yield opened


@pytest.fixture
def files(tmp_path: Path) -> Iterator[ContentFiles]:
    opened = ContentFiles(str(tmp_path / "content"), Answers(reactor), 3)
    yield opened
    opened.stop()


class SlowSink:
    """Takes octets when the test says so."""

    storage = FILE

    def __init__(self, number: int = 1) -> None:
        self.taken: list[bytes] = []
        self.calls: list[Deferred[None]] = []
        self.finished = self.discarded = 0

    def append(self, pieces: Any) -> Deferred[None]:
        self.taken.extend(pieces)
        self.calls.append(Deferred())
        return self.calls[-1]

    def render_head(self, trace: bytes) -> bytes:
        return trace

    def finish(self) -> Deferred[None]:
        self.finished += 1
        return succeed(None)

    def discard(self) -> None:
        self.discarded += 1


def slow_draft(inline_octets: int = 10) -> tuple[Draft, SlowSink]:
    sink = SlowSink()
    return Draft("0000000000001", 1, 1, lambda number, front: sink, inline_octets), sink


def test_a_fast_writer_is_told_to_wait() -> None:
    draft, sink = slow_draft()
    assert draft.write(b"x" * 10) is None
    assert draft.write(b"y" * 60_000) is None
    waits = draft.write(b"z" * 60_000)
    assert waits is not None
    assert not waits.called
    assert len(sink.calls) == 1  # one at a time
    sink.calls[0].callback(None)
    assert waits.called
    assert b"".join(sink.taken) == b"x" * 10 + b"y" * 60_000 + b"z" * 60_000
    assert draft.head(12) == b"x" * 10 + b"yy"
    assert len(draft.head(10**9)) == 65_536


def test_abandoning_while_octets_are_on_their_way() -> None:
    draft, sink = slow_draft()
    draft.write(b"y" * 60_000)
    waits = draft.write(b"z" * 60_000)
    assert waits is not None
    draft.abandon()
    waits.addErrback(lambda failure: failure.trap(Unavailable))
    assert sink.discarded == 0  # not under the writer's feet
    sink.calls[0].callback(None)
    assert (len(sink.calls), sink.discarded, sink.finished) == (1, 1, 0)


def test_finishing_waits_for_what_is_on_its_way() -> None:
    draft, sink = slow_draft()
    draft.write(b"y" * 70_000)
    draft.write(b"z" * 600)
    finished = draft.finish()
    assert finished is not None
    draft.abandon()  # too late: it belongs to the commit now
    sink.calls[0].callback(None)
    assert sink.finished == 0
    sink.calls[1].callback(None)
    assert (finished.called, sink.finished, sink.discarded) == (True, 1, 0)
    assert draft.finish() is None
    draft.drop()
    assert sink.discarded == 1


def test_a_sink_that_fails_fails_the_draft() -> None:
    draft, sink = slow_draft()
    draft.write(b"y" * 60_000)
    waits = draft.write(b"z" * 60_000)
    assert waits is not None
    sink.calls[0].errback(SpoolUnhealthy("disk"))
    for failing in (waits, draft.write(b"more"), draft.finish()):
        assert failing is not None
        failing.addErrback(lambda failure: failure.trap(SpoolUnhealthy))
        assert failing.called
    assert sink.discarded == 1


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 90_000), max_size=8), inline=st.sampled_from([0, 1000, 65_536]))
@example(
    sizes=[90_000, 90_000, 90_000, 0], inline=0
)  # nothing is under way, and nothing but a piece of no octets waits
def test_any_slicing_is_the_same_content(files: ContentFiles, sizes: list[int], inline: int) -> None:
    from polarismail.store.content import FileStore

    number = test_any_slicing_is_the_same_content.count = getattr(test_any_slicing_is_the_same_content, "count", 0) + 1  # type: ignore[attr-defined]
    whole = b"".join(bytes([at % 256]) * size for at, size in enumerate(sizes))

    async def write() -> tuple[bytes, bytes]:
        draft = Draft(render_queue_id(number), number, 1, FileStore(files).sink, inline)
        for at, size in enumerate(sizes):
            waits = draft.write(bytes([at % 256]) * size)
            if waits is not None:
                await waits
        head = draft.head(70_000)
        finished = draft.finish()
        if finished is None:
            return draft.octets(), head
        await finished
        return await files.read(number, 0, len(whole) + 1), head

    octets, head = run(write)
    assert octets == whole
    assert whole.startswith(head)
    assert len(head) >= min(len(whole), inline, HEAD_OCTETS)


def test_files_are_private_and_made_once(files: ContentFiles) -> None:
    file = ContentFile(5)
    run(files.append, file, [b"abc"])
    path = Path(files.path) / file.name
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(SpoolUnhealthy):
        run(files.append, ContentFile(5), [b"other"])
    run(files.sync, file)
    assert path.read_bytes() == b"abc"


def test_a_planted_link_is_not_followed(files: ContentFiles, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    file = ContentFile(6)
    (Path(files.path) / file.name).symlink_to(secret)
    with pytest.raises(Unavailable):
        run(files.read, 6, 0, 10)
    with pytest.raises(SpoolUnhealthy):
        run(files.append, file, [b"overwritten"])
    assert secret.read_bytes() == b"secret"


@pytest.mark.parametrize("count", [1, 2, 12])
def test_syncs_of_a_group(files: ContentFiles, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file alone is synced by itself, several by one call; whichever, every name answers."""
    calls: list[str] = []
    gate = threading.Event()
    real, real_all = content_files._fdatasync, content_files._syncfs

    def one(descriptor: int) -> None:
        calls.append("fdatasync")
        gate.wait(20)
        real(descriptor)

    def everything(descriptor: int) -> None:
        calls.append("syncfs")
        real_all(descriptor)

    monkeypatch.setattr(content_files, "_fdatasync", one)
    monkeypatch.setattr(content_files, "_syncfs", everything)
    first, others = ContentFile(100), [ContentFile(at) for at in range(1, count + 1)]
    for file in (first, *others):
        run(files.append, file, [file.name.encode()])

    async def sync() -> None:
        waiting = [files.sync(first)]
        while not calls:
            await files.numbers()
        waiting += [files.sync(file) for file in others]
        gate.set()
        await gatherResults(waiting)

    run(sync)
    assert calls == ["fdatasync", *(["syncfs"] if count >= 2 else ["fdatasync"] * count)]
    assert sorted(run(files.numbers)) == [*range(1, count + 1), 100]


@pytest.mark.parametrize("count", [1, 8])
def test_a_sync_that_fails_is_final(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fails(descriptor: int) -> None:
        calls.append(descriptor)
        raise OSError(errno.EIO, "Input/output error")

    with open_place("sqlite", tmp_path) as place:
        process = place.open()
        before = process.accept(b"small")
        drafts = [process.write(b"x" * 100_000) for _ in range(count)]
        monkeypatch.setattr(content_files, "_fdatasync", fails)
        monkeypatch.setattr(content_files, "_syncfs", fails)

        def commit() -> Any:
            waiting = [process.spool.commit(Submission(draft, envelope(), FACTS, TRACE)) for draft in drafts]
            return gatherResults([one.addErrback(lambda failure: failure.value) for one in waiting])

        assert all(isinstance(error, SpoolUnhealthy) for error in run(commit))
        assert 1 <= len(calls) <= count
        assert not process.spool.healthy
        # Set aside, never synced again; nothing is taken and nothing handed out for delivery.
        assert process.files() == sorted(f"{draft.queue_id}.broken" for draft in drafts)
        with pytest.raises(SpoolUnhealthy):
            run(process.spool.draft)
        with pytest.raises(SpoolUnhealthy):
            process.claim(process.clock, 10)
        assert process.counts().messages == 1
        assert process.read(before.message, 0, 5) == TRACE[:5]


def test_a_full_disk_refuses_the_draft_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, pieces: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_place("sqlite", tmp_path) as place:
        process = place.open()
        monkeypatch.setattr(os, "writev", full)
        draft = run(process.spool.draft)

        async def write() -> None:
            draft.write(b"x" * 100_000)
            await process.spool.commit(Submission(draft, envelope(), FACTS, TRACE))

        with pytest.raises(SpoolFull):
            run(write)
        assert process.spool.healthy
        assert isinstance(process.accept(b"small"), Committed)


def test_short_writes_are_completed(files: ContentFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.writev
    monkeypatch.setattr(os, "writev", lambda descriptor, pieces: real(descriptor, [pieces[0][:3]]))
    file = ContentFile(7)
    run(files.append, file, [b"abcdef", b"ghi"])
    run(files.sync, file)
    assert run(files.read, 7, 0, 100) == b"abcdefghi"


def test_content_may_be_rows_beside_sqlite_too(place: Place) -> None:
    """The setting chooses for new messages; old ones stay readable where they are."""
    whole = bytes(range(256)) * 1000
    first = place.open(SpoolSettings(content="files"))
    in_file = first.accept(whole)
    first.stop()
    second = place.open(SpoolSettings(content="rows"))
    in_rows = second.accept(whole)
    for committed in (in_file, in_rows):
        assert second.read_all(committed.message) == TRACE + whole
    assert second.files() == [in_file.message.queue_id]


def test_many_large_drafts_at_once(place: Place) -> None:
    process = place.open()
    piece = bytes(range(256)) * 128  # 32 KB

    async def write(at: int) -> bool:
        draft = process.spool.draft()
        for _ in range(20):
            waits = draft.write(piece)
            assert draft._pending_octets + draft._flying_octets <= 2 * 65_536
            if waits is not None:
                await waits
        committed = await process.spool.commit(Submission(draft, envelope(), FACTS, TRACE))
        last = await process.spool.read(committed.message, len(TRACE) + 19 * len(piece), 10**6)
        return bool(last == piece)

    def all_at_once() -> Any:
        return gatherResults([Deferred.fromCoroutine(write(at)) for at in range(12)])

    assert run(all_at_once) == [True] * 12
