# SPDX-License-Identifier: MIT
"""The plain turn of the epoll reactor does with events what Twisted's own does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from twisted.internet.abstract import FileDescriptor
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from polarismail.net.polling import poll_plainly


class Reader(FileDescriptor):
    """Reads a pipe, or fails to."""

    def __init__(self, reactor: Any, descriptor: int, problem: Exception | None = None) -> None:
        super().__init__(reactor)
        self._descriptor, self._problem = descriptor, problem
        self.read: list[bytes] = []
        self.lost: list[Failure] = []

    def fileno(self) -> int:
        return self._descriptor

    def doRead(self) -> None:
        self.read.append(os.read(self._descriptor, 100))
        if self._problem is not None:
            raise self._problem

    def connectionLost(self, reason: Failure) -> None:
        self.lost.append(reason)


@pytest.fixture
def pipes() -> Iterator[list[tuple[int, int]]]:
    made = [os.pipe(), os.pipe()]
    yield made
    for pair in made:
        for end in pair:
            os.close(end)


def test_events_are_read_and_one_that_fails_does_not_harm_the_next(
    pipes: list[tuple[int, int]], caplog: pytest.LogCaptureFixture
) -> None:
    reactor: Any = EPollReactor()
    poll_plainly(reactor)
    assert "doIteration" in vars(reactor)
    bad = Reader(reactor, pipes[0][0], ValueError("no"))
    good = Reader(reactor, pipes[1][0])
    for reader, (_, writing) in zip((bad, good), pipes, strict=True):
        reactor.addReader(reader)
        os.write(writing, b"x")
    reactor.doIteration(1)
    assert (bad.read, good.read) == ([b"x"], [b"x"])
    assert [failure.type for failure in bad.lost] == [ValueError]
    assert not good.lost
    assert reactor.getReaders().count(bad) == 0
    os.write(pipes[1][1], b"y")
    reactor.doIteration(None)
    assert good.read == [b"x", b"y"]


def test_other_reactors_stay_as_they_are() -> None:
    clock = Clock()
    before = dict(vars(clock))
    poll_plainly(clock)
    assert vars(clock) == before
