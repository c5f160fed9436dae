# SPDX-License-Identifier: MIT
"""A connection that is gone is gone from memory at once, without the garbage collector: an attack that ends gives it back."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reactor import run
from tests.serve.pop3_world import Pop3World
from tests.serve.smtp_world import Client, SmtpWorld, eventually


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def watch(world: Any) -> list[Callable[[], Any]]:
    """Asks whether connection, session and engine are still there."""

    def look() -> list[Callable[[], Any]]:
        (connection,) = world.factory.connections
        return [weakref.ref(each) for each in (connection, connection._session, connection.engine)]

    return run(look)


def all_gone(watched: list[Callable[[], Any]]) -> None:
    eventually(lambda: not any(run(each) for each in watched), "what is gone to leave the memory")


def quits(client: Client, world: SmtpWorld) -> None:
    client.begin()
    client.send(b"text\r\n.\r\n")
    assert client.reply() == 250
    assert client.say("QUIT") == 221


def vanishes_in_content(client: Client, world: SmtpWorld) -> None:
    client.begin()
    client.send(b"text\r\n")


def makes_errors(client: Client, world: SmtpWorld) -> None:
    while client.say("RCPT TO:<nobody@here.test>") is not None:
        pass


def logs_in(client: Client, world: SmtpWorld) -> None:
    assert client.say("AUTH PLAIN AGFubgBzZWNyZXQ=") == 235


def vanishes_in_half_a_command(client: Client, world: SmtpWorld) -> None:
    client.send(b"MAIL FR")


@pytest.mark.parametrize("does", [quits, vanishes_in_content, makes_errors, logs_in, vanishes_in_half_a_command])
def test_whatever_an_smtp_client_did(does: Callable[[Client, SmtpWorld], None]) -> None:
    with SmtpWorld() as world:
        with world.client() as client:
            watched = watch(world)
            does(client, world)
        world.wait_until_empty()
        all_gone(watched)


def test_a_client_that_leaves_while_its_command_is_performed() -> None:
    with SmtpWorld() as world:
        world.hold.add("rcpt")
        with world.client() as client:
            watched = watch(world)
            client.send(b"MAIL FROM:<a@b.test>\r\nRCPT TO:<bob@here.test>\r\n")
            world.wait_for("rcpt")
        world.wait_until_empty()
        assert run(watched[1]) is not None  # somebody still has an answer for it
        world.release("rcpt")
        all_gone(watched)


def test_a_pop3_client(tmp_path: Path) -> None:
    import socket

    with Pop3World(tmp_path, tls="none") as world:
        with socket.create_connection(("127.0.0.1", world.port), 10) as client:
            assert client.recv(100).startswith(b"+OK")
            watched = watch(world)
            client.sendall(b"USER anna\r\nPASS secret\r\nSTAT\r\n")
            client.recv(1000)
        eventually(lambda: not run(lambda: len(world.factory.connections)), "the connection to go")
        all_gone(watched)
