# SPDX-License-Identifier: MIT
"""Where the manager sends mail on to, and how what comes back is recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.task import deferLater

from polarismail.relay.queue import Item
from polarismail.relay.sites import Verdict
from polarismail.values.reply import OK
from tests.reactor import reactor, run
from tests.relay.relays import Relay
from tests.relay.test_manager import ONE_MX
from tests.relay.test_queue import recipient


@pytest.fixture
def make_relay(tmp_path: Path) -> Iterator[Callable[..., Relay]]:
    made: list[Relay] = []

    def make(**settings: Any) -> Relay:
        made.append(Relay(tmp_path, ONE_MX, **settings))
        return made[-1]

    yield make
    for relay in made:
        relay.stop()


class OtherIsAway:
    """A bus to a worker that is a member, and cannot be reached."""

    number = 0

    def subscribe(self, *_: Any) -> None:
        pass

    when_linked = when_broken = subscribe

    def is_open(self, number: int) -> bool:
        return False


def test_mail_for_another_workers_site_waits_for_it_each_time(make_relay: Callable[..., Relay]) -> None:
    """Also where the destination is known from a moment ago: then no look-up is in between."""
    relay = make_relay(bus=OtherIsAway())
    handover = relay.manager.handover
    assert handover is not None
    handover.ownership.change(1, [1, 0])
    handover.ownership.owner = lambda pair: 1  # type: ignore[method-assign]
    for count in (1, 2, 3):
        relay.submit(f"user{count}@there.test")
        relay.wait(lambda: len(handover) == count, f"{count} wait for their owner")  # noqa: B023
    assert relay.manager.counts().sites == 0


def test_the_verdicts_of_one_turn_are_recorded_together(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay()
    groups: list[int] = []
    put = relay.manager._recorder.put

    def counted(outcomes: Any) -> None:
        groups.append(len(outcomes))
        put(outcomes)

    relay.manager._recorder.put = counted  # type: ignore[method-assign]

    async def settle() -> None:
        before = list(groups)
        for number in range(3):
            item = Item(recipient(f"m{number}"), 0.0)
            relay.manager._settle(Verdict([item], [OK], "mx"))
        assert groups == before, "the turn is not over"
        await deferLater(reactor, 0)

    run(settle)
    assert groups == [3]
    run(settle)
    assert groups == [3, 3], "each turn anew"
