# SPDX-License-Identifier: MIT
"""BDAT over sockets: drafts begin with the first chunk, what cannot be kept is read to its end, budgets and clocks hold."""

from __future__ import annotations

import time

import pytest

from polarismail.serve.smtp_context import SessionSettings
from polarismail.values.errors import SpoolFull, SpoolUnhealthy
from tests.reactor import run
from tests.serve.smtp_world import Client, SmtpWorld, eventually
from tests.serve.test_smtp_deadlines import BRIEF, trickle

BEGIN = b"MAIL FROM:<a@b.test>\r\nRCPT TO:<bob@here.test>\r\n"


def begin(client: Client) -> None:
    client.send(BEGIN)
    assert [client.reply(), client.reply()] == [250, 250]


def test_a_message_in_chunks_and_the_next_in_one_pipeline() -> None:
    with SmtpWorld() as world, world.client() as client:
        client.send(
            BEGIN + b"BDAT 5\r\na: b\r" + b"BDAT 6 LAST\r\n\n\r\n.\r\n" + BEGIN + b"BDAT 8 LAST\r\nc: d\r\n\r\n"
        )
        assert [client.reply() for _ in range(7)] == [250] * 7
        assert [octets for _, _, octets in world.messages] == [b"a: b\r\n\r\n.\r\n", b"c: d\r\n\r\n"]


def test_rset_between_chunks_forgets_them() -> None:
    with SmtpWorld() as world, world.client() as client:
        begin(client)
        client.send(b"BDAT 6\r\na: b\r\n")
        assert client.reply() == 250
        assert client.say("RSET") == 250
        assert world.drafts[0].abandoned == 1
        begin(client)
        client.send(b"BDAT 6 LAST\r\nc: d\r\n")
        assert client.reply() == 250
        assert [octets for _, _, octets in world.messages] == [b"c: d\r\n"]


def test_a_client_that_leaves_within_or_between_chunks_leaves_nothing() -> None:
    for octets in (b"BDAT 6\r\na: b\r\n", b"BDAT 60\r\na: b\r\n", b"BDAT 60 LAST\r\na: b\r\n"):
        with SmtpWorld() as world:
            with world.client() as client:
                begin(client)
                client.send(octets)
                eventually(lambda w=world: w.drafts and w.drafts[0].octets, "the content")
            world.wait_until_empty()
            assert world.drafts[0].abandoned == 1 and not world.messages


def test_where_there_is_no_room_chunks_are_read_and_refused() -> None:
    with SmtpWorld() as world, world.client() as client:
        world.draft_error = SpoolFull("full")
        client.send(BEGIN + b"BDAT 600\r\n" + b"x" * 600 + b"BDAT 6 LAST\r\nQUIT\r\n" + BEGIN)
        assert [client.reply() for _ in range(6)] == [250, 250, 452, 452, 250, 250]
        world.draft_error = None
        client.send(b"BDAT 6 LAST\r\na: b\r\n")
        assert client.reply() == 250
        assert len(world.messages) == 1


def test_an_unhealthy_spool_ends_the_session_at_once() -> None:
    with SmtpWorld() as world, world.client() as client:
        world.draft_error = SpoolUnhealthy("EIO")
        begin(client)
        client.send(b"BDAT 1000000\r\n")
        assert [client.reply(), client.reply()] == [421, None]


@pytest.mark.parametrize(("problem", "code"), [(SpoolFull("full"), 452), (RuntimeError("broken"), 451)])
def test_a_chunk_that_cannot_be_written_spoils_the_message(problem: Exception, code: int) -> None:
    with SmtpWorld() as world, world.client() as client:
        world.hold.add("write")
        begin(client)
        client.send(b"BDAT 6\r\na: b\r\nBDAT 6 LAST\r\nQUIT\r\n")
        world.wait_for("write")
        world.release("write", problem)
        assert [client.reply(), client.reply()] == [code, code]
        assert world.drafts[0].abandoned == 1 and not world.messages


def test_chunks_behind_a_bad_one_are_one_error() -> None:
    with SmtpWorld(session=SessionSettings(soft_errors=2, hard_errors=3)) as world, world.client() as client:
        chunk = b"BDAT 1000\r\n" + b"\0" * 1000
        client.send(BEGIN + chunk * 20 + b"RSET\r\n" + BEGIN + b"BDAT 6 LAST\r\na: b\r\n")
        assert [client.reply() for _ in range(26)] == [250] * 2 + [554] * 20 + [250] * 4
        assert len(world.messages) == 1


def test_chunks_of_nothing_are_junk() -> None:
    with SmtpWorld(session=SessionSettings(max_junk_commands=5)) as world, world.client() as client:
        begin(client)
        client.send(b"BDAT 0\r\n" * 10)
        assert [client.reply() for _ in range(7)] == [250] * 5 + [421, None]
        assert not world.messages


def test_octets_that_trickle_into_a_chunk_buy_no_time() -> None:
    session = SessionSettings(content_seconds=0.5, min_octets_per_second=100_000)
    with SmtpWorld(session=session, transport=BRIEF) as world, world.client() as client:
        begin(client)
        client.send(b"BDAT 100000 LAST\r\n")
        trickle(client, b"text\r\n", world)
        world.wait_until_empty()
        assert world.drafts[0].abandoned == 1 and not world.messages


def test_many_chunks_have_the_time_of_one_content() -> None:
    """Each is a command in time; all of them together are not."""
    session = SessionSettings(
        command_seconds=30.0, content_seconds=0.5, min_octets_per_second=100_000, max_junk_commands=10_000
    )
    with SmtpWorld(session=session, transport=BRIEF) as world, world.client() as client:
        begin(client)
        for _ in range(2000):
            client.send(b"BDAT 1\r\nx")
            if client.reply() != 250:
                break
            time.sleep(0.02)
        else:
            raise AssertionError("the server waits for ever")
        world.wait_until_empty()
        assert world.drafts[0].abandoned == 1 and not world.messages


def test_between_chunks_a_client_has_the_time_of_a_command() -> None:
    session = SessionSettings(command_seconds=0.3, content_seconds=60.0)
    with SmtpWorld(session=session, transport=BRIEF) as world, world.client() as client:
        begin(client)
        client.send(b"BDAT 6\r\na: b\r\n")
        assert [client.reply(), client.reply()] == [250, 421]
        world.wait_until_empty()


def test_a_chunk_may_come_to_its_end_when_the_server_stops() -> None:
    with SmtpWorld() as world, world.client() as client:
        begin(client)
        client.send(b"BDAT 6\r\na: b\r\n")
        assert client.reply() == 250
        run(world.factory.shut_down)
        client.send(b"BDAT 2 LAST\r\n\r\n")
        assert [client.reply(), client.reply(), client.reply()] == [250, 421, None]
        assert [octets for _, _, octets in world.messages] == [b"a: b\r\n\r\n"]
