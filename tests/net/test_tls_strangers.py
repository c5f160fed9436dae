# SPDX-License-Identifier: MIT
"""HOSTILE section 2: clients that were led to the wrong protocol, that ask for any name, or that begin TLS over and over."""

from __future__ import annotations

import resource
import ssl

import pytest
from OpenSSL import SSL

from polarismail.net.handshakes import HandshakeCounter
from polarismail.net.tls import CertificateStore, make_self_signed


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CertificateStore:
    where = tmp_path_factory.mktemp("tls")
    paths = [str(where / name) for name in ("cert.pem", "key.pem", "ca.pem")]
    make_self_signed("mail.example.test", paths[0], paths[1], ca_path=paths[2])
    return CertificateStore(paths[0], paths[1])


def shake_hands(server: SSL.Connection, alpn: list[str], name: str = "mail.example.test") -> ssl.SSLObject:
    """A whole handshake in memory. Raises ssl.SSLError and SSL.Error, each side its own."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if alpn:
        context.set_alpn_protocols(alpn)
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(to_client, to_server, server_hostname=name)
    server.set_accept_state()
    for _ in range(4):
        for side in (client, server):
            try:
                side.do_handshake()
            except (ssl.SSLWantReadError, SSL.WantReadError):
                pass
            finally:
                if to_server.pending:
                    server.bio_write(to_server.read())
                try:
                    to_client.write(server.bio_read(65536))
                except SSL.WantReadError:
                    pass
    assert client.cipher() is not None
    return client


@pytest.mark.parametrize(
    ("protocol", "alpn", "agreed"),
    [
        ("smtp", [], None),
        ("smtp", ["smtp"], "smtp"),
        ("smtp", ["imap", "smtp"], "smtp"),
        ("pop3", ["pop3"], "pop3"),
        ("pop3", [], None),
    ],
)
def test_our_own_protocol_or_none(store: CertificateStore, protocol: str, alpn: list[str], agreed: str | None) -> None:
    connection = store.speaking(protocol).serverConnectionForTLS(None)
    assert shake_hands(connection, alpn).selected_alpn_protocol() == agreed


@pytest.mark.parametrize(
    ("protocol", "alpn"),
    [
        ("smtp", ["pop3"]),
        ("smtp", ["imap"]),
        ("smtp", ["http/1.1", "h2"]),
        ("smtp", ["SMTP"]),
        ("pop3", ["smtp"]),
        ("", ["smtp"]),
    ],
)
def test_who_wants_another_protocol_has_no_handshake(store: CertificateStore, protocol: str, alpn: list[str]) -> None:
    connection = (store.speaking(protocol) if protocol else store).serverConnectionForTLS(None)
    with pytest.raises((SSL.Error, ssl.SSLError)):
        shake_hands(connection, alpn)
    # And the next client is served.
    shake_hands(store.speaking("smtp").serverConnectionForTLS(None), ["smtp"])


def test_names_that_nobody_has_cost_no_memory(store: CertificateStore) -> None:
    speaking = store.speaking("smtp")

    def shake(first: int, count: int) -> None:
        for number in range(first, first + count):
            shake_hands(speaking.serverConnectionForTLS(None), [], f"{'x' * 50}.{number}.example.test")

    shake(0, 100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shake(100, 300)
    # 300 names with anything at all kept for each, be it a context of 30 KB, would be 9 MB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096


def test_handshakes_are_counted_for_a_minute() -> None:
    counter = HandshakeCounter()
    assert [counter.admit("192.0.2.1", 2, now) for now in (0.0, 1.0, 2.0)] == [True, True, False]
    assert counter.admit("192.0.2.2", 2, 3.0)
    assert counter.admit("192.0.2.1", 2, 61.0)
    assert all(counter.admit("192.0.2.1", 0, 62.0) for _ in range(10))


def test_the_neighbours_of_an_ipv6_network_count_together() -> None:
    counter = HandshakeCounter()
    assert counter.admit("2001:db8::1", 1, 0.0)
    assert not counter.admit("2001:db8::2", 1, 0.0)
    assert counter.admit("2001:db8:0:1::1", 1, 0.0)


def test_clients_from_everywhere_do_not_fill_the_memory() -> None:
    counter = HandshakeCounter()
    for number in range(50_000):
        counter.admit(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 5, 0.0)
    assert len(counter._by_network) <= 20_000


def test_a_store_without_a_certificate(store: CertificateStore) -> None:
    """Handshakes fail, until a certificate is there (HOSTILE E11)."""
    empty = CertificateStore.without("cert.pem", "key.pem", "cert.pem: cannot be read")
    speaking = empty.speaking("smtp")
    with pytest.raises((SSL.Error, ssl.SSLError)):
        shake_hands(speaking.serverConnectionForTLS(None), [])
    assert not speaking.ready and empty.problem
    assert store.pem is not None
    empty.replace("cert.pem", "key.pem", store.pem)
    shake_hands(speaking.serverConnectionForTLS(None), ["smtp"])
    assert speaking.ready and not empty.problem
