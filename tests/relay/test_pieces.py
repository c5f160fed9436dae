# SPDX-License-Identifier: MIT
"""What waits in thousands leaves room for new mail: in the reactor's turns, in the spool's groups, and in connections."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from polarismail.relay.clients import ClientSettings
from polarismail.relay.mx import Exchanger
from polarismail.relay.pieces import PIECE, Pieces
from polarismail.relay.queue import Item
from polarismail.relay.routing import Destination, Router, RoutingSettings
from polarismail.relay.settings import RelaySettings
from polarismail.relay.sites import Sites, Verdict
from polarismail.values.reply import TRY_AGAIN
from tests.relay.relays import Relay
from tests.relay.test_queue import recipient


class Slow(Clock):
    """A reactor whose time goes by while somebody works."""

    def work(self, seconds: float) -> None:
        self.rightNow += seconds


def verdict(count: int, name: str = "m") -> Verdict:
    items = [Item(recipient(name, number, attempts=1), 0.0) for number in range(count)]
    return Verdict(items, [TRY_AGAIN] * count, "mx", is_explicit=True, is_final=False, sending_seconds=1.5)


def test_small_verdicts_are_settled_at_once_large_ones_in_pieces() -> None:
    clock, settled, turns = Clock(), list[Verdict](), list[int]()

    def settle(each: Verdict) -> None:
        settled.append(each)
        clock.callLater(0, lambda: turns.append(len(settled)))  # others, who come after us

    pieces = Pieces(clock, settle, lambda: False)
    small, large = verdict(PIECE), verdict(3 * PIECE + 1, "n")
    pieces.put(large)
    pieces.put(small)
    assert settled == [small]
    clock.advance(0)
    assert turns == [2, 2, 3, 4, 5], "others have their turn after each piece"
    assert [len(each.items) for each in settled[1:]] == [PIECE, PIECE, PIECE, 1]
    assert [item for each in settled[1:] for item in each.items] == large.items
    for each in settled[1:]:
        assert (each.remote, each.is_explicit, each.is_final, each.sending_seconds) == ("mx", True, False, 1.5)
        assert len(each.replies) == len(each.items)


@pytest.mark.parametrize(("is_busy", "share"), [(False, 1.0), (True, 0.25)])
def test_while_there_is_new_mail_a_quarter_of_the_time_is_taken(is_busy: bool, share: float) -> None:
    clock = Slow()
    worked = list[int]()

    def settle(each: Verdict) -> None:
        worked.append(len(each.items))
        clock.work(0.01)

    pieces = Pieces(clock, settle, lambda: is_busy)
    pieces.put(verdict(100 * PIECE))
    while calls := clock.getDelayedCalls():
        clock.advance(max(0.0, calls[0].getTime() - clock.seconds()))
    assert worked == [PIECE] * 100
    assert clock.seconds() == pytest.approx(1.0 / share, rel=0.05)


def test_finish_leaves_nothing_and_a_defect_stops_nothing() -> None:
    clock, settled = Clock(), list[Any]()

    def settle(each: Verdict) -> None:
        settled.extend(each.items)
        if len(settled) == PIECE:
            raise ValueError("a defect")

    pieces = Pieces(clock, settle, lambda: True)
    many = verdict(4 * PIECE)
    pieces.put(many)
    with pytest.raises(ValueError):
        clock.advance(0)
    clock.advance(0)
    pieces.put(more := verdict(2 * PIECE, "n"))
    pieces.finish()
    assert settled == [*many.items, *more.items]
    assert not clock.getDelayedCalls()


def test_a_site_that_is_down_fails_in_pieces(tmp_path: Path) -> None:
    """The spool gets as small groups as the reactor."""
    relay = Relay(tmp_path, {"down.test": {"MX": [[10, "mx.down.test"]]}, "mx.down.test": {"A": ["127.0.0.9"]}})
    try:
        groups: list[int] = []
        record = relay.spool.record

        def counted(outcomes: Any, reports: Any = ()) -> Any:
            groups.append(len(outcomes))
            return record(outcomes, reports)

        relay.spool.record = counted  # type: ignore[method-assign]
        relay.submit_many([[f"u{n}@down.test" for n in range(150)] for _ in range(4)])
        relay.wait(lambda: len(relay.named("deferred")) == 600, "600 deferrals")
        relay.wait(lambda: relay.manager.counts().in_hand == 0, "everything is recorded")
        assert max(groups) <= PIECE and sum(groups) == 600
    finally:
        relay.stop()


class Never:
    """Connections that do not come about."""

    def __init__(self) -> None:
        self.waiting: dict[str, Deferred[Any]] = {}

    def connect(self, reactor: Any, host: Any, *args: Any, **options: Any) -> Deferred[Any]:
        waiter = self.waiting[host.address] = Deferred()
        return waiter


def test_retries_leave_connections_to_new_mail() -> None:
    clock, never, settled = Clock(), Never(), list[Verdict]()
    settings = RelaySettings(connections=10)
    sites = Sites(
        clock,
        Router(None, RoutingSettings(), random.Random(1), clock.seconds),  # type: ignore[arg-type]
        settings,
        ClientSettings(),
        connect=never.connect,
        read=lambda *_: Deferred(),
        settle=settled.append,
    )
    sites.start()

    def put(number: int, attempts: int) -> None:
        address = f"192.0.2.{number}"
        item = Item(recipient(f"m{number}", number, attempts=attempts), 0.0)
        sites.put(Destination(address, (Exchanger(0, address, (address,)),), 25), [item])
        clock.advance(0)

    for number in range(20):
        put(number, attempts=1)
    assert sites.connections == 9, "one is left"
    put(100, attempts=0)
    assert sites.connections == 10 and "192.0.2.100" in never.waiting
    put(101, attempts=0)
    assert "192.0.2.101" not in never.waiting, "there is none left"
    gone = list(never.waiting)[:2]
    never.waiting[gone[0]].errback(ValueError("down"))
    clock.advance(0)
    assert "192.0.2.101" in never.waiting, "new mail goes before the eleven sites that waited before it"
    assert sites.connections == 10
    never.waiting[gone[1]].errback(ValueError("down"))
    assert sites.connections == 9, "the ten that wait have retries only"
    never.waiting["192.0.2.100"].errback(ValueError("down"))
    clock.advance(0)
    assert sites.connections == 9 and len(never.waiting) == 12, "one retry took the place"
