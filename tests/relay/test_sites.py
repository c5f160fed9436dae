# SPDX-License-Identifier: MIT
"""How a site's host is tried."""

from __future__ import annotations

import random
from typing import Any

from twisted.internet.task import Clock

from polarismail.relay.clients import ClientSettings, ConnectFailed
from polarismail.relay.mx import Exchanger
from polarismail.relay.queue import Item
from polarismail.relay.routing import Destination, Router, RoutingSettings
from polarismail.relay.settings import RelaySettings
from polarismail.relay.sites import Sites, Verdict
from polarismail.values.reply import TRY_AGAIN
from tests.relay.test_queue import recipient


def tried(*failures: ConnectFailed) -> list[str]:
    """The TLS that each connection was asked for, when they fail one after the other like this."""
    clock, settled, asked = Clock(), list[Verdict](), list[str]()
    coming = list(failures)

    async def connect(_: Any, host: Any, settings: Any, *, tls: str, **options: Any) -> Any:
        asked.append(tls)
        raise coming.pop(0)

    router = Router(None, RoutingSettings(), random.Random(1), clock.seconds)  # type: ignore[arg-type]
    sites = Sites(
        clock,
        router,
        RelaySettings(),
        ClientSettings(),
        connect=connect,
        read=lambda *_: None,  # type: ignore[arg-type, return-value]
        settle=settled.append,
    )
    sites.start()
    item = Item(recipient("m"), 0.0)
    sites.put(Destination("mx", (Exchanger(0, "mx.test", ("192.0.2.1",)),), 25), [item])
    clock.advance(0)
    assert [each.items for each in settled] == [[item]], "one verdict, from the last of them"
    return asked


def test_a_tls_session_that_is_not_taken_costs_one_connection() -> None:
    plain, broken = ConnectFailed(TRY_AGAIN), ConnectFailed(TRY_AGAIN, tls_broken=True)
    resumed = ConnectFailed(TRY_AGAIN, resumed=True)
    assert tried(plain) == ["opportunistic"]
    assert tried(broken, plain) == ["opportunistic", "none"]
    assert tried(resumed, plain) == ["opportunistic"] * 2
    assert tried(resumed, broken, plain) == ["opportunistic", "opportunistic", "none"]
