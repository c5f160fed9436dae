# SPDX-License-Identifier: MIT
"""An SMTP client may come, go, or break off at any moment: nothing hangs, leaks, overtakes, or reaches the reactor's log."""

from __future__ import annotations

import socket
import struct
import threading
from pathlib import Path

import pytest
from attrs import evolve

from polarismail.net.contracts import TransportSettings
from polarismail.serve.smtp_context import SessionSettings
from polarismail.values.errors import SpoolFull, SpoolUnhealthy, Unavailable
from tests.reactor import run
from tests.serve.smtp_world import SmtpWorld, eventually

SESSION = SessionSettings(soft_error_delay_seconds=0.0)
COMMANDS = {"login": "MAIL FROM:<a@b.test>", "mail": "MAIL FROM:<a@b.test>", "rcpt": "RCPT TO:<bob@here.test>"}


def reset(raw: socket.socket) -> None:
    """Close with RST."""
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


@pytest.mark.parametrize("outcome", [None, RuntimeError("broken")])
@pytest.mark.parametrize("stage", ["login", "mail", "rcpt"])
def test_client_leaves_while_an_answer_is_awaited(stage: str, outcome: Exception | None) -> None:
    with SmtpWorld() as world:
        with world.client() as client:
            if stage == "rcpt":
                assert client.say("MAIL FROM:<a@b.test>") == 250
            world.hold.add(stage)
            client.send(COMMANDS[stage].encode() + b"\r\nQUIT\r\n")
            world.wait_for(stage)
            reset(client.socket)
        world.wait_until_empty()
        world.release(stage, outcome)
        if not (stage == "login" and outcome):
            assert world.logouts == world.logins == ["stranger"], "every login is logged out, once"


def test_client_leaves_during_a_login(tmp_path: Path) -> None:
    with SmtpWorld() as world:
        world.hold.add("login")
        with world.client() as client:
            client.send(b"AUTH PLAIN AGFubgBzZWNyZXQ=\r\n")
            world.wait_for("login")
            reset(client.socket)
        world.wait_until_empty()
        world.release("login")
        assert world.logouts == ["ann"]
        assert not world.logged


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
def test_client_leaves_during_the_commit(leave) -> None:
    """The message is taken all the same: its draft belongs to the commit."""
    with SmtpWorld() as world:
        world.hold.add("commit")
        with world.client() as client:
            client.begin()
            client.send(b"Subject: x\r\n\r\n.\r\n")
            world.wait_for("commit")
            leave(client.socket)
        if leave is reset:
            world.wait_until_empty()
        world.release("commit")
        world.wait_until_empty()
        assert len(world.messages) == 1 and world.drafts[0].abandoned == 0
        assert not world.logged


@pytest.mark.parametrize("held", [False, True])
def test_client_leaves_within_the_content(held: bool) -> None:
    with SmtpWorld() as world:
        if held:
            world.hold.add("write")
        with world.client() as client:
            client.begin()
            client.send(b"Subject: x\r\n\r\ntext\r\n")
            eventually(lambda: world.drafts[0].octets, "some content")
            reset(client.socket)
        world.wait_until_empty()
        world.release("write", Unavailable("the draft is abandoned"))
        assert world.drafts[0].abandoned == 1
        assert not world.messages and not world.logged


@pytest.mark.parametrize("stage", ["login", "rcpt", "write", "commit", ""])
@pytest.mark.parametrize("content", [b"BDAT 12 LAST\r\nSubject: x\r\n", b"BDAT 5\r\nSubjeBDAT 7 LAST\r\nct: x\r\n"])
def test_a_client_that_closes_its_side_reads_every_answer(stage: str, content: bytes) -> None:
    """As Exim does behind BDAT LAST and QUIT: who never hears of the 250 sends the message again."""
    with SmtpWorld() as world, world.client() as client:
        world.hold.add(stage)
        client.send(b"MAIL FROM:<a@b.test>\r\nRCPT TO:<bob@here.test>\r\n" + content + b"QUIT\r\n")
        client.socket.shutdown(socket.SHUT_WR)
        if stage:
            world.wait_for(stage)
            world.hold.clear()
            world.release(stage)
        answers = [250, 250, *[250] * content.count(b"BDAT"), 221, None]
        assert [client.reply() for _ in answers] == answers
        world.wait_until_empty()
        assert len(world.messages) == 1 and world.logins == world.logouts


@pytest.mark.parametrize(
    "octets", [b"", b"NOOP", b"NOOP\r\n", b"MAIL FROM:<a@b.test>\r\nRCPT TO:<bob@here.test>\r\nBDAT 9\r\nx"]
)
def test_a_client_that_closes_its_side_without_a_quit_is_left_at_once(octets: bytes) -> None:
    with SmtpWorld() as world, world.client() as client:
        client.send(octets)
        client.socket.shutdown(socket.SHUT_WR)
        while client.reply() is not None:
            pass
        world.wait_until_empty()
        assert not world.messages and not world.logged


def test_nothing_is_awaited_of_a_client_that_closed_its_side_before_we_refuse_it() -> None:
    with SmtpWorld(transport=TransportSettings(linger_seconds=600.0)) as world, world.client() as client:
        world.hold.add("mail")
        client.send(b"MAIL FROM:<a@b.test>\r\nGET / HTTP/1.1\r\n")
        client.socket.shutdown(socket.SHUT_WR)
        world.wait_for("mail")
        eventually(lambda: all(each._read_all for each in world.factory.connections), "the end to be seen")
        world.release("mail")
        assert [client.reply(), client.reply(), client.reply()] == [250, 221, None]
        world.wait_until_empty()


def test_a_client_that_closes_its_side_ahead_of_much_that_waits() -> None:
    with SmtpWorld() as world, world.client() as client:
        world.hold.add("mail")
        client.send(b"MAIL FROM:<a@b.test>\r\n" + b"VRFY x\r\n" * 50 + b"RSET\r\n" * 20 + b"QUIT\r\n")
        client.socket.shutdown(socket.SHUT_WR)
        world.wait_for("mail")
        world.hold.clear()
        world.release("mail")
        answers = [250, *[252] * 50, *[250] * 20, 221, None]
        assert [client.reply() for _ in answers] == answers
        world.wait_until_empty()


@pytest.mark.parametrize("octets", [b"", b"\x16\x03\x01\x00", b"EHLO again\r\n" * 50])
def test_client_leaves_during_the_handshake(tmp_path: Path, octets: bytes) -> None:
    with SmtpWorld(tmp_path, tls="starttls") as world:
        with world.client() as client:
            assert client.say("STARTTLS") == 220
            client.send(octets)
        world.wait_until_empty()
        assert not world.logged


def test_many_octets_wait_while_a_command_is_performed() -> None:
    """Reading stops at a bound, goes on after, and every command is answered in order."""
    session = evolve(SESSION, max_junk_commands=10**9)
    with SmtpWorld(session=session) as world, world.client() as client:
        world.hold.add("mail")
        count = 200_000
        sender = threading.Thread(
            target=client.send, args=(b"MAIL FROM:<a@b.test>\r\n" + b"NOOP\r\n" * count + b"QUIT\r\n",)
        )
        sender.start()
        world.wait_for("mail")
        (connection,) = world.factory.connections
        eventually(lambda: connection.engine.buffered > 65536, "the buffer to fill")
        assert connection.engine.buffered <= 2 * 65536 + 65536
        world.hold.clear()
        world.release("mail")
        assert client.reply() == 250
        assert client.lines == ["2.1.0 Sender OK"]
        for _ in range(count):
            assert client.reply() == 250
        assert client.reply() == 221
        assert client.reply() is None
        sender.join()


@pytest.mark.parametrize("stage", ["login", "mail", "rcpt", "commit", "write"])
@pytest.mark.parametrize("later", [False, True])
def test_what_breaks_is_a_451_and_ends_the_session(stage: str, later: bool) -> None:
    with SmtpWorld() as world, world.client() as client:
        (world.hold if later else world.fail).add(stage)
        client.send(b"MAIL FROM:<a@b.test>\r\n")
        codes: list[int | None] = []
        for line in (b"RCPT TO:<bob@here.test>\r\n", b"DATA\r\n", b"Subject: x\r\n\r\n.\r\n", b"NOOP\r\n"):
            if later and not codes and stage in ("login", "mail"):
                world.wait_for(stage)
                world.release(stage, RuntimeError("broken"))
            codes.append(client.reply())
            if codes[-1] not in (250, 354):
                break
            client.send(line)
            if later and {b"R": "rcpt", b"S": ""}.get(line[:1]) == stage:
                world.wait_for(stage)
                world.release(stage, RuntimeError("broken"))
            if later and line[:1] == b"S" and stage in ("commit", "write"):
                world.wait_for(stage)
                world.release(stage, RuntimeError("broken"))
        assert codes[-1] == 451
        if stage == "login":
            assert client.say("QUIT") == 221  # nobody was let in, and nothing is in doubt
        else:
            assert client.reply() is None
        client.socket.close()
        world.wait_until_empty()
        assert world.logged, "the log says what broke"
        assert not world.messages
        assert all(draft.abandoned for draft in world.drafts if stage != "commit")


@pytest.mark.parametrize(("problem", "code"), [(SpoolFull("full"), 452), (SpoolUnhealthy("sick"), 421)])
def test_no_content_is_asked_for_where_it_cannot_be_kept(problem: Exception, code: int) -> None:
    with SmtpWorld() as world, world.client() as client:
        world.draft_error = problem
        client.send(b"MAIL FROM:<a@b.test>\r\nRCPT TO:<bob@here.test>\r\nDATA\r\n")
        assert [client.reply() for _ in range(3)] == [250, 250, code]
        if code == 421:
            assert client.reply() is None
        else:
            world.draft_error = None
            client.begin()
            client.send(b".\r\n")
            assert client.reply() == 250


@pytest.mark.parametrize(("problem", "code"), [(SpoolFull("full"), 452), (Unavailable("away"), 451)])
def test_a_content_that_cannot_be_written_is_read_to_its_end(problem: Exception, code: int) -> None:
    """HOSTILE E1: a full disk is 452, and the session goes on; on doubt the connection goes too."""
    with SmtpWorld() as world, world.client() as client:
        world.hold.add("write")
        client.begin()
        client.send(b"Subject: x\r\n\r\n")
        world.wait_for("write")
        world.release("write", problem)
        client.send(b"NOOP\r\nNOOP\r\n.\r\n")
        assert client.reply() == code
        if code == 452:
            client.send(b"NOOP\r\n")
        assert client.reply() == (250 if code == 452 else None)
        assert world.drafts[0].abandoned


# -- going down ----------------------------------------------------------------------------------------------------------


def test_idle_clients_are_told_at_once() -> None:
    with SmtpWorld() as world, world.client() as idle, world.client(hello=False) as silent:
        run(world.factory.shut_down)
        for client in (idle, silent):
            assert client.reply() == 421
            assert client.reply() is None
            client.socket.close()
        world.wait_until_empty()


def test_a_command_that_is_being_performed_is_answered_first() -> None:
    with SmtpWorld() as world, world.client() as client:
        world.hold.add("mail")
        client.send(b"MAIL FROM:<a@b.test>\r\nNOOP\r\nNOOP\r\n")
        world.wait_for("mail")
        run(world.factory.shut_down)
        run(world.factory.shut_down)  # asked twice, said once
        world.release("mail")
        assert [client.reply() for _ in range(3)] == [250, 421, None]


def test_a_content_may_come_to_its_end() -> None:
    with SmtpWorld() as world, world.client() as client:
        client.begin()
        client.send(b"Subject: x\r\n")
        run(world.factory.shut_down)
        client.send(b"\r\ntext\r\n")
        client.send(b".\r\n")
        assert [client.reply() for _ in range(3)] == [250, 421, None]
        assert len(world.messages) == 1


def test_a_handshake_may_come_to_its_end_or_be_cut(tmp_path: Path) -> None:
    world = SmtpWorld(tmp_path, tls="starttls", transport=TransportSettings(linger_seconds=2))
    with world, world.client() as client, world.client() as mute:
        assert client.say("STARTTLS") == mute.say("STARTTLS") == 220
        run(world.factory.shut_down)
        client.start_tls()
        assert [client.reply(), client.reply()] == [421, None]
        client.socket.close()
        world.wait_until_empty()


def test_an_implicit_handshake_may_come_to_its_end_or_be_cut(tmp_path: Path) -> None:
    world = SmtpWorld(tmp_path, tls="implicit", transport=TransportSettings(linger_seconds=0.5))
    with world, socket.create_connection(("127.0.0.1", world.port), 10):
        eventually(lambda: world.connections == 1, "the connection")
        run(world.factory.shut_down)
        world.wait_until_empty()
