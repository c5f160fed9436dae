# SPDX-License-Identifier: MIT
"""Frames of the bus however they are sliced; and two places on it, over real sockets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.task import deferLater

from polarismail.net.bus import Bus, FrameReader, render_frame
from tests.reactor import reactor, run

FRAMES = st.lists(st.tuples(st.sampled_from(["mail", "yield", "x"]), st.binary(max_size=40)), max_size=6)


@given(FRAMES, st.integers(1, 7))
def test_any_slicing_gives_the_same_frames(frames: list[tuple[str, bytes]], step: int) -> None:
    stream = b"".join(render_frame(kind, body) for kind, body in frames)
    reader, found = FrameReader(), []
    for at in range(0, len(stream), step):
        found += reader.receive(stream[at : at + step])
    assert found == frames


@pytest.mark.parametrize(
    "octets", [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x02\x07ab"], ids=["empty", "endless", "kind too long"]
)
def test_what_is_no_frame_is_refused(octets: bytes) -> None:
    with pytest.raises(ValueError, match="no frame"):
        FrameReader().receive(octets)


class Two:
    """Two workers on one bus."""

    def __init__(self, directory: Path) -> None:
        self.first, self.second = Bus(reactor, str(directory), 0), Bus(reactor, str(directory), 1)
        self.heard: list[tuple[int, bytes]] = []
        self.broken: list[int] = []
        self.second.subscribe("mail", lambda sender, body: self.heard.append((sender, body)))
        self.second.subscribe("size", lambda sender, body: b"%d" % len(body))
        self.second.subscribe("silence", lambda sender, body: Deferred())
        self.second.when_broken(self.broken.append)

    async def join(self) -> None:
        self.first.listen("one")
        self.second.listen("two")
        for bus in (self.first, self.second):
            bus.set_members({0: "one", 1: "two"})
        await until(lambda: self.first.is_open(1) and self.second.is_open(0))

    async def leave(self) -> None:
        self.first.stop()
        self.second.stop()
        await until(lambda: not (self.first._links or self.second._links))


async def until(condition: Any) -> None:
    for _ in range(500):
        if condition():
            return
        await deferLater(reactor, 0.01)
    raise AssertionError("waited in vain")


def on_the_bus(tmp_path: Path, test: Any) -> None:
    """Run the test on the reactor's thread."""

    async def whole() -> None:
        two = Two(tmp_path / "bus")
        await two.join()
        try:
            await test(two)
        finally:
            await two.leave()

    run(lambda: Deferred.fromCoroutine(whole()))


def test_frames_arrive_whole_and_in_order(tmp_path: Path) -> None:
    async def test(two: Two) -> None:
        bodies = [b"%d" % at * 1000 for at in range(300)]
        assert all(two.first.send(1, "mail", body) for body in bodies)
        await until(lambda: len(two.heard) == 300)
        assert two.heard == [(0, body) for body in bodies]

    on_the_bus(tmp_path, test)


def test_a_question_has_an_answer_or_a_time_out(tmp_path: Path) -> None:
    async def test(two: Two) -> None:
        assert await two.first.ask(1, "size", b"12345", 5) == b"5"
        with pytest.raises(TimeoutError):
            await two.first.ask(1, "silence", b"", 0.05)
        with pytest.raises(ConnectionError):
            await two.first.ask(7, "size", b"", 5)

    on_the_bus(tmp_path, test)


def test_who_waits_for_an_answer_of_the_dead_is_told(tmp_path: Path) -> None:
    async def test(two: Two) -> None:
        waiting = two.first.ask(1, "silence", b"", 60)
        two.second.stop()
        with pytest.raises(ConnectionError):
            await waiting
        assert not two.first.is_open(1)

    on_the_bus(tmp_path, test)


def test_the_end_of_a_link_is_heard(tmp_path: Path) -> None:
    async def test(two: Two) -> None:
        two.first.stop()
        await until(lambda: two.broken)
        assert two.broken == [0]

    on_the_bus(tmp_path, test)


def test_who_does_not_read_is_not_open(tmp_path: Path) -> None:
    async def test(two: Two) -> None:
        for protocol in two.second._incomings.open:
            protocol.transport.pauseProducing()
        for _ in range(40):
            two.first.send(1, "mail", bytes(1024 * 1024))
            await deferLater(reactor, 0)
        assert not two.first.is_open(1)
        for protocol in two.second._incomings.open:
            protocol.transport.resumeProducing()
        await until(lambda: len(two.heard) == 40)
        assert two.first.is_open(1)

    on_the_bus(tmp_path, test)
