# SPDX-License-Identifier: MIT
"""Sessions with next hops over real sockets: verdicts, reuse, content that arrives as it is stored."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import deferLater

from polarismail.relay.session import ClientSettings, ConnectFailed, RemoteHost, Session, connect
from polarismail.store.interfaces import QueuedMessage, QueuedRecipient
from polarismail.values.address import Mailbox
from polarismail.values.reply import Reply
from tests.reactor import reactor, run
from tests.relay.scripted import Peer, Server

QUICK = ClientSettings(
    hostname="client.example",
    connect_seconds=5,
    greeting_seconds=5,
    ehlo_seconds=5,
    handshake_seconds=5,
    mail_seconds=5,
    rcpt_seconds=5,
    data_seconds=5,
    block_seconds=5,
    final_seconds=5,
    quit_seconds=0.3,
    piece_octets=65536,
)
INLINE = b"Subject: x\r\n\r\n.dot\r\n..two\r\n.\r\nend\r\n"


def message(content: bytes | None = INLINE, size: int | None = None, **fields: Any) -> QueuedMessage:
    return QueuedMessage(
        "q1", Mailbox("a", "example.org"), 0.0, len(content or b"") if size is None else size, inline=content, **fields
    )


def recipients(whole: QueuedMessage, *names: str) -> list[QueuedRecipient]:
    return [
        QueuedRecipient(
            whole, at, Mailbox(name, "example.net"), Mailbox(name, "example.net"), "example.net", None, 0, 0, 0, 1
        )
        for at, name in enumerate(names or ("b",))
    ]


def no_read(offset: int, octets: int) -> Deferred[bytes]:
    raise AssertionError("inline content is not read")


def reader(content: bytes, piece: int | None = None) -> Callable[[int, int], Deferred[bytes]]:
    return lambda offset, octets: succeed(content[offset : offset + min(octets, piece or octets)])


async def open_to(server: Server, settings: ClientSettings = QUICK, **options: Any) -> Session:
    options.setdefault("tls", "none")
    return await connect(reactor, RemoteHost("mx.example.org", "127.0.0.1", server.port), settings, **options)


async def send_once(
    server: Server, whole: QueuedMessage, read: Any = no_read, *names: str, **options: Any
) -> list[Reply]:
    session = await open_to(server, **options)
    replies = await session.send(whole, recipients(whole, *names), read)
    await session.quit()
    return replies


def as_sent(content: bytes) -> bytes:
    return content.replace(b"\r\n.", b"\r\n..")


@pytest.mark.parametrize("extensions", [(), (b"PIPELINING", b"8BITMIME", b"SIZE")])
def test_a_message_arrives_as_it_is(extensions: tuple[bytes, ...]) -> None:
    got, said = [], []

    def script(peer: Peer) -> None:
        peer.greet(*extensions)
        got.append(peer.take())
        said.append(peer.line())
        peer.say(b"221 bye\r\n")

    with Server(script) as server:
        assert run(send_once, server, message()) == [Reply(250, (2, 0, 0), "queued")]
    assert got == [as_sent(INLINE)] and said == [b"QUIT"]


@pytest.mark.parametrize("piece", [None, 1, 7, 4093])
def test_stored_content_arrives_as_it_is(piece: int | None) -> None:
    content = b"".join(b"%s%d\r\n" % (b"." * (number % 4), number) for number in range(1500 if piece == 1 else 90000))
    got = []

    def script(peer: Peer) -> None:
        peer.greet(b"PIPELINING", b"8BITMIME")
        got.append(peer.take())

    with Server(script) as server:
        whole = message(None, len(content))
        assert run(send_once, server, whole, reader(content, piece))[0].code == 250
    assert got == [as_sent(content)]


def test_content_waits_for_a_next_hop_that_does_not_read() -> None:
    size, release, asked = 64 * 1024 * 1024, threading.Event(), [0]

    def read(offset: int, octets: int) -> Deferred[bytes]:
        asked[0] = offset + octets
        return succeed(b"x" * (octets - 2) + b"\r\n")

    def script(peer: Peer) -> None:
        peer.greet(b"8BITMIME")
        assert peer.line() and peer.say(b"250 ok\r\n") is None
        assert peer.line() and peer.say(b"250 ok\r\n") is None
        assert peer.line() and peer.say(b"354 ok\r\n") is None
        release.wait(20)
        last, total = b"", 0
        while not last.endswith(b"\r\n.\r\n"):
            octets = peer.some()
            total += len(octets)
            last = last[-5:] + octets
        peer.say(b"250 %d\r\n" % total)

    async def check() -> list[Reply]:
        session = await open_to(server)
        whole = message(None, size)
        sending = Deferred.fromCoroutine(session.send(whole, recipients(whole), read))
        before = -1
        while before != asked[0] or not asked[0]:
            before = asked[0]
            await deferLater(reactor, 0.2)
        assert asked[0] < size / 4, "the rest stays in the spool until there is room"
        release.set()
        return await sending

    with Server(script) as server:
        assert run(check) == [Reply(250, None, str(size + 3))]


def test_verdicts_are_in_the_order_of_the_recipients() -> None:
    def script(peer: Peer) -> None:
        peer.greet(b"PIPELINING", b"8BITMIME")
        for answer in (b"250 ok", b"250 ok", b"550 5.1.1 who", b"450 4.2.1 busy", b"250 ok", b"354 go"):
            peer.line()
            peer.say(answer + b"\r\n")
        peer.until(b"\r\n.\r\n")
        peer.say(b"250 2.0.0 yes\r\n")

    with Server(script) as server:
        replies = run(send_once, server, message(), no_read, "a", "b", "c", "d")
    assert [str(reply) for reply in replies] == ["250 2.0.0 yes", "550 5.1.1 who", "450 4.2.1 busy", "250 2.0.0 yes"]


def test_a_connection_is_used_again_and_reset_only_where_needed() -> None:
    said = []

    def script(peer: Peer) -> None:
        peer.greet(b"8BITMIME")
        peer.take()
        peer.take()
        said.append(peer.line()), peer.say(b"250 ok\r\n")
        said.append(peer.line()), peer.say(b"550 no\r\n")
        said.append(peer.line()), peer.say(b"250 ok\r\n")
        peer.take()

    async def check() -> list[int]:
        session = await open_to(server)
        codes = []
        for _ in range(4):
            assert session.usable
            codes.append((await session.send(message(), recipients(message()), no_read))[0].code)
        assert session.transactions == 4 and not session.stale
        return codes

    with Server(script) as server:
        assert run(check) == [250, 250, 550, 250]
    assert [word[:4] for word in said] == [b"MAIL", b"RCPT", b"RSET"]


def test_many_recipients_go_in_several_transactions() -> None:
    counts = []

    def script(peer: Peer) -> None:
        peer.greet(b"PIPELINING", b"8BITMIME")
        for _ in range(4):
            peer.line(), peer.say(b"250 ok\r\n")
            count = 0
            while peer.line() != b"DATA":
                count += 1
                peer.say(b"250 ok\r\n" if count <= 2 else b"452 4.5.3 too many\r\n")
            peer.say(b"354 go\r\n")
            peer.until(b"\r\n.\r\n")
            peer.say(b"250 ok\r\n")
            counts.append(count)

    settings = ClientSettings(hostname="client.example", max_recipients=3)
    with Server(script) as server:
        replies = run(send_once, server, message(), no_read, *"abcdefg", settings=settings)
    assert [reply.code for reply in replies] == [250] * 7
    assert counts == [3, 3, 3, 1]


def test_452_for_the_whole_message_is_a_verdict() -> None:
    def script(peer: Peer) -> None:
        peer.greet(b"8BITMIME")
        peer.take(verdict=b"452 4.5.3 no\r\n")
        assert peer.line() == b"QUIT"

    with Server(script) as server:
        assert run(send_once, server, message(), no_read, "a", "b")[1].code == 452


@pytest.mark.parametrize("stored", [False, True])
def test_8bit_content_is_never_converted(stored: bool) -> None:
    content = b"Subject: x\r\n\r\n" + b"a\r\n" * 60000 * stored + "grüße\r\n".encode()
    whole = message(None if stored else content, len(content))
    got, mails = [], []

    def takes(peer: Peer) -> None:
        peer.greet(b"8BITMIME")
        mails.append(peer.line())
        peer._buffer = b"MAIL FROM:\r\n" + peer._buffer
        got.append(peer.take())

    def refuses(peer: Peer) -> None:
        peer.greet(b"PIPELINING")
        assert peer.line() == b"QUIT"

    with Server(refuses, takes) as server:
        reply = run(send_once, server, whole, reader(content))[0]
        assert (reply.code, reply.status) == (554, (5, 6, 3))
        assert run(send_once, server, whole, reader(content))[0].code == 250
    assert got == [content] and mails == [b"MAIL FROM:<a@example.org> BODY=8BITMIME"]


def test_size_is_declared_and_obeyed() -> None:
    mails = []

    def script(peer: Peer) -> None:
        peer.greet(b"SIZE 1000", b"8BITMIME")
        mails.append(peer.line())
        peer._buffer = b"MAIL FROM:\r\n" + peer._buffer
        peer.take()
        assert peer.line() == b"QUIT"

    async def check() -> list[Reply]:
        session = await open_to(server)
        small, large = message(), message(b"x" * 1001 + b"\r\n")
        replies = await session.send(large, recipients(large, "a", "b"), no_read)
        assert session.usable
        replies += await session.send(small, recipients(small), no_read)
        await session.quit()
        return replies

    with Server(script) as server:
        assert [str(reply)[:9] for reply in run(check)] == ["552 5.3.4", "552 5.3.4", "250 2.0.0"]
    assert mails == [b"MAIL FROM:<a@example.org> SIZE=%d" % len(INLINE)]


def test_an_address_beyond_ascii_gets_its_own_verdict() -> None:
    def script(peer: Peer) -> None:
        peer.greet(b"8BITMIME")
        peer.line(), peer.say(b"250 ok\r\n")
        assert peer.line() == b"RCPT TO:<b@xn--exmple-cua.net>"
        peer.say(b"250 ok\r\n")
        peer.line(), peer.say(b"354 ok\r\n")
        peer.until(b"\r\n.\r\n"), peer.say(b"250 ok\r\n")

    whole = message()
    people = recipients(whole, "ü", "b")
    import attrs

    people[1] = attrs.evolve(people[1], forward_path=Mailbox("b", "exämple.net"))

    async def check() -> list[Reply]:
        return await (await open_to(server)).send(whole, people, no_read)

    with Server(script) as server:
        assert [str(reply)[:9].strip() for reply in run(check)] == ["553 5.6.7", "250 ok"]


def test_content_that_ends_too_early_is_never_finished() -> None:
    got = []

    def script(peer: Peer) -> None:
        peer.greet(b"8BITMIME")
        peer.line(), peer.say(b"250 ok\r\n")
        peer.line(), peer.say(b"250 ok\r\n")
        peer.line(), peer.say(b"354 ok\r\n")
        got.append(peer.everything())

    def broken_read(offset: int, octets: int) -> Deferred[bytes]:
        return succeed(b"line\r\n" * 100) if not offset else fail(OSError("disk"))

    for read in (reader(b"line\r\n" * 100), broken_read):
        with Server(script) as server:
            reply = run(send_once, server, message(None, 100_000), read)[0]
        assert (reply.code, reply.status) == (451, (4, 3, 0))
    assert len(got) == 2 and not any(b"\r\n.\r\n" in octets for octets in got)


def test_helo_where_ehlo_is_not_known() -> None:
    def script(peer: Peer) -> None:
        peer.say(b"220 old\r\n")
        assert peer.line() == b"EHLO client.example"
        peer.say(b"502 what\r\n")
        assert peer.line() == b"HELO client.example"
        peer.say(b"250 old\r\n")
        peer.take()

    with Server(script) as server:
        assert run(send_once, server, message())[0].code == 250


def test_the_egress_source_is_the_bind_address() -> None:
    with Server(lambda peer: peer.greet(b"8BITMIME") or (peer.everything() and None)) as server:
        session = run(open_to, server, bind_address="127.0.0.2")
        assert session.describe() == f"mx.example.org[127.0.0.1]:{server.port}"
        assert session.remote_name == "mx.example.org"
        run(session.abort)
        assert server.peers[0].client_address == "127.0.0.2"
    with pytest.raises(ConnectFailed) as caught:
        run(open_to, server, bind_address="192.0.2.77")
    assert caught.value.reply.status == (4, 3, 5)


def test_a_refused_connection_is_temporary() -> None:
    with Server(lambda peer: None) as server:
        pass
    with pytest.raises(ConnectFailed) as caught:
        run(open_to, server)
    assert caught.value.reply.status == (4, 4, 1) and not caught.value.permanent


@pytest.mark.parametrize("greeting", [b"554 5.7.1 go away\r\n", b"421 busy\r\n", b"hello\r\n", b"250 odd"])
def test_a_bad_greeting(greeting: bytes) -> None:
    with (
        Server(lambda peer: peer.say(greeting)) as server,
        pytest.raises(ConnectFailed) as caught,
    ):
        run(open_to, server)
    assert caught.value.reply.code >= 400 and not caught.value.permanent


def test_ipv6() -> None:
    def script(peer: Peer) -> None:
        peer.greet(b"8BITMIME")
        peer.take()

    async def check(port: int) -> int:
        session = await connect(reactor, RemoteHost("mx", "::1", port), QUICK, tls="none")
        return (await session.send(message(), recipients(message()), no_read))[0].code

    with Server(script, address="::1") as server:
        assert run(check, server.port) == 250
