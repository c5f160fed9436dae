# SPDX-License-Identifier: MIT
"""What one ordinary message leaves in the event log: three lines, wherever it goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.e2e.server import Helper, Server, wait_until


def test_an_ordinary_message_has_three_events(
    make_server: Callable[..., Server], make_helper: Callable[..., Helper]
) -> None:
    sink = make_helper("sink")
    dns = make_helper("dns", {"there.test": {"MX": [[10, "mx.there.test"]]}, "mx.there.test": {"A": ["127.0.0.1"]}})
    server = make_server(dns_port=dns.port, remote_port=sink.port).start()
    wait_until(lambda: server.events("started"), "the start in the log")

    def events() -> list[dict[str, Any]]:
        # A busy machine holds the reactor up, and the log says so.
        return [event for event in server.events() if event["event"] != "stall"]

    before = len(events())
    for recipient, last in (("zoe@there.test", "relayed"), ("bob@here.test", "delivered")):
        with server.smtp("submission", "ann@here.test") as client:
            client.sendmail("ann@here.test", [recipient], "From: ann@here.test\r\nSubject: three\r\n\r\nHi\r\n")
        wait_until(lambda before=before: len(events()) >= before + 3, "three events")
        mine = events()[before:]
        assert [event["event"] for event in mine] == ["received", last, "removed"], mine
        assert len({event["queue_id"] for event in mine}) == 1
        before += 3
    # Connections to the next hop have an end, too: nothing is said about that either.
    wait_until(lambda: server.stop() is not None, "the end")
    assert [event["event"] for event in events()[before:]] == ["stopped"]
