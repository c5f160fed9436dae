# SPDX-License-Identifier: MIT
"""Which replies wait for the others of their group, and which may not (RFC 2920 §3.2)."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.cred.portal import Portal
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport

from polarismail.serve.smtp import ESMTPFactory


class CountingTransport(StringTransport):
    """Each write by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.writes.append(data)


@pytest.fixture
def transport() -> Any:
    protocol: Any = ESMTPFactory(Portal(None), reactor=Clock()).buildProtocol(None)
    made = CountingTransport()
    protocol.makeConnection(made)
    protocol.dataReceived(b"EHLO client.test\r\n")
    made.writes.clear()
    made.deliver = protocol.dataReceived  # type: ignore[attr-defined]
    yield made
    protocol.connectionLost()


@pytest.mark.parametrize("command", [b"NOOP", b"VRFY ann", b"EXPN list", b"TURN", b"WHAT"])
def test_some_replies_are_never_held_back(transport: Any, command: bytes) -> None:
    transport.deliver(b"RSET\r\n" + command + b"\r\nRSET\r\nRSET\r\n")
    first, second = transport.writes
    assert first.count(b"\r\n") == 2 and second == b"250 2.0.0 OK\r\n" * 2


def test_the_replies_of_a_group_go_together(transport: Any) -> None:
    transport.deliver(b"RSET\r\n" * 5)
    assert transport.writes == [b"250 2.0.0 OK\r\n" * 5]
