# SPDX-License-Identifier: MIT
"""The certificate store over a real loopback, reloads that fail, and the demo's own authority."""

from __future__ import annotations

import os
import socket
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from OpenSSL import SSL
from twisted.internet.protocol import Factory, Protocol

from polarismail.net.tls import CertificateStore, client_options, describe, make_self_signed
from polarismail.values.errors import ConfigError
from tests.reactor import reactor, run


class Echo(Protocol):
    def connectionMade(self) -> None:
        self.transport.startTLS(self.factory.options)  # type: ignore[union-attr]

    def dataReceived(self, data: bytes) -> None:
        self.transport.write(describe(self.transport).encode() + b" " + data)  # type: ignore[union-attr]


def make(where: Path, hostname: str = "mail.example.test") -> tuple[str, str, str]:
    paths = str(where / "cert.pem"), str(where / "key.pem"), str(where / "ca.pem")
    make_self_signed(hostname, paths[0], paths[1], ca_path=paths[2])
    return paths


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str, str]:
    return make(tmp_path)


@pytest.fixture
def served(files: tuple[str, str, str]) -> Iterator[tuple[CertificateStore, int, str]]:
    store = CertificateStore(files[0], files[1])
    factory = Factory.forProtocol(Echo)
    factory.options = store
    port: Any = run(lambda: reactor.listenTCP(0, factory, interface="127.0.0.1"))
    yield store, port.getHost().port, files[2]
    run(port.stopListening)


def talk(port: int, context: ssl.SSLContext, name: str = "mail.example.test", session: Any = None) -> tuple[Any, Any]:
    with socket.create_connection(("127.0.0.1", port), 10) as plain:
        wrapped = context.wrap_socket(plain, server_hostname=name, session=session)
        wrapped.sendall(b"hello")
        said = wrapped.recv(1000)
        assert said.endswith(b" hello")
        return wrapped, said


def trusting(ca: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context


@pytest.mark.parametrize("name", ["mail.example.test", "localhost", "127.0.0.1", "::1"])
def test_the_demo_certificate_is_good_for_a_strict_client(served: tuple[Any, int, str], name: str) -> None:
    _, port, ca = served
    assert talk(port, trusting(ca), name)[1].startswith(b"TLSv1.3 TLS_")


def test_other_names_are_not_vouched_for(served: tuple[Any, int, str]) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        talk(served[1], trusting(served[2]), "other.example.test")


def test_tls_1_2_with_modern_ciphers_only_and_nothing_older(served: tuple[Any, int, str]) -> None:
    _, port, ca = served
    context = trusting(ca)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert b"ECDHE" in talk(port, context)[1]
    context.set_ciphers("AES128-SHA")
    with pytest.raises(ssl.SSLError):
        talk(port, context)
    old = trusting(ca)
    old.set_ciphers("DEFAULT:@SECLEVEL=0")
    old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, OSError)):
        talk(port, old)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_is_resumed(served: tuple[Any, int, str], version: ssl.TLSVersion) -> None:
    _, port, ca = served
    context = trusting(ca)
    context.maximum_version = version
    first, _ = talk(port, context)
    assert not first.session_reused and first.session.has_ticket
    assert talk(port, context, session=first.session)[0].session_reused


def test_renegotiation_is_refused(served: tuple[Any, int, str]) -> None:
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    with socket.create_connection(("127.0.0.1", served[1]), 10) as plain:
        plain.settimeout(None)
        connection = SSL.Connection(context, plain)
        connection.set_connect_state()
        connection.do_handshake()
        connection.renegotiate()
        with pytest.raises(SSL.Error):
            connection.do_handshake()


def test_a_reload_is_seen_by_the_next_handshake(served: tuple[CertificateStore, int, str], tmp_path: Path) -> None:
    store, port, old_ca = served
    first = store.expires
    make(tmp_path, "new.example.test")
    store.reload()
    assert store.expires >= first
    talk(port, trusting(old_ca), "new.example.test")


def other_key() -> bytes:
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def locked_key() -> bytes:
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )


@pytest.mark.parametrize(
    ("which", "octets", "says"),
    [
        (1, other_key, "does not belong to the first certificate"),
        (1, locked_key, "is encrypted"),
        (1, lambda: b"junk", "expected a private key"),
        (1, None, "cannot be read: No such file"),
        (0, lambda: b"junk", "expected one or more certificates"),
        (0, lambda: b"", "expected one or more certificates"),
        (0, None, "cannot be read: No such file"),
    ],
)
def test_a_bad_file_keeps_the_old_one_and_is_named(
    served: tuple[CertificateStore, int, str], tmp_path: Path, which: int, octets: Any, says: str
) -> None:
    store, port, ca = served
    path = tmp_path / ("cert.pem", "key.pem")[which]
    path.unlink()
    if octets is not None:
        path.write_bytes(octets())
    with pytest.raises(ConfigError) as caught:
        store.reload()
    assert str(path) in str(caught.value) and says in str(caught.value)
    talk(port, trusting(ca))
    with pytest.raises(ConfigError):
        CertificateStore(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))


def test_the_chain_is_sent(files: tuple[str, str, str]) -> None:
    with open(files[0], "ab") as certificate, open(files[2], "rb") as ca:
        certificate.write(ca.read())
    store = CertificateStore(files[0], files[1])
    ours, theirs = socket.socketpair()
    server = store.serverConnectionForTLS(None)
    thread = threading.Thread(target=_handshake, args=(server, theirs), daemon=True)
    thread.start()
    client = SSL.Connection(SSL.Context(SSL.TLS_METHOD), ours)
    client.set_connect_state()
    client.do_handshake()
    assert len(client.get_peer_cert_chain() or []) == 2
    ours.close()
    thread.join(10)
    theirs.close()


def _handshake(connection: SSL.Connection, peer: socket.socket) -> None:
    connection.set_accept_state()
    while True:
        try:
            connection.do_handshake()
            done = True
        except SSL.WantReadError:
            done = False
        try:
            peer.sendall(connection.bio_read(100_000))
        except (SSL.WantReadError, BrokenPipeError):
            pass  # nothing to say, or the client has seen enough
        if done:
            return
        connection.bio_write(peer.recv(100_000))


def test_the_key_is_secret_and_files_are_replaced(tmp_path: Path) -> None:
    certificate, key, ca = make(tmp_path)
    assert stat.S_IMODE(os.stat(key).st_mode) == 0o600
    before = Path(ca).read_bytes()
    os.chmod(key, 0o644)
    make(tmp_path)
    assert stat.S_IMODE(os.stat(key).st_mode) == 0o600
    assert Path(ca).read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ca.pem", "cert.pem", "key.pem"]
    CertificateStore(certificate, key)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mx.example.org", b"mx.example.org"),
        ("mx.example.org.", b"mx.example.org"),
        ("192.0.2.1", None),
        ("[IPv6:::1]", None),
    ],
)
def test_sni_is_a_name_or_nothing(name: str, expected: bytes | None) -> None:
    connection = client_options(name, verify=False).clientConnectionForTLS(None)
    assert connection.get_servername() == expected


def test_an_unreadable_authority_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent"):
        client_options("mx.example.org", verify=True, ca_path=str(tmp_path / "absent"))


def test_importing_installs_no_reactor() -> None:
    program = (
        "import sys, polarismail.net.tls, polarismail.relay.session; print('twisted.internet.reactor' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
