# SPDX-License-Identifier: MIT
"""Next hops that drop, stall, dribble, flood and lie: one verdict for each recipient, never a wrong yes, never a hang."""

from __future__ import annotations

import time
from collections.abc import Callable

import attrs
import pytest
from twisted.internet.defer import succeed

from polarismail.relay.session import ConnectFailed, Session
from polarismail.values.reply import Reply
from tests.reactor import run
from tests.relay.scripted import Gone, Peer, Server
from tests.relay.test_session import QUICK, message, no_read, open_to, reader, recipients, send_once

SHORT = attrs.evolve(
    QUICK,
    greeting_seconds=0.2,
    ehlo_seconds=0.2,
    mail_seconds=0.2,
    rcpt_seconds=0.2,
    data_seconds=0.2,
    block_seconds=0.3,
    final_seconds=0.2,
    rset_seconds=0.2,
    quit_seconds=0.2,
)
STEPS = ("connect", "EHLO", "MAIL", "RCPT", "DATA", "content", "dot")


def until(step: str, then: Callable[[Peer], object], pipelining: bool = False) -> Callable[[Peer], None]:
    """Behave up to a step, then do something else."""

    def script(peer: Peer) -> None:
        if step == "connect":
            then(peer)
            return
        peer.say(b"220 hi\r\n")
        peer.line()
        if step == "EHLO":
            then(peer)
            return
        peer.say(b"250-mx\r\n250-PIPELINING\r\n250 8BITMIME\r\n" if pipelining else b"250-mx\r\n250 8BITMIME\r\n")
        command = ""
        while command != "DATA":
            command = peer.line()[:4].decode()
            if step == command:
                then(peer)
                return
            peer.say(b"354 go\r\n" if command == "DATA" else b"250 ok\r\n")
        if step == "dot":
            peer.until(b"\r\n.\r\n")
        then(peer)

    return script


def verdict_of(server: Server, lines: int = 10_000, **options: object) -> Reply:
    """What became of one recipient, whether or not a session came about. The content is large, so that it can be cut."""
    content = b"x" * 70 + b"\r\n"
    whole = message(None, len(content) * lines)

    def read(offset: int, octets: int) -> object:
        return succeed((content * (octets // len(content) + 2))[offset % len(content) :][:octets])

    try:
        return run(send_once, server, whole, read, **options)[0]
    except ConnectFailed as failed:
        assert not failed.permanent
        return failed.reply


@pytest.mark.parametrize("pipelining", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_drop_at_any_step_is_temporary(step: str, pipelining: bool) -> None:
    with Server(until(step, Peer.drop, pipelining)) as server:
        reply = verdict_of(server, 300_000 if step == "content" else 10_000)
    assert (reply.code, reply.status) == (451, (4, 4, 2))
    assert ("it may have arrived" in reply.text) == (step == "dot")


@pytest.mark.parametrize("pipelining", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_silence_at_any_step_times_out(step: str, pipelining: bool) -> None:
    with Server(until(step, Peer.wait_without_reading, pipelining)) as server:
        reply = verdict_of(server, settings=SHORT)
    assert (reply.code, reply.status) == (451, (4, 4, 2))
    assert reply.text.startswith("Timed out")


def dribble(peer: Peer) -> None:
    peer.say(b"250-")
    for _ in range(200):
        peer.say(b"x")
        time.sleep(0.05)


def flood_of_lines(peer: Peer) -> None:
    for _ in range(100_000):
        peer.say(b"250-more and more\r\n")


def flood_of_octets(peer: Peer) -> None:
    for _ in range(10_000):
        peer.say(b"x" * 10_000)


@pytest.mark.parametrize("rude", [dribble, flood_of_lines, flood_of_octets])
@pytest.mark.parametrize("step", ["connect", "EHLO", "RCPT", "dot"])
def test_dribble_and_floods_end(step: str, rude: Callable[[Peer], None]) -> None:
    with Server(until(step, rude)) as server:
        reply = verdict_of(server, settings=SHORT)
    assert reply.is_transient


JUNK = [
    b"\r\n",
    b"ok\r\n",
    b"250\n",
    b"999 x\r\n",
    b"250-a\r\n550 b\r\n",
    b"\x16\x03\x01\r\n",
    b"354 odd\r\n354 odd\r\n",
]


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("step", ["connect", "EHLO", "MAIL", "RCPT", "dot"])
def test_junk_is_temporary(step: str, junk: bytes) -> None:
    def rude(peer: Peer) -> None:
        peer.say(junk)
        peer.everything()

    with Server(until(step, rude, pipelining=True)) as server:
        assert verdict_of(server).is_transient


@pytest.mark.parametrize("pipelining", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_4yz_at_any_step_is_told(step: str, pipelining: bool) -> None:
    def later(peer: Peer) -> None:
        peer.say(b"451 4.7.1 later\r\n" + (b"503 no\r\n" * 2 if pipelining and step in ("MAIL", "RCPT") else b""))
        peer.everything()

    with Server(until(step, later, pipelining)) as server:
        assert str(verdict_of(server)) == "451 4.7.1 later"


@pytest.mark.parametrize("step", ["MAIL", "RCPT", "DATA", "content", "dot"])
def test_421_ends_the_session_for_everybody(step: str) -> None:
    def closing(peer: Peer) -> None:
        peer.say(b"421 4.3.2 closing\r\n250 ok\r\n250 ok\r\n")
        peer.everything()

    async def check() -> tuple[list[Reply], bool, bool]:
        session = await open_to(server)
        whole = message()
        replies = await session.send(whole, recipients(whole, "a", "b"), no_read)
        return replies, session.usable, session.stale

    with Server(until(step, closing, pipelining=True)) as server:
        replies, usable, stale = run(check)
    assert [reply.code for reply in replies] == [421, 421] or step == "dot"
    assert not usable and not stale


def test_a_yes_before_the_end_of_content_is_no_yes() -> None:
    def early(peer: Peer) -> None:
        # In one piece: said a moment later, the client may have sent everything already.
        peer.say(b"354 go\r\n250 2.0.0 queued\r\n")
        peer.everything()

    with Server(until("DATA", early)) as server:
        assert verdict_of(server).code == 451


def test_a_no_before_the_end_of_content_is_a_verdict() -> None:
    def early(peer: Peer) -> None:
        peer.say(b"552 5.3.4 too big\r\n")
        peer.everything()

    with Server(until("content", early)) as server:
        assert str(verdict_of(server)) == "552 5.3.4 too big"


def test_words_out_of_turn_before_ehlo() -> None:
    def eager(peer: Peer) -> None:
        peer.say(b"220 hi\r\n250-mx\r\n250 8BITMIME\r\n250 ok\r\n250 ok\r\n354 go\r\n250 ok\r\n")
        peer.everything()

    with Server(eager) as server, pytest.raises(ConnectFailed) as caught:
        run(open_to, server)
    assert caught.value.reply.status == (4, 5, 0)


def test_a_reused_connection_that_had_died_is_stale() -> None:
    def once(peer: Peer) -> None:
        peer.greet(b"8BITMIME")
        peer.take()
        peer.line()  # the next MAIL

    async def check() -> tuple[list[Reply], Session]:
        session = await open_to(server)
        whole = message()
        assert (await session.send(whole, recipients(whole), no_read))[0].code == 250
        return await session.send(whole, recipients(whole), no_read), session

    with Server(once) as server:
        replies, session = run(check)
    assert replies[0].status == (4, 4, 2)
    assert session.stale and not session.usable


def test_sending_on_a_closed_session_is_a_deferral() -> None:
    def script(peer: Peer) -> None:
        peer.greet(b"8BITMIME")
        peer.everything()

    async def check() -> list[Reply]:
        session = await open_to(server)
        session.abort()
        whole = message()
        assert not session.usable
        await session.quit()
        return await session.send(whole, recipients(whole, "a", "b"), no_read)

    with Server(script) as server:
        assert [reply.code for reply in run(check)] == [451, 451]


def test_quit_does_not_wait_for_ever() -> None:
    def script(peer: Peer) -> None:
        peer.greet(b"8BITMIME")
        assert peer.line() == b"QUIT"
        peer.everything()

    async def check() -> None:
        session = await open_to(server, SHORT)
        await session.quit()

    with Server(script) as server:
        run(check)


def test_a_reader_that_stops_reading_times_out() -> None:
    def script(peer: Peer) -> None:
        until("content", Peer.wait_without_reading)(peer)

    with Server(script) as server:
        reply = verdict_of(server, 300_000, settings=SHORT)
    assert reply.text == "Timed out while sending the content"


def test_a_next_hop_that_takes_its_time_for_each_answer_is_waited_for() -> None:
    def slow(peer: Peer) -> None:
        def wait(octets: bytes) -> None:
            time.sleep(0.25)
            peer.say(octets)

        wait(b"220 hi\r\n")
        peer.line(), wait(b"250-mx\r\n"), wait(b"250 PIPELINING\r\n")
        for answer in (b"250 ok\r\n", b"250 ok\r\n", b"354 ok\r\n"):
            peer.line(), wait(answer)
        try:
            peer.until(b"\r\n.\r\n")
        except Gone as gone:
            raise AssertionError from gone
        wait(b"250 ok\r\n")

    with Server(slow) as server:
        content = b"line\r\n"
        patient = attrs.evolve(QUICK, mail_seconds=1, rcpt_seconds=1, data_seconds=1, final_seconds=1, ehlo_seconds=1)
        replies = run(send_once, server, message(None, 6), reader(content), settings=patient)
    assert replies[0].code == 250
