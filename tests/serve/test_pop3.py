# SPDX-License-Identifier: MIT
"""POP3 over real sockets with Python's own client: downloads, the lock, deletion at QUIT only, clients that behave badly."""

from __future__ import annotations

import contextlib
import os
import poplib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from twisted.internet.defer import fail

from polarismail.net import eviction
from polarismail.net.contracts import Hurry, TransportSettings
from polarismail.net.stress import Stress, StressSettings
from polarismail.policy.limits import RateLimits
from polarismail.serve.pop3 import Pop3SessionSettings
from tests.reactor import reactor, run
from tests.serve.pop3_world import Pop3World

HEADER = b"Subject: hello\nFrom: a@example.com\n\n"


@pytest.fixture
def world(tmp_path) -> Iterator[Pop3World]:
    with Pop3World(tmp_path) as world:
        yield world


def login(world: Pop3World, name: str = "anna") -> poplib.POP3:
    client = poplib.POP3("127.0.0.1", world.port, timeout=20)
    client.user(name)
    client.pass_("secret")
    return client


def sent(stored: bytes) -> list[bytes]:
    return stored.replace(b"\r\n", b"\n").removesuffix(b"\n").split(b"\n")


def when(condition) -> None:
    """Wait until something that the server does by itself has happened."""
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it does not happen")


def test_poplib_reads_and_deletes(world: Pop3World) -> None:
    bodies = [HEADER + b"one\n", HEADER + b".two\n..\n", HEADER + b"three"]
    for at, body in enumerate(bodies):
        world.put(f"{at}00.x.h", body)
    client = login(world)
    assert client.getwelcome() == b"+OK mail.example.org POP3 ready"
    assert "PIPELINING" in client.capa()
    assert client.stat()[0] == 3
    for at, body in enumerate(bodies):
        assert client.retr(at + 1)[1] == sent(body)
        assert client.list(at + 1).split()[2] == str(len(body.replace(b"\n", b"\r\n"))).encode()
    assert client.top(1, 0)[1] == [*sent(HEADER)]
    client.dele(2)
    client.quit()
    assert world.files() == ["000.x.h", "200.x.h"]


def test_over_tls(world: Pop3World) -> None:
    world.put("100.x.h", HEADER)
    client = poplib.POP3("localhost", world.port, timeout=20)
    client.stls(world.client_tls())
    client.user("anna")
    client.pass_("secret")
    assert client.retr(1)[1] == sent(HEADER)
    client.quit()


def test_unique_ids_stay_over_sessions(world: Pop3World) -> None:
    for at in range(20):
        world.put(f"{at + 100}.M{at}P1.h,S=36,W=39", HEADER)
    first = login(world)
    before = first.uidl()[1]
    first.dele(3)
    first.quit()
    for name in list(world.files())[::2]:
        part = world.root / "example.org" / "anna"
        os.rename(part / "new" / name, part / "cur" / f"{name}:2,RS")
    again = login(world)
    after = again.uidl()[1]
    assert [line.split()[1] for line in after] == [line.split()[1] for line in before if line[:2] != b"3 "]
    again.quit()


@pytest.mark.parametrize("tls", ["none", "implicit"])
def test_a_large_message_arrives_whole_at_a_slow_reader(tmp_path, tls: str) -> None:
    lines = b"".join(b".%d line of a large message that is longer than any buffer\n" % at for at in range(120_000))
    with Pop3World(tmp_path, tls=tls) as world:
        world.put("100.x.h", HEADER + lines)
        if tls == "implicit":
            client: poplib.POP3 = poplib.POP3_SSL("localhost", world.port, timeout=20, context=world.client_tls())
        else:
            client = poplib.POP3("127.0.0.1", world.port, timeout=20)
        client.user("anna")
        client.pass_("secret")
        client._putcmd("RETR 1")  # type: ignore[attr-defined]
        time.sleep(0.3)  # nothing is read: the server must wait, and keep little in memory
        assert client._getlongresp()[1] == sent(HEADER + lines)  # type: ignore[attr-defined]
        client.quit()


def test_memory_does_not_follow_the_size_of_a_message(world: Pop3World) -> None:
    with open(world.put("100.x.h,S=60000036,W=60000039", HEADER), "ab") as file:
        for _ in range(60):
            file.write(b"x" * 999_999 + b"\n")
    sockets = []
    before = resident()
    for name in ("anna", "bert"):
        if name == "bert":
            os.link(
                world.root / "example.org/anna/new/100.x.h,S=60000036,W=60000039",
                world.put("100.x.h", b"", "bert").with_name("200.x.h"),
            )
        client = socket.create_connection(("127.0.0.1", world.port), 20)
        client.sendall(b"USER %s\r\nPASS secret\r\n" % name.encode() + b"RETR 1\r\nRETR 2\r\n" * 40)
        sockets.append(client)
    time.sleep(0.5)
    assert resident() - before < 16 * 1024 * 1024
    for client in sockets:
        client.close()
    when(lambda: world.realm.logouts == 2)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_second_session_is_told_in_use(world: Pop3World) -> None:
    first = login(world)
    with pytest.raises(poplib.error_proto, match=r"-ERR \[IN-USE\]"):
        login(world)
    login(world, "bert").quit()
    first.quit()
    login(world).quit()


def test_quit_has_let_go_of_the_lock_when_it_answers(world: Pop3World) -> None:
    world.put("100.x.h", HEADER)
    for _ in range(20):
        client = login(world)
        client.noop()
        client.quit()


def test_a_lost_connection_deletes_nothing_and_lets_go(world: Pop3World) -> None:
    world.put("100.x.h", HEADER)
    client = login(world)
    client.dele(1)
    client.sock.shutdown(socket.SHUT_RDWR)
    client.close()
    when(lambda: world.realm.logouts == 1)
    assert world.files() == ["100.x.h"]
    again = login(world)
    assert again.stat()[0] == 1
    again.quit()


def test_a_client_that_leaves_during_its_login_holds_no_lock(world: Pop3World) -> None:
    for _ in range(20):
        client = socket.create_connection(("127.0.0.1", world.port), 20)
        client.sendall(b"USER anna\r\nPASS secret\r\n")
        client.close()
    when(lambda: not world.factory.connections)
    when(lambda: world.realm.logouts >= 1)

    def free() -> bool:
        try:
            login(world).quit()
        except poplib.error_proto:
            return False
        return True

    when(free)


def test_an_idle_session_ends_without_deleting(tmp_path) -> None:
    quick = Pop3SessionSettings(login_seconds=0.2, idle_seconds=0.3)
    with Pop3World(tmp_path, session=quick) as world:
        world.put("100.x.h", HEADER)
        silent = socket.create_connection(("127.0.0.1", world.port), 20)
        assert silent.makefile("rb").read() == b"+OK mail.example.org POP3 ready\r\n"
        client = login(world)
        client.dele(1)
        assert client.file.read() == b""  # type: ignore[attr-defined]
        assert world.files() == ["100.x.h"]
        client.close()
        silent.close()


def test_octets_that_trickle_in_buy_no_time(tmp_path) -> None:
    with Pop3World(tmp_path, session=Pop3SessionSettings(login_seconds=0.5)) as world:
        client = socket.create_connection(("127.0.0.1", world.port), 20)
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - began < 20:
                client.sendall(b"U")
                time.sleep(0.05)
        client.close()


def test_a_client_that_never_reads_is_cut(tmp_path) -> None:
    with Pop3World(tmp_path, transport=TransportSettings(write_seconds=0.3)) as world:
        with open(world.put("100.x.h", HEADER), "ab") as file:
            file.write(b"x\n" * 8_000_000)
        client = socket.create_connection(("127.0.0.1", world.port), 20)
        client.sendall(b"USER anna\r\nPASS secret\r\nRETR 1\r\n")
        when(lambda: world.realm.logouts == 1)
        client.close()


def test_a_message_that_another_reader_took_is_an_error_and_no_more(world: Pop3World) -> None:
    world.put("100.x.h,W=39", HEADER)
    world.put("200.x.h,W=39", HEADER)
    client = login(world)
    os.unlink(world.root / "example.org/anna/new/100.x.h,W=39")
    with pytest.raises(poplib.error_proto):
        client.retr(1)
    assert client.retr(2)[1] == sent(HEADER)
    client.dele(1)
    client.dele(2)
    assert client.quit().startswith(b"+OK")
    assert world.files() == []


def test_what_cannot_be_deleted_is_said(world: Pop3World) -> None:
    world.put("100.x.h", HEADER)
    world.put("200.x.h", HEADER, part="cur")
    client = login(world)
    client.dele(1)
    client.dele(2)
    maildir = world.root / "example.org/anna"
    (maildir / "new").rename(maildir / "elsewhere")
    (maildir / "new").write_bytes(b"no directory")
    with pytest.raises(poplib.error_proto, match="not removed"):
        client.quit()
    assert os.listdir(maildir / "cur") == []
    assert os.listdir(maildir / "elsewhere") == ["100.x.h"]


def test_a_maildir_of_somebody_else_is_out_of_order(tmp_path) -> None:
    with Pop3World(tmp_path, uid=os.geteuid() + 1) as world, pytest.raises(poplib.error_proto, match=r"\[SYS/PERM\]"):
        login(world)


def test_many_pipelined_commands_are_answered_in_order(world: Pop3World) -> None:
    for at in range(50):
        world.put(f"{at + 100}.x.h", HEADER + b"%d\n" % at)
    client = socket.create_connection(("127.0.0.1", world.port), 20)
    commands = b"".join(b"RETR %d\r\nLIST %d\r\n" % (at + 1, at + 1) for at in range(50)) * 4
    client.sendall(b"USER anna\r\nPASS secret\r\n" + commands + b"QUIT\r\n")
    lines = client.makefile("rb").read().split(b"\r\n")
    client.close()
    numbers = [line for line in lines if line.isdigit()]
    assert numbers == [b"%d" % at for at in range(50)] * 4
    assert sum(line.startswith(b"+OK") for line in lines) == 3 + 400 + 1


def test_plaintext_is_for_the_networks_that_the_listener_names(tmp_path) -> None:
    with Pop3World(tmp_path, plaintext_auth="networks") as world:
        stranger = poplib.POP3("127.0.0.1", world.port, timeout=20)
        with pytest.raises(poplib.error_proto, match="STLS"):
            stranger.user("anna")
        stranger.quit()
        neighbour = socket.create_connection(("127.0.0.1", world.port), 20, ("127.0.0.2", 0))
        neighbour.sendall(b"USER anna\r\nPASS secret\r\nQUIT\r\n")
        assert neighbour.makefile("rb").read().count(b"+OK") == 4
        neighbour.close()


def test_events_name_the_login_and_never_the_password(world: Pop3World) -> None:
    client = login(world)
    client.quit()
    client = poplib.POP3("127.0.0.1", world.port, timeout=20)
    client.user("bert")
    with pytest.raises(poplib.error_proto, match=r"\[AUTH\]"):
        client.pass_("hunter2")
    client.quit()
    assert [name for name, _ in world.events] == ["login", "login-failed"]
    assert "hunter2" not in repr(world.events) and "secret" not in repr(world.events)


def test_going_down_deletes_nothing(world: Pop3World) -> None:
    world.put("100.x.h", HEADER)
    client = login(world)
    client.dele(1)
    run(world.factory.shut_down)
    assert client.file.read().startswith(b"-ERR [SYS/TEMP]")  # type: ignore[attr-defined]
    client.close()
    assert world.files() == ["100.x.h"]


def test_a_disk_that_fails_in_the_middle_ends_the_connection_without_a_final_dot(world: Pop3World) -> None:
    world.put("100.x.h", HEADER + b"x\n" * 100_000)
    client = login(world)
    (connection,) = world.factory.connections
    run(lambda: _break_second_piece(connection))
    client._putcmd("RETR 1")  # type: ignore[attr-defined]
    octets = client.file.read()  # type: ignore[attr-defined]
    assert octets.startswith(b"+OK 300039 octets\r\n")
    assert not octets.endswith(b"\r\n.\r\n") and b"-ERR" not in octets
    client.close()
    when(lambda: world.realm.logouts == 1)


def _break_second_piece(connection) -> None:
    """A third party's maildrop whose messages have one piece and then an error."""
    maildrop = connection._session._maildrop
    read = maildrop.read

    class Broken:
        def __init__(self, reader) -> None:
            self.piece, self.close = reader.piece, reader.close

        def next(self):
            return fail(OSError(5, "Input/output error"))

    maildrop.read = lambda entry: read(entry).addCallback(Broken)


# -- limits ----------------------------------------------------------------------------------------------------------------


def test_wrong_logins_of_a_client_end_before_the_password_is_looked_at(tmp_path: Path) -> None:
    rates = RateLimits(trusted_networks=(), login_failures_per_day=2, slow_login_failures=1)
    with Pop3World(tmp_path, rates=rates) as world:
        for _ in range(2):
            client = poplib.POP3("127.0.0.1", world.port, timeout=20)
            client.user("anna")
            with pytest.raises(poplib.error_proto, match="AUTH"):
                client.pass_("wrong")
            client.close()
        with pytest.raises(poplib.error_proto, match=r"SYS/TEMP\] Too many wrong logins"):
            login(world)


def test_under_stress_strangers_have_less_time_and_who_has_logged_in_has_not(tmp_path: Path) -> None:
    with Pop3World(tmp_path, places=2) as world:
        settings = StressSettings(hurry=Hurry(command_seconds=0.3))
        stress = Stress(reactor, world.counter, settings, lambda name, fields: None, "pop3")
        client, stranger = login(world), socket.create_connection(("127.0.0.1", world.port), 10)
        lines = stranger.makefile("rb")
        assert lines.readline().startswith(b"+OK")
        run(stress.look)
        assert stress.is_stressed() and lines.read() == b""
        client.noop()
        client.quit()
        stranger.close()


def test_a_newcomer_has_the_place_of_a_stranger_who_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "LEAST_SECONDS", 0.05)
    with Pop3World(tmp_path, places=2) as world:
        Stress(reactor, world.counter, StressSettings(), lambda name, fields: None, "pop3")
        client, stranger = login(world), socket.create_connection(("127.0.0.1", world.port), 10)
        lines = stranger.makefile("rb")
        assert lines.readline().startswith(b"+OK")
        time.sleep(0.1)
        newcomer = login(world, "bert")
        with contextlib.suppress(ConnectionResetError):
            assert lines.readline().startswith(b"-ERR [SYS/TEMP] Too busy") and lines.read() == b""
        client.noop()
        newcomer.quit()
        stranger.close()


def test_who_reads_a_message_slowly_keeps_place_and_time(world: Pop3World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a newcomer nor stress takes a maildrop from somebody whose line is slow."""
    monkeypatch.setattr(eviction, "LEAST_SECONDS", 0.0)
    world.put("100.x.h", HEADER + (b"x" * 70 + b"\n") * 150_000)
    client = login(world)
    client._putcmd("RETR 1")  # type: ignore[attr-defined]
    (connection,) = world.factory.connections
    when(lambda: connection._writable is not None)
    assert not run(lambda: eviction.Eviction(world.counter).make_room())
    run(lambda: (world.factory.hurry(Hurry(command_seconds=0.0)), world.factory.apply_settings(connection)))
    time.sleep(0.2)
    assert client._getlongresp()[2] > 10_000_000  # type: ignore[attr-defined]
    client.quit()
