# SPDX-License-Identifier: MIT
"""The POP3 engine alone: any slicing gives the same events, nothing that is sent raises, states are a table."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polarismail.wire import pop3_events as events
from polarismail.wire.pop3_events import Event, Known, Pop3Reply, err, ok
from polarismail.wire.pop3_server import LEGAL, Pop3Server, Pop3Settings, State


def engine(state: State = State.AUTHORIZATION, *, tls: bool = True, **settings: int) -> Pop3Server:
    server = Pop3Server(
        Pop3Settings(**settings), tls_available=tls, auth_mechanisms=lambda tls_active: ("PLAIN", "LOGIN")
    )
    server.answer(ok("ready"))
    server.state = state
    return server


def talk(server: Pop3Server, pieces: list[bytes]) -> list[Event]:
    """Everything that the engine gives when each event is answered with +OK."""
    seen: list[Event] = []
    for piece in pieces:
        server.receive(piece)
        while (event := server.next_event()) is not None:
            seen.append(event)
            if isinstance(event, events.Auth):
                server.challenge(b"x")
            else:
                server.answer(event.reply if isinstance(event, Known) else ok())
    return seen


LINES = st.sampled_from(
    [
        b"USER anna", b"PASS x y", b"AUTH PLAIN", b"AUTH PLAIN AGEAYg==", b"AGEAYg==", b"*", b"CAPA", b"STAT", b"LIST",
        b"LIST 1", b"UIDL 2", b"RETR 3", b"TOP 1 2", b"DELE 4", b"RSET", b"NOOP", b"\xff\x00", b"", b"x" * 60, b"\x16\x03",
        b"GET /",
    ]
)  # fmt: skip


@given(st.lists(LINES, max_size=8), st.sampled_from([b"\r\n", b"\n"]), st.data())
@settings(deadline=None, max_examples=300)
def test_slicing_does_not_matter(lines: list[bytes], end: bytes, data) -> None:
    octets = b"".join(line + end for line in lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(octets)), max_size=6)))
    pieces = [octets[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(octets)], strict=True)]
    whole = talk(engine(max_command_octets=50), [octets])
    assert talk(engine(max_command_octets=50), pieces) == whole


@given(st.lists(st.binary(max_size=40), max_size=12), st.sampled_from([State.AUTHORIZATION, State.TRANSACTION]))
@settings(deadline=None)
def test_nothing_that_is_sent_raises(pieces: list[bytes], state: State) -> None:
    talk(engine(state), pieces)


@pytest.mark.parametrize("verb", sorted(LEGAL))
@pytest.mark.parametrize("state", [State.AUTHORIZATION, State.TRANSACTION])
def test_what_the_table_does_not_allow_changes_nothing(verb: str, state: State) -> None:
    server = engine(state)
    arguments = {"TOP": " 1 1", "RETR": " 1", "DELE": " 1", "USER": " a", "PASS": " a"}.get(verb, "")
    server.receive(f"{verb}{arguments}\r\n".encode())
    event = server.next_event()
    refused = isinstance(event, Known) and event.reply == events.WRONG_STATE
    assert refused is (state not in LEGAL[verb])
    if refused:
        assert server.answer(events.WRONG_STATE).startswith(b"-ERR")
        assert server.state is state


def test_an_endless_line_costs_no_memory() -> None:
    server = engine(max_command_octets=100, max_discarded_octets=1000)
    for _ in range(10):
        server.receive(b"x" * 99)
        assert server.next_event() is None
        assert server.buffered <= 100
    server.receive(b"x" * 99)
    event = server.next_event()
    assert isinstance(event, Known) and event.closes
    server.answer(event.reply)
    server.receive(b"QUIT\r\n")
    assert server.buffered == 0 and server.next_event() is None


def test_octets_in_clear_are_gone_once_tls_has_begun() -> None:
    server = engine()
    server.receive(b"STLS\r\n")
    assert server.next_event() == events.Stls()
    server.answer(ok())
    server.receive(b"USER anna\r\nPASS x\r\n")
    assert server.next_event() is None
    server.tls_started()
    assert server.buffered == 0 and server.next_event() is None
    assert "STLS" not in server.capabilities()


def test_numbers_are_bounded() -> None:
    server = engine(State.TRANSACTION)
    server.receive(b"TOP 99999999999999999999 99999999999999999999\r\n")
    assert server.next_event() == events.Top(2**31 - 1, 2**31 - 1)


def test_no_reply_can_forge_a_line() -> None:
    assert Pop3Reply(True, "a\r\n-ERR b\x00\u2028").octets == b"+OK a??-ERR b??\r\n"
    assert err("wrong", "AUTH").octets == b"-ERR [AUTH] wrong\r\n"
    assert ok().octets == b"+OK\r\n"
    assert len(ok("x" * 1000).octets) <= 512


def test_passwords_are_in_no_repr() -> None:
    said = repr([events.Login("anna", b"hunter2"), events.Auth("PLAIN", b"hunter2"), events.AuthResponse(b"hunter2")])
    assert "hunter2" not in said
