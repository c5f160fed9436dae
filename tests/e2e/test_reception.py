# SPDX-License-Identifier: MIT
"""A person submits with a login and reads over POP3; a stranger reaches our people, and nobody else, on every port."""

from __future__ import annotations

import poplib
import smtplib
import socket
import ssl
from collections.abc import Callable

import pytest

from tests.e2e.server import PASSWORD, Server

MESSAGE = "From: ann@here.test\r\nTo: bob@here.test\r\nSubject: {subject}\r\n\r\nHello Bob\r\n.\r\n..two\r\n"
SMTP_PORTS = ("mx", "mx-alt", "submission", "submissions")


@pytest.mark.parametrize("port", SMTP_PORTS)
def test_submitted_with_login_is_read_over_pop3(shared_server: Server, port: str) -> None:
    subject = f"by {port}"
    with shared_server.smtp(port, "ann@here.test") as client:
        client.sendmail("ann@here.test", ["bob@here.test"], MESSAGE.format(subject=subject))
    found = shared_server.wait_for_messages("bob@here.test", 1)
    (mine,) = [message for message in found if f"Subject: {subject}\r\n".encode() in message]
    assert mine.startswith(
        b"Return-Path: <ann@here.test>\r\nDelivered-To: bob@here.test\r\nReceived: from client.test "
    )
    assert b"ESMTPSA" in mine
    assert mine.endswith(b"\r\n\r\nHello Bob\r\n.\r\n..two\r\n")


def test_stranger_reaches_a_mailbox_on_25_and_26(shared_server: Server) -> None:
    for port in ("mx", "mx-alt"):
        with shared_server.smtp(port) as client:
            client.sendmail("who@else.test", ["Ann+tag@HERE.test"], f"Subject: stranger {port}\r\n\r\nHi\r\n")
    found = shared_server.wait_for_messages("ann@here.test", 2)
    assert sum(b"Subject: stranger" in message for message in found) == 2


def test_extensions_are_those_of_the_port(shared_server: Server) -> None:
    for port in SMTP_PORTS:
        with shared_server.smtp(port) as client:
            for name in ("pipelining", "8bitmime", "enhancedstatuscodes"):
                assert client.has_extn(name), (port, name)
            assert client.esmtp_features["size"] == "52428800"
            assert client.has_extn("starttls") == (port != "submissions")
            assert client.has_extn("auth") == (port == "submissions")
            if port != "submissions":
                client.starttls(context=shared_server.tls)
                client.ehlo("client.test")
                assert client.esmtp_features["auth"].split() == ["PLAIN", "LOGIN"]
                assert not client.has_extn("starttls")


RELAY_MATRIX = {
    "<user@remote.test>": "550 5.7.1",
    "<user%remote.test@here.test>": "550 5.1.1",
    '<"user@remote.test"@here.test>': "550 5.1.1",
    '<"user%remote.test"@here.test>': "550 5.1.1",
    "<remote.test!user@here.test>": "550 5.1.1",
    "<@here.test:user@remote.test>": "550 5.7.1",
    "<@a.test,@b.test:user@remote.test>": "550 5.7.1",
    "<user@remote.test@here.test>": "501 5.1.3",
    "<user@[127.0.0.1]>": "550 5.7.1",
    "<user@[IPv6:::1]>": "550 5.7.1",
    "<user@here.test.>": "501 5.1.3",
    "<user@remote.test>;": "501 5.1.3",
    "user@remote.test@here.test": "501 5.1.3",
}


@pytest.mark.parametrize("port", SMTP_PORTS)
@pytest.mark.parametrize("reverse_path", ["<>", "<ann@here.test>", "<x@else.test>", "<root@localhost>"])
def test_relay_matrix_is_refused(shared_server: Server, port: str, reverse_path: str) -> None:
    """HOSTILE A1: without a login none of these leaves, whatever the client calls itself."""
    with shared_server.smtp(port) as client:
        client.ehlo("localhost")
        code, _ = client.docmd(f"MAIL FROM:{reverse_path}")
        if port.startswith("submission"):
            assert code == 530
            return
        assert code == 250
        for path, expected in RELAY_MATRIX.items():
            code, text = client.docmd(f"RCPT TO:{path}")
            assert f"{code} {text[:5].decode()}" == expected, path
        assert client.docmd("DATA")[0] in (503, 554)


def test_unknown_local_recipient_is_refused_at_rcpt(shared_server: Server) -> None:
    with shared_server.smtp("mx") as client:
        client.mail("who@else.test")
        assert client.rcpt("nobody@here.test")[0] == 550
        assert client.rcpt("postmaster")[0] in (250, 550)
    with shared_server.smtp("submission", "ann@here.test") as client:
        client.mail("ann@here.test")
        code, text = client.rcpt("nobody@here.test")
        assert (code, text[:5]) == (550, b"5.1.1")


def test_wrong_password_and_no_plaintext_login(shared_server: Server) -> None:
    with shared_server.smtp("submission") as client:
        assert client.docmd("AUTH PLAIN AGEAYg==")[0] in (503, 504, 530, 538)
    for name in ("ann@here.test", "nobody@here.test"):
        with (
            pytest.raises(smtplib.SMTPAuthenticationError) as refused,
            shared_server.smtp("submission", name, "wrong"),
        ):
            raise AssertionError("a wrong password was taken")
        assert refused.value.smtp_code == 535
    pop = poplib.POP3("localhost", shared_server.ports["pop3"])
    with pytest.raises(poplib.error_proto):
        pop.user("ann@here.test")
        pop.pass_(PASSWORD)
    pop = poplib.POP3("localhost", shared_server.ports["pop3"])
    pop.stls(context=shared_server.tls)
    pop.user("ann@here.test")
    assert pop.pass_(PASSWORD).startswith(b"+OK")
    pop.quit()


def test_plain_text_behind_starttls_is_dropped_with_the_connection(shared_server: Server) -> None:
    with socket.create_connection(("127.0.0.1", shared_server.ports["mx"]), 10) as client:
        client.recv(1000)
        client.sendall(b"EHLO a.test\r\n")
        client.recv(4000)
        client.sendall(b"STARTTLS\r\nMAIL FROM:<injected@evil.test>\r\n")
        said = b""
        while chunk := client.recv(4000):
            said += chunk
        assert b"250" not in said
        assert said.count(b"\r\n") <= 1


def test_size_is_refused_when_announced(shared_server: Server) -> None:
    with shared_server.smtp("mx") as client:
        assert client.docmd("MAIL FROM:<a@else.test> SIZE=99999999999")[0] == 552
        assert client.docmd("MAIL FROM:<a@else.test> BOGUS=1")[0] == 555


def test_every_header_line_survives_and_bare_line_ends_are_mended(shared_server: Server) -> None:
    with shared_server.smtp("mx") as client:
        client.mail("a@else.test")
        client.rcpt("bob@here.test")
        assert client.docmd("DATA")[0] == 354
        client.send(b"Subject: bare\r\n\r\none\ntwo\rthree\r\n.\nfour\n.\r\nfive\r\n.\r\n")
        code, text = client.getreply()
        assert code == 250, text
    with shared_server.smtp("submission", "ann@here.test") as client:
        client.mail("ann@here.test")
        client.rcpt("bob@here.test")
        client.docmd("DATA")
        client.send(b"Subject: bare\r\n\r\none\ntwo\r\n.\r\n")
        assert client.getreply()[0] == 550
    found = shared_server.wait_for_messages("bob@here.test", 1)
    (mine,) = [message for message in found if b"Subject: bare" in message]
    assert mine.endswith(b"\r\n\r\none\r\ntwo\r\nthree\r\n\r\nfour\r\n.\r\nfive\r\n")


def test_tls_versions_below_1_2_are_refused(shared_server: Server) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with pytest.warns(DeprecationWarning):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    raw = socket.create_connection(("127.0.0.1", shared_server.ports["submissions"]), 10)
    with raw, pytest.raises((ssl.SSLError, ConnectionError)):
        context.wrap_socket(raw, server_hostname="localhost")


def test_a_message_that_has_travelled_too_far_is_refused(shared_server: Server) -> None:
    hop = "Received: from a.test by b.test; Sun, 22 Nov 2026 00:00:00 +0000\r\n"
    with shared_server.smtp("mx") as client:
        for hops, expected in ((50, 250), (51, 554)):
            client.mail("who@else.test")
            client.rcpt("ann@here.test")
            code, text = client.data(hop * hops + "Subject: hops\r\n\r\nHi\r\n")
            assert code == expected, text
        assert text.startswith(b"5.4.6")


def test_aliases_do_not_multiply_recipients_without_bound(make_server: Callable[..., Server]) -> None:
    server = make_server(extra="[reception]\nmax_expanded_recipients = 3\n").start()
    for name in ("one", "two"):
        server.command("alias", "add", f"{name}@here.test", "ann@here.test", "bob@here.test")
    with server.smtp("mx") as client:
        client.mail("who@else.test")
        assert client.rcpt("one@here.test")[0] == 250
        assert client.rcpt("two@here.test")[0] == 452
        assert client.rcpt("ann@here.test")[0] == 250
        assert client.data("Subject: few\r\n\r\nHi\r\n")[0] == 250
    assert len(server.wait_for_messages("ann@here.test", 1)) == 1
