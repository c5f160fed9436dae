# SPDX-License-Identifier: MIT
"""HOSTILE F1: each published variant of an end of data, on each kind of listener, in every slicing, ends nothing."""

from __future__ import annotations

import itertools

import pytest

from tests.dialogues.smtp_peer import EnginePeer

VARIANTS = [
    b"\n.\n", b"\n.\r", b"\r.\n", b"\r.\r", b"\n.\r\n", b"\r.\r\n", b"\r\n.\n", b"\r\n.\r",
    b"\r\n\0.\r\n", b"\r\n.\0\r\n", b"\r\n.\r\r\n", b"\r\r\n.\r\r\n",
]  # fmt: skip
SMUGGLED = b"MAIL FROM:<smuggled@remote.test>\r\nRCPT TO:<user@here.test>\r\nDATA\r\nSubject: two\r\n\r\nsecond"
BEGIN = [b"EHLO a.test\r\n", b"MAIL FROM:<a@remote.test>\r\n", b"RCPT TO:<user@here.test>\r\n", b"DATA\r\n"]


def begin(listener: str) -> EnginePeer:
    peer = EnginePeer({"listener": listener, "tls": "active", "login": "joe secret"})
    auth = [b"AUTH PLAIN AGpvZQBzZWNyZXQ=\r\n"] if listener == "submission" else []
    for command in [BEGIN[0], *auth, *BEGIN[1:]]:
        peer.send(command)
    while (line := peer.read_line()) is not None and line[:3] != b"354":
        assert line[:1] in b"23"
    return peer


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
@pytest.mark.parametrize("variant", VARIANTS, ids=repr)
@pytest.mark.parametrize("listener", ["mx", "submission"])
def test_it_ends_nothing(listener: str, variant: bytes, size: int) -> None:
    peer = begin(listener)
    octets = b"Subject: one\r\n\r\nfirst" + variant + SMUGGLED
    for at in range(0, len(octets), size):
        peer.send(octets[at : at + size])
        assert peer.is_quiet(), "it was taken for the end"
    peer.send(b"\r\n.\r\n")
    line = peer.read_line()
    assert line is not None and not peer.closed and peer.is_quiet(), "one message has one reply"
    if b"\0" in variant:
        assert line.startswith(b"554 5.6.0") and not peer.messages
    elif listener == "submission":
        assert line.startswith(b"550 5.6.0") and not peer.messages
    else:
        assert line.startswith(b"250")
        (message,) = peer.messages
        assert message.endswith(SMUGGLED + b"\r\n")
        assert not message.replace(b"\r\n", b"").count(b"\n") and not message.replace(b"\r\n", b"").count(b"\r")
    assert [type(event).__name__ for event in peer.events].count("Mail") == 1


@pytest.mark.parametrize("listener", ["mx", "submission"])
def test_the_real_end_cut_anywhere_ends_it(listener: str) -> None:
    octets = b"From: a@b.test\r\n\r\nfirst\r\n.\r\n"
    for first, second in itertools.combinations(range(1, len(octets)), 2):
        peer = begin(listener)
        for piece in (octets[:first], octets[first:second], octets[second:]):
            peer.send(piece)
        assert peer.messages == [octets[:-3]]
