# SPDX-License-Identifier: MIT
"""Delays that end when they should, whatever the wall clock does (DURABILITY rule 6).

Twisted's reactors count delays in `time.time`: put the clock back by an hour, and for an hour no timer fires, nothing is
gathered, flushed or given up; put it ahead, and every deadline is over at once, that of a remote's final reply included,
which sends the message twice.
"""

from __future__ import annotations

import time
from typing import Any


def count_monotonic(reactor: Any) -> None:
    """Make a reactor's `seconds` and its delays, those that run already too, those of the monotonic clock.

    Only `reactor.seconds` differences mean anything afterwards. A reactor with another clock, as tests have, is left alone.
    """
    if getattr(reactor, "seconds", None) is not time.time:
        return
    ahead = time.monotonic() - time.time()
    for call in reactor.getDelayedCalls():
        call.time += ahead  # all by the same: their order in the reactor's heap stays
        call.seconds = time.monotonic
    reactor.seconds = time.monotonic
