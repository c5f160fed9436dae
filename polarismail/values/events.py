# SPDX-License-Identifier: MIT
"""How any part of the server tells the log what happened: the name of an event (telemetry.EVENTS) and facts about it.

A part is given what to call, and knows nothing of files or formats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

RecordEvent = Callable[[str, dict[str, Any]], None]


def no_event(name: str, fields: dict[str, Any]) -> None:
    """For where nobody keeps a log of events."""
