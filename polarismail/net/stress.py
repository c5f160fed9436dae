# SPDX-License-Identifier: MIT
"""When places run out, everybody gets less time and fewer errors, until enough are free again.

Guarantees: those who are here already get less time, too; no step takes the reactor for long; it begins and ends at different
fillings, so that it does not flap. Who has logged in keeps the usual time.
Postfix, STRESS_README; HOSTILE E6.
"""

from __future__ import annotations

from time import monotonic
from typing import Any

from attrs import field, frozen

from polarismail.net.contracts import Hurry
from polarismail.net.eviction import Eviction
from polarismail.net.limits import ConnectionCounter
from polarismail.values.events import RecordEvent

LOOK_SECONDS = 0.5
_A_TURN = 500
_TELL_SECONDS = 10.0


@frozen
class StressSettings:
    """`[stress]`: parts of `connections.total`, and what waits and budgets are cut to. Raises ValueError."""

    begins_at: float = 0.8
    ends_at: float = 0.6
    hurry: Hurry = field(factory=Hurry)

    def __attrs_post_init__(self) -> None:
        if not 0 < self.ends_at <= self.begins_at:
            raise ValueError(f"expected 0 < ends_at <= begins_at, found {self.ends_at:g} and {self.begins_at:g}")


class Stress:
    """Watches one counter, and hurries its factories. `record_event` tells when it begins, when it ends, and who is turned
    away, at most every ten seconds."""

    def __init__(
        self,
        reactor: Any,
        counter: ConnectionCounter,
        settings: StressSettings,
        record_event: RecordEvent,
        protocol: str,
    ) -> None:
        self._reactor, self._counter, self._settings = reactor, counter, settings
        self._record_event, self._protocol = record_event, protocol
        self._eviction = Eviction(counter)
        self._call: Any = None
        self._turn: Any = None
        self._told = float("-inf")
        self._told_refused: dict[str, int] = {}
        self._told_put_out = 0
        self._is_on = False

    def is_stressed(self) -> bool:
        """Whether places run out."""
        return self._is_on

    def start(self) -> None:
        """Begin to look."""
        self._call = self._reactor.callLater(LOOK_SECONDS, self._on_due)

    def stop(self) -> None:
        """End. Idempotent."""
        for call in (self._call, self._turn):
            if call is not None and call.active():
                call.cancel()
        self._call = self._turn = None

    def reconfigure(self, settings: StressSettings) -> None:
        """Other settings, at the next look."""
        self._settings = settings
        if self._is_on:
            self._hurry(settings.hurry)

    def statistics(self) -> dict[str, Any]:
        """For `polarismail status`."""
        counter = self._counter
        return {
            "sessions": counter.total,
            "places": counter.places,
            "stressed": self._is_on,
            "put_out": self._eviction.put_out,
            "refused": dict(counter.refused),
        }

    def relieve(self) -> None:
        """Memory is short: put out some of those who have kept us waiting too long even for stress."""
        self._eviction.make_room(self._settings.hurry.command_seconds)

    def look(self) -> None:
        """Judge the filling now."""
        total, places = self._counter.total_of_all, self._counter.places
        if not self._is_on and total >= self._settings.begins_at * places:
            self._change(True, total, places)
        elif self._is_on and total < self._settings.ends_at * places:
            self._change(False, total, places)
        self._tell()

    def _on_due(self) -> None:
        self._call = self._reactor.callLater(LOOK_SECONDS, self._on_due)
        self.look()

    def _change(self, is_on: bool, total: int, places: int) -> None:
        self._is_on = is_on
        fields = {"protocol": self._protocol, "sessions": total, "places": places}
        self._record_event("stress-begins" if is_on else "stress-ends", fields)
        self._hurry(self._settings.hurry if is_on else None)

    def _hurry(self, hurry: Hurry | None) -> None:
        factories = self._counter.factories
        for factory in factories:
            factory.hurry(hurry)
        if self._turn is not None and self._turn.active():
            self._turn.cancel()
        self._apply([(factory, each) for factory in factories for each in factory.connections])

    def _apply(self, waiting: list[tuple[Any, Any]]) -> None:
        for factory, connection in waiting[-_A_TURN:]:
            factory.apply_settings(connection)
        del waiting[-_A_TURN:]
        self._turn = self._reactor.callLater(0, self._apply, waiting) if waiting else None

    def _tell(self) -> None:
        """Who was turned away or put out since it was last said."""
        counter, now = self._counter, monotonic()
        put_out = self._eviction.put_out
        if now - self._told < _TELL_SECONDS or (
            counter.refused == self._told_refused and put_out == self._told_put_out
        ):
            return
        fields: dict[str, Any] = {"protocol": self._protocol, "sessions": counter.total_of_all}
        if put_out > self._told_put_out:
            fields["put_out"] = put_out - self._told_put_out
        for why, number in counter.refused.items():
            if number > self._told_refused.get(why, 0):
                fields[f"refused_by_{why}"] = number - self._told_refused.get(why, 0)
        self._told, self._told_refused, self._told_put_out = now, dict(counter.refused), put_out
        self._record_event("connections-refused", fields)
