# SPDX-License-Identifier: MIT
"""One worker among its fellows: hears who lives, says what all must know, and holds its slices of the limits they share.

Started when the worker's own parts work; from then on the relay has its share of the sites.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from polarismail.channel import Channel
from polarismail.inheritance import Place
from polarismail.net.bus import Bus
from polarismail.net.shares import Shares
from polarismail.net.slices import Slice

BEAT_SECONDS = 1.0
_ANSWER_SECONDS = 5.0
RELAY = "relay.connections"
"""The slice of outgoing connections. Incoming ones are counted in memory that all see: net/shares.py."""


class Fellows:
    """See the module. `parts` are the worker's own."""

    log = Logger()

    def __init__(
        self, reactor: Any, place: Place, channel: Channel, shares: Shares, *, directory: str, parts: Any
    ) -> None:
        self.place, self.shares, self.bus = place, shares, Bus(reactor, directory, place.number)
        self._reactor, self._channel, self._parts = reactor, channel, parts
        self._slices = {RELAY: self._slice(RELAY, lambda: parts.manager.connections)}
        self._beat = LoopingCall(self._do_beat)
        self._beat.clock = reactor
        self._incarnation = 0

    # -- life

    def start(self) -> None:
        """Join. Raises OSError."""
        parts = self._parts
        self._incarnation = parts.database.incarnation
        self.bus.subscribe("changed", self._changed_elsewhere)
        self.bus.subscribe("refresh", lambda sender, body: parts.directory.refresh())
        self.bus.subscribe("status", self._say_status)
        self.bus.listen(str(self._incarnation))
        self._slices[RELAY].when_more(parts.manager.more_connections)
        parts.spool.on_operator_change(self._changed_here)
        self._channel.subscribe("members", self._members)
        self._channel.subscribe("dead", self._release_dead)
        self._channel.subscribe("grant", self._grant)
        self._beat.start(BEAT_SECONDS).addErrback(lambda failure: self.log.failure("signs of life have ended", failure))

    def stop(self) -> None:
        """Leave. Idempotent."""
        if self._beat.running:
            self._beat.stop()
        self.bus.stop()

    def _do_beat(self) -> None:
        self.shares.beat()
        for each in self._slices.values():
            each.look()
        if self._parts.database.incarnation != self._incarnation:
            # It slept past its lease, and joined anew: nobody hands mail to the old one any more.
            self._incarnation = self._parts.database.incarnation
            self._channel.say("ready", incarnation=self._incarnation, name=self.bus.name)

    # -- the supervisor's words

    def _members(self, version: int, members: dict[str, int], names: dict[str, str]) -> None:
        self.bus.set_members({int(number): name for number, name in names.items()})
        handover = self._parts.manager.handover
        handover.change_members(version, {int(number): incarnation for number, incarnation in members.items()})

    def _release_dead(self, incarnation: int) -> None:
        released = self._parts.database.take_over(incarnation)
        # Where it cannot be done now, the committer's own tick does it, or the next one to start.
        released.addErrback(lambda failure: self.log.warn("{why}", why=failure.getErrorMessage()))

    def _grant(self, name: str, granted: int) -> None:
        self._slices[name].grant(granted)

    def _slice(self, name: str, used: Callable[[], int]) -> Slice:
        return Slice(
            self.place.grants.get(name, 0), used, lambda wanted: self._channel.say("want", name=name, wanted=wanted)
        )

    def connection_limit(self, wanted: int) -> int:
        """How many outgoing connections this worker may have now; with `wanted` more it asks for a larger slice."""
        mine = self._slices[RELAY]
        if wanted:
            mine.look(wanted)
        return mine.limit

    # -- what all must know

    def _changed_here(self, action: str, recipients: list[tuple[str, int]]) -> None:
        if action != "released":  # everybody finds that out for itself
            self.bus.broadcast("changed", json.dumps([action, recipients]).encode("ascii"))

    def _changed_elsewhere(self, sender: int, body: bytes) -> None:
        action, recipients = json.loads(body)
        self._parts.manager.operator_changed(action, [(queue_id, number) for queue_id, number in recipients])

    def refresh(self) -> Deferred[Any]:
        """A domain, account or alias has changed: fires when every worker that answers has seen it."""
        return self._ask_all("refresh")

    def statuses(self) -> Deferred[list[dict[str, Any]]]:
        """What each of the others says of itself."""
        return self._ask_all("status").addCallback(lambda answers: [json.loads(each) for each in answers if each])

    def _say_status(self, sender: int, body: bytes) -> bytes:
        return json.dumps(self._parts.control.describe()).encode("ascii")

    def _ask_all(self, kind: str) -> Deferred[list[bytes]]:
        asked = [self.bus.ask(number, kind, b"", _ANSWER_SECONDS) for number in self.bus.others]
        answered: Deferred[Any] = DeferredList(asked, consumeErrors=True)
        return answered.addCallback(lambda results: [answer for is_there, answer in results if is_there])
