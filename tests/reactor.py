# SPDX-License-Identifier: MIT
"""A real reactor for tests: the global one, in one background thread for the whole test session."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from twisted.internet import defer
from twisted.internet import reactor as reactor

T = TypeVar("T")
_started = threading.Lock()
_thread: threading.Thread | None = None


def _ensure_running() -> None:
    global _thread
    with _started:
        if _thread is None:
            running = threading.Event()
            reactor.callWhenRunning(running.set)
            _thread = threading.Thread(target=reactor.run, kwargs={"installSignalHandlers": False}, daemon=True)
            _thread.start()
            running.wait(10)


def run(function: Callable[..., Awaitable[T] | T], *args: Any, timeout: float = 60, **kwargs: Any) -> T:
    """Call `function` on the reactor's thread, wait for what it returns or awaits, and return or raise that."""
    _ensure_running()
    future: Future[T] = Future()

    def call() -> None:
        d = defer.maybeDeferred(function, *args, **kwargs)
        d.addCallbacks(future.set_result, lambda failure: future.set_exception(failure.value))

    reactor.callFromThread(call)
    return future.result(timeout)
