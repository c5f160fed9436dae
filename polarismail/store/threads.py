# SPDX-License-Identifier: MIT
"""Brings what worker threads found out to the reactor's thread: many results, one wake-up.

`callFromThread` writes to a pipe and takes a turn of the reactor each time; a group of a hundred commits wants that once.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from twisted.internet.defer import Deferred

T = TypeVar("T")
Answer = tuple[Deferred[Any], Any, "BaseException | None"]  # where to, the value, or the error in its place


class Answers:
    """Results on their way to the reactor thread. Everything but `_deliver` may be called from any thread."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._lock = threading.Lock()
        self._waiting: list[Answer] = []

    def put(self, answers: Sequence[Answer]) -> None:
        """Fire these Deferreds on the reactor thread, in order, soon."""
        if not answers:
            return
        with self._lock:
            wake = not self._waiting
            self._waiting.extend(answers)
        if wake:
            self._reactor.callFromThread(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            answers, self._waiting = self._waiting, []
        for deferred, value, error in answers:
            if error is None:
                deferred.callback(value)
            else:
                deferred.errback(error)


class Workers:
    """A few threads that take jobs in order; results come back through Answers.

    `begin` makes what each thread keeps for itself (a database connection); it is given to each job of that thread as
    first argument, and to `end` when the thread goes.
    """

    def __init__(
        self,
        answers: Answers,
        name: str,
        threads: int,
        begin: Callable[[], Any] | None = None,
        end: Callable[[Any], None] | None = None,
    ) -> None:
        self._answers, self._begin, self._end = answers, begin, end
        self._jobs: queue.SimpleQueue[tuple[Deferred[Any], Callable[..., Any], tuple[Any, ...]] | None] = (
            queue.SimpleQueue()
        )
        self._threads = [threading.Thread(target=self._run, name=f"{name}-{at}", daemon=True) for at in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Callable[..., T], *args: Any) -> Deferred[T]:
        """Run `job(*args)`, or `job(mine, *args)` where the threads keep something, in one of the threads."""
        deferred: Deferred[T] = Deferred()
        self._jobs.put((deferred, job, args))
        return deferred

    def stop(self) -> None:
        """Finish what was submitted, then end the threads. Blocks: call it from a thread, or at the end of a process."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        mine: tuple[Any, ...] = () if self._begin is None else (self._begin(),)
        while (item := self._jobs.get()) is not None:
            deferred, job, args = item
            try:
                answer: Answer = (deferred, job(*mine, *args), None)
            except Exception as error:
                answer = (deferred, None, error)
            self._answers.put([answer])
            # Or the last result would stay in memory until the next job comes.
            del item, deferred, job, args, answer
        if self._end is not None:
            self._end(*mine)
