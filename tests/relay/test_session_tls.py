# SPDX-License-Identifier: MIT
"""TLS and AUTH of sessions, over real sockets against Python's own ssl."""

from __future__ import annotations

import base64
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from OpenSSL import SSL

from polarismail.net.tls import make_self_signed
from polarismail.relay.resumption import Resumption
from polarismail.relay.session import ClientSettings, ConnectFailed, RemoteHost, Session, connect
from tests.reactor import reactor, run
from tests.relay.scripted import Peer, Server
from tests.relay.test_session import QUICK, message, no_read, recipients


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("tls")
    make_self_signed("mx.example.org", str(where / "cert"), str(where / "key"), ca_path=str(where / "ca"))
    return where


@pytest.fixture
def context(certificate: Path) -> Iterator[ssl.SSLContext]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert", certificate / "key")
    names: list[str | None] = []
    context.sni_callback = lambda connection, name, context: names.append(name)
    context.names = names  # type: ignore[attr-defined]
    yield context


async def say_one(
    server: Server, tls: str, name: str = "mx.example.org", settings: ClientSettings = QUICK, **options: object
) -> tuple[Session, int]:
    host = RemoteHost(name, "127.0.0.1", server.port)
    session = await connect(reactor, host, settings, tls=tls, **options)  # type: ignore[arg-type]
    code = (await session.send(message(), recipients(message()), no_read))[0].code
    await session.quit()
    return session, code


def refused(server: Server, tls: str, **options: object) -> ConnectFailed:
    with pytest.raises(ConnectFailed) as caught:
        run(say_one, server, tls, **options)
    assert caught.value.reply.is_transient or caught.value.reply.code == 535
    assert not caught.value.permanent
    return caught.value


def starts(*after: bytes, then: Callable[[Peer], object] = Peer.take) -> Callable[[Peer], None]:
    def script(peer: Peer) -> None:
        peer.greet(b"STARTTLS", b"AUTH PLAIN")
        assert peer.line() == b"STARTTLS"
        peer.say(b"220 go\r\n")
        peer.start_tls()
        peer.introduce(*(after or (b"8BITMIME",)))
        then(peer)

    return script


def implicit(peer: Peer) -> None:
    peer.start_tls()
    peer.greet(b"8BITMIME")
    peer.take()


@pytest.mark.parametrize("tls", ["opportunistic", "required"])
def test_starttls_where_offered(context: ssl.SSLContext, tls: str) -> None:
    with Server(starts(), context=context) as server:
        session, code = run(say_one, server, tls)
    assert code == 250
    assert session.tls.startswith("TLSv1.3 TLS_")
    assert session.extensions == {"8BITMIME": ""}, "what was offered in plain text is forgotten"
    assert context.names == ["mx.example.org"]  # type: ignore[attr-defined]


def test_no_starttls_unless_asked(context: ssl.SSLContext) -> None:
    def script(peer: Peer) -> None:
        peer.greet(b"STARTTLS")
        peer.take()

    with Server(script, context=context) as server:
        assert run(say_one, server, "none")[1] == 250


def test_plain_text_where_nothing_is_offered() -> None:
    said = []

    def script(peer: Peer) -> None:
        peer.greet(b"8BITMIME")
        said.append(peer.take_or_leave())

    with Server(script) as server:
        session, code = run(say_one, server, "opportunistic")
        assert code == 250 and session.tls == ""
        assert refused(server, "required").reply.status == (4, 7, 0)
    assert said[1] == b"QUIT", "there is nothing more to say, but goodbye (RFC 5321 §4.1.1.10)"


def test_starttls_answered_with_no() -> None:
    said = []

    def script(peer: Peer) -> None:
        peer.greet(b"STARTTLS")
        assert peer.line() == b"STARTTLS"
        peer.say(b"454 not now\r\n")
        said.append(peer.take_or_leave())

    with Server(script) as server:
        assert run(say_one, server, "opportunistic")[1] == 250
        assert refused(server, "required").tls_broken
    assert said[1] == b"QUIT"


@pytest.mark.parametrize("tls", ["opportunistic", "required"])
@pytest.mark.parametrize("extra", [b"2", b"250-mx\r\n250 AUTH PLAIN\r\n", b"\x16\x03\x01"])
def test_text_behind_the_220_is_not_believed(context: ssl.SSLContext, tls: str, extra: bytes) -> None:
    heard = []

    def script(peer: Peer) -> None:
        peer.greet(b"STARTTLS")
        assert peer.line() == b"STARTTLS"
        peer.say(b"220 go\r\n" + extra)
        heard.append(peer.everything())

    with Server(script, context=context) as server:
        failed = refused(server, tls)
    assert failed.tls_broken and "plain text behind" in failed.reply.text
    assert heard == [b""], "not even a handshake was begun"


@pytest.mark.parametrize("junk", [b"not tls at all\r\n", b"", b"\x15\x03\x01\x00\x02\x02\x28"])
def test_broken_tls_is_named(junk: bytes) -> None:
    def script(peer: Peer) -> None:
        peer.greet(b"STARTTLS")
        assert peer.line() == b"STARTTLS"
        peer.say(b"220 go\r\n")
        peer.some()  # the ClientHello
        peer.say(junk)

    with Server(script) as server:
        failed = refused(server, "opportunistic")
    assert failed.tls_broken and failed.reply.status == (4, 7, 5)


def test_a_handshake_has_a_deadline() -> None:
    def script(peer: Peer) -> None:
        peer.greet(b"STARTTLS")
        assert peer.line() == b"STARTTLS"
        peer.say(b"220 go\r\n")
        peer.everything()

    with Server(script) as server:
        failed = refused(server, "opportunistic", settings=attrs.evolve(QUICK, handshake_seconds=0.2))
    assert failed.tls_broken and failed.reply.text == "TLS handshake timed out"


def test_certificates_are_verified_where_asked(context: ssl.SSLContext, certificate: Path) -> None:
    trusting = attrs.evolve(QUICK, ca_path=str(certificate / "ca"))
    with Server(starts(), context=context) as server:
        assert run(say_one, server, "required", settings=trusting, verify=True)[1] == 250
        assert run(say_one, server, "required", name="127.0.0.1", settings=trusting, verify=True)[1] == 250
        for host, settings in (("other.example.org", trusting), ("mx.example.org", QUICK)):
            failed = refused(server, "required", name=host, settings=settings, verify=True)
            assert failed.tls_broken and failed.reply.status == (4, 7, 5)


def test_implicit_tls(context: ssl.SSLContext, certificate: Path) -> None:
    trusting = attrs.evolve(QUICK, ca_path=str(certificate / "ca"))
    with Server(implicit, context=context) as server:
        session, code = run(say_one, server, "implicit", settings=trusting, verify=True)
    assert code == 250 and session.tls


def test_a_large_message_through_tls(context: ssl.SSLContext) -> None:
    content = b"".join(b".%d\r\n" % number for number in range(300_000))
    got = []

    async def check() -> int:
        session = await connect(reactor, RemoteHost("mx", "127.0.0.1", server.port), QUICK, tls="required")
        whole = message(None, len(content))
        from twisted.internet.defer import succeed

        return (await session.send(whole, recipients(whole), lambda at, n: succeed(content[at : at + n])))[0].code

    with Server(starts(then=lambda peer: got.append(peer.take())), context=context) as server:
        assert run(check) == 250
    assert got == [content.replace(b"\r\n.", b"\r\n..").replace(b".0\r\n", b"..0\r\n", 1)]


# -- AUTH ------------------------------------------------------------------------------------------------------------------


def authenticates(*dialogue: bytes, offer: bytes, then: Callable[[Peer], object] = Peer.take) -> Callable[[Peer], None]:
    def login(peer: Peer) -> None:
        for expected, answer in zip(dialogue[::2], dialogue[1::2], strict=True):
            assert peer.line() == expected
            peer.say(answer + b"\r\n")
        then(peer)

    return starts(offer, then=login)


SECRET = ("joe", "p\u00e4ss word")
PLAIN = base64.b64encode(b"\0joe\0" + SECRET[1].encode())


def test_auth_plain_inside_tls(context: ssl.SSLContext) -> None:
    script = authenticates(b"AUTH PLAIN " + PLAIN, b"235 2.7.0 ok", offer=b"AUTH LOGIN PLAIN")
    with Server(script, context=context) as server:
        assert run(say_one, server, "required", credentials=SECRET)[1] == 250


def test_auth_login_where_plain_is_not_offered(context: ssl.SSLContext) -> None:
    script = authenticates(
        b"AUTH LOGIN",
        b"334 VXNlcm5hbWU6",
        base64.b64encode(b"joe"),
        b"334 UGFzc3dvcmQ6",
        base64.b64encode(SECRET[1].encode()),
        b"235 ok",
        offer=b"AUTH LOGIN",
    )
    with Server(script, context=context) as server:
        assert run(say_one, server, "required", credentials=SECRET)[1] == 250


def test_wrong_credentials_and_odd_answers(context: ssl.SSLContext) -> None:
    for answer, code in ((b"535 5.7.8 no", 535), (b"334 more", 451), (b"250 hm", 451)):
        script = authenticates(b"AUTH PLAIN " + PLAIN, answer, offer=b"AUTH PLAIN", then=Peer.everything)
        with Server(script, context=context) as server:
            assert refused(server, "required", credentials=SECRET).reply.code == code
    with Server(starts(b"AUTH CRAM-MD5", then=Peer.everything), context=context) as server:
        assert refused(server, "required", credentials=SECRET).reply.status == (4, 7, 0)


def test_a_password_is_not_said_in_plain_text() -> None:
    heard = []

    def script(peer: Peer) -> None:
        peer.greet(b"AUTH PLAIN")
        heard.append(peer.everything())

    with Server(script) as server:
        refused(server, "opportunistic", credentials=SECRET)
    assert heard == [b"QUIT\r\n"]


def resumed(reused: bool) -> Callable[[Peer], None]:
    """A server whose connection must (or must not) go on with an earlier TLS session."""

    def script(peer: Peer) -> None:
        peer.greet(b"STARTTLS")
        assert peer.line() == b"STARTTLS"
        peer.say(b"220 go\r\n")
        peer.start_tls()
        assert peer._socket.session_reused is reused
        peer.introduce(b"8BITMIME")
        peer.take()
        assert peer.line() == b"QUIT"
        peer.say(b"221 bye\r\n")

    return script


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_goes_on_where_it_ended(context: ssl.SSLContext, version: ssl.TLSVersion) -> None:
    context.maximum_version = version
    resumption = Resumption()

    with Server(resumed(False), resumed(True), resumed(True), context=context) as server:
        for _ in range(3):
            session, code = run(say_one, server, "opportunistic", resumption=resumption)
            assert code == 250 and session.tls.startswith("TLSv1.")
            assert len(resumption) == 1


def test_a_verified_certificate_is_verified_each_time(context: ssl.SSLContext, certificate: Path) -> None:
    resumption = Resumption()
    settings = attrs.evolve(QUICK, ca_path=str(certificate / "ca"))
    with Server(resumed(False), resumed(False), context=context) as server:
        for _ in range(2):
            assert run(say_one, server, "required", settings=settings, verify=True, resumption=resumption)[1] == 250
    assert len(resumption) == 0


def test_a_session_that_is_not_taken_is_no_reason_for_plain_text(context: ssl.SSLContext) -> None:
    """The handshake fails once, with the session that was offered; the next one offers none."""

    def fails(peer: Peer) -> None:
        peer.greet(b"STARTTLS")
        assert peer.line() == b"STARTTLS"
        peer.say(b"220 go\r\n")
        peer.some()
        peer.drop()

    resumption = Resumption()
    with Server(resumed(False), fails, fails, resumed(False), context=context) as server:
        assert run(say_one, server, "opportunistic", resumption=resumption)[1] == 250
        problem = refused(server, "opportunistic", resumption=resumption)
        assert problem.resumed and not problem.tls_broken
        assert len(resumption) == 0
        problem = refused(server, "opportunistic", resumption=resumption)
        assert problem.tls_broken and not problem.resumed
        assert run(say_one, server, "opportunistic", resumption=resumption)[1] == 250


def test_kept_sessions_are_bounded() -> None:
    class Handle(SSL.Connection):
        def __init__(self) -> None:
            pass

        def get_session(self) -> Any:
            return object()

    resumption = Resumption(2)
    hosts = [RemoteHost(f"mx{n}.example.org", "192.0.2.1") for n in range(3)]
    for host in hosts:
        resumption.keep(host, Handle())
    assert [host in resumption for host in hosts] == [False, True, True]
