# SPDX-License-Identifier: MIT
"""HOSTILE.md against a real server: who says that they are somebody else, headers that lie or are broken, and the logs."""

from __future__ import annotations

import base64
import json
import re
import smtplib
import socket
from collections.abc import Callable
from typing import Any

import pytest

from tests.dialogues.runner import LivePeer
from tests.e2e.server import PASSWORD, Server, wait_until

SMTP_PORTS = ("mx", "mx-alt", "submission", "submissions")
GOOD = "From: ann@here.test\r\nTo: bob@here.test\r\nSubject: {}\r\n\r\nHi\r\n"


@pytest.fixture(scope="module", autouse=True)
def aliases(shared_server: Server) -> None:
    shared_server.command("alias", "add", "sales@here.test", "ann@here.test", "bob@here.test")
    shared_server.command("alias", "add", "bobs@here.test", "bob@here.test")


def hand_over(client: smtplib.SMTP, reverse_path: str, recipient: str, text: str) -> tuple[int, bytes]:
    """A whole transaction; the reply to the end of data, or the first refusal."""
    client.rset()
    for code, said in (client.mail(reverse_path), client.rcpt(recipient)):
        if code != 250:
            return code, said
    return client.data(text)


def events_of(server: Server, name: str, queue_id: str) -> list[dict[str, Any]]:
    """The events of one message, once there are any."""
    found: list[dict[str, Any]] = wait_until(
        lambda: [event for event in server.events(name) if event["queue_id"] == queue_id], f"{name} of {queue_id}"
    )
    return found


# -- A3: who may say that they are whom --------------------------------------------------------------------------------


@pytest.mark.parametrize("port", SMTP_PORTS)
def test_an_account_sends_as_itself_and_nobody_else(shared_server: Server, port: str) -> None:
    with shared_server.smtp(port, "ann@here.test") as client:
        for own in ("ann@here.test", "Ann@HERE.test", "ann+tag@here.test", "sales@here.test", ""):
            assert client.mail(own)[0] == 250, own
            client.rset()
        for other in (
            "bob@here.test", "bobs@here.test", "bob+ann@here.test", "nobody@here.test", "ann@else.test", "ann@[127.0.0.1]",
            '"ann@here.test"@here.test', "ann%here.test@here.test",
        ):  # fmt: skip
            code, text = client.docmd(f"MAIL FROM:<{other}>")
            assert (code, text[:5]) == (553, b"5.7.1"), other

    def refused() -> set[str]:
        return {event["reverse_path"] for event in shared_server.events("rejected") if event["stage"] == "mail"}

    wait_until(lambda: refused() >= {"bob@here.test", "ann@else.test"}, "the events of the refusals")


def test_a_catch_all_leads_to_its_account(make_server: Callable[..., Server]) -> None:
    extra = "[reception]\ncheck_from = true\n"
    server = make_server(domains=("here.test", "mine.test"), extra=extra).start()
    server.command("alias", "add", "@mine.test", "ann@here.test")
    with server.smtp("submission", "ann@here.test") as client:
        assert hand_over(client, "any.name@mine.test", "bob@here.test", GOOD.format("own"))[0] == 250
        # The address in From, where the setting asks for it.
        for written_by, code in (
            ("any@mine.test", 250),
            ('"bob@here.test" <ann@here.test>', 250),
            ("bob@here.test", 550),
            ("Ann <ann@here.test> (bob@here.test)", 250),
            ("ann@else.test", 550),
            ("ann@here.test@else.test", 550),
        ):
            text = GOOD.format("from").replace("ann@here.test", written_by)
            got, said = hand_over(client, "ann@here.test", "bob@here.test", text)
            assert got == code, (written_by, said)
            assert code == 250 or said.startswith(b"5.7.1")
    with server.smtp("submission", "bob@here.test") as client:
        assert client.mail("any.name@mine.test")[0] == 553


def test_both_checks_can_be_switched_off(make_server: Callable[..., Server]) -> None:
    server = make_server(extra="[reception]\ncheck_reverse_path = false\ncheck_headers = false\n").start()
    with server.smtp("submission", "ann@here.test") as client:
        assert hand_over(client, "who@else.test", "bob@here.test", "Subject: no From\r\n\r\nHi\r\n")[0] == 250


# -- section 4: headers ------------------------------------------------------------------------------------------------

BROKEN = {
    "more than one From field": b"From: a@here.test\r\nFrom: b@here.test\r\n",
    "more than one Subject field": b"From: a@here.test\r\nSubject: a\r\nsubject: b\r\n",
    "more than one Date field": b"From: a@here.test\r\nDate: a\r\nDate: b\r\n",
    "From has several addresses": b"From: a@here.test, b@here.test\r\n",
    "no From field": b"Subject: x\r\n",
    "a header line without a colon": b"From: a@here.test\r\nno colon\r\n",
    "the header section begins with white space": b" X: y\r\nFrom: a@here.test\r\n",
    "a field name with characters that no name may have": b"From: a@here.test\r\nX\xff: y\r\n",
    "a field of more than 65536 octets": b"From: a@here.test\r\nX: y\r\n"
    + b" z{78}\r\n".replace(b"{78}", b"z" * 78) * 850,
}


@pytest.mark.parametrize("defect", BROKEN)
def test_a_broken_header_section_is_refused_on_submission_and_marked_on_mx(shared_server: Server, defect: str) -> None:
    content = BROKEN[defect] + b"\r\nbroken: " + defect.encode() + b"\r\n"
    with shared_server.smtp("submission", "ann@here.test") as client:
        client.mail("ann@here.test")
        client.rcpt("bob@here.test")
        code, text = client.data(content)
        assert (code, text) == (550, f"5.6.0 Malformed header section: {defect}".encode())
    with shared_server.smtp("mx") as client:
        client.mail("who@else.test")
        client.rcpt("bob@here.test")
        code, text = client.data(content)
        assert code == 250, text
    queue_id = text.split()[-1].decode()
    (event,) = events_of(shared_server, "received", queue_id)
    assert event["header_defects"] == defect
    delivered = shared_server.wait_for_messages("bob@here.test", 1)
    assert any(message.endswith(content) for message in delivered), "nothing is altered"


@pytest.mark.parametrize("size", [100, 200_000], ids=["small", "in Maildir's form"])
@pytest.mark.parametrize("slice_octets", [7, 100_000])
def test_what_only_we_may_say_is_taken_out(shared_server: Server, size: int, slice_octets: int) -> None:
    subject = f"forged {size} {slice_octets}".encode()
    kept = b"From: a@else.test\r\nAuthentication-Results: mx.else.test; spf=pass\r\nSubject: " + subject + b"\r\n"
    forged = (
        b"Return-Path: <ceo@here.test>\r\nAuthentication-Results: mail.here.test;\r\n\tdkim=pass header.d=bank.test\r\n"
    )
    body = b"\r\n" + (b"y" * 76 + b"\r\n") * (size // 78)
    with shared_server.smtp("mx") as client:
        client.mail("who@else.test")
        client.rcpt("bob@here.test")
        assert client.docmd("DATA")[0] == 354
        assert client.sock is not None
        client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = forged + kept
        for at in range(0, len(head), slice_octets):
            client.sock.sendall(head[at : at + slice_octets])
        client.sock.sendall(body + b".\r\n")
        code, text = client.getreply()
        assert code == 250, text
    found = shared_server.wait_for_messages("bob@here.test", 1)
    (mine,) = [message for message in found if subject + b"\r\n" in message]
    assert mine.startswith(
        b"Return-Path: <who@else.test>\r\nDelivered-To: bob@here.test\r\nReceived: from client.test "
    )
    assert mine.endswith(b"\r\n" + kept + body) and mine.count(b"Return-Path") == 1
    queue_id = text.split()[-1].decode()
    (event,) = events_of(shared_server, "received", queue_id)
    assert event["removed_fields"] == 2


# -- section 5: loops ----------------------------------------------------------------------------------------------------


def test_a_message_that_was_here_before_is_refused_at_the_end_of_data(shared_server: Server) -> None:
    content = "Delivered-To: Bob@here.test\r\nFrom: a@else.test\r\nSubject: again\r\n\r\nHi\r\n"
    with shared_server.smtp("mx") as client:
        code, text = hand_over(client, "who@else.test", "bob@here.test", content)
        assert (code, text[:5]) == (554, b"5.4.6")
        assert hand_over(client, "who@else.test", "ann@here.test", content)[0] == 250
        # Of two, the one that it has reached fails alone.
        client.mail("")
        client.rcpt("bob@here.test")
        client.rcpt("ann@here.test")
        code, text = client.data(content)
        assert code == 250
    queue_id = text.split()[-1].decode()
    shared_server.wait_for_messages("ann@here.test", 2)
    failed = events_of(shared_server, "failed", queue_id)
    assert [event["recipient"] for event in failed] == ["bob@here.test"]


# -- A7: one exchange that hangs keeps nobody else waiting ----------------------------------------------------------------


def test_exchanges_that_are_left_in_the_middle_keep_nobody_waiting(shared_server: Server) -> None:
    """Each broken end of an exchange, twenty at once, while others log in."""
    steps = (b"", b"AUTH LOGIN\r\n", b"AUTH LOGIN\r\n****\r\n", b"AUTH PLAIN " + b"A" * 11_000, b"AUTH PLAIN\r\n*\r\n")
    hanging = []
    for number in range(20):
        peer = LivePeer("127.0.0.1", shared_server.ports["submissions"], tls=shared_server.tls, implicit=True)
        peer.read_line()
        peer.send(b"EHLO hanging.test\r\n")
        while (line := peer.read_line()) and line[3:4] == b"-":
            pass
        peer.send(steps[number % len(steps)])
        hanging.append(peer)
    with shared_server.smtp("submissions", "ann@here.test") as client:
        assert client.noop()[0] == 250
    for peer in hanging[::2]:
        peer.close()
    with shared_server.smtp("submissions", "bob@here.test") as client:
        assert client.noop()[0] == 250
    for peer in hanging[1::2]:
        peer.close()


# -- E7: the logs ----------------------------------------------------------------------------------------------------------

LONG = b".".join([b"x" * 60] * 4)
EVIL = "evil\x1b[31m\x07\x9b2J\u202egpj.exe\u2028%n%s{format}{0}"
SECRETS = ("pa55-in-clear-1", "pa55-in-clear-2", "pa55-in-clear-3")


def plain(name: str, password: str) -> bytes:
    return base64.b64encode(f"\0{name}\0{password}".encode())


@pytest.mark.parametrize("style", ["json", "text"])
def test_nothing_that_a_client_says_breaks_a_log(make_server: Callable[..., Server], style: str) -> None:
    server = make_server(
        extra="[session]\nsoft_error_delay_seconds = 0.0\nhard_errors = 1000\nmax_auth_failures = 100\n"
    )
    server.config.write_text(server.config.read_text().replace("[log]\n", f'[log]\nformat = "{style}"\n'))
    server.start()
    evil = EVIL.encode()
    lines = [
        b"EHLO " + evil, b"EHLO [" + evil + b"]", b"HELO " + LONG,
        b"HELO " + b"x" * 1500, b"EHLO " + b"y" * 1_000_000, b"EHLO fine.test",
        b"VRFY " + evil, b"HELP " + evil, b"NOOP " + evil, evil, b"MAIL FROM:<" + evil + b"@else.test>",
        b'MAIL FROM:<"' + evil + b'"@else.test>', b"MAIL FROM:<a@else.test> ENVID=" + evil, b"MAIL FROM:<%n{x}@else.test>",
        b"RCPT TO:<" + evil + b"@here.test>", b'RCPT TO:<"' + evil + b'"@here.test>', b"RCPT TO:<%n%s{0}@here.test>",
        b'RCPT TO:<"a\\\x7fb"@here.test>', b"RCPT TO:<" + b"z" * 1000 + b"@here.test>", b"RCPT TO:<bob@here.test>",
    ]  # fmt: skip
    for line in lines:
        with LivePeer("127.0.0.1", server.ports["mx"], tls=server.tls) as peer:
            peer.read_line()
            for each in (b"EHLO fine.test", line, b"MAIL FROM:<%n@else.test>", b"RCPT TO:<x@else.test>", line, b"QUIT"):
                peer.send(each + b"\r\n")
                while (said := peer.read_line()) is not None and said[3:4] == b"-":
                    pass
    with server.smtp("mx") as client:
        client.mail("who@else.test")
        client.rcpt("bob@here.test")
        assert (
            client.data(b"From: " + evil + b"\r\n" + evil + b"\r\nX" + evil + b": y\r\n\r\n" + evil + b"\r\n")[0] == 250
        )
    with server.smtp("submissions") as client:
        for name, password in ((EVIL, SECRETS[0]), ("ann@here.test", SECRETS[1]), ("%n\n{x}", SECRETS[0])):
            code, _ = client.docmd("AUTH", "PLAIN " + plain(name, password).decode())
            assert code in (501, 535)
        client.docmd("AUTH", "LOGIN")
        client.docmd(base64.b64encode(evil).decode())
        client.docmd(base64.b64encode(SECRETS[2].encode()).decode())
        # And where a password has no business.
        client.docmd("AUTH", "PLAIN " + SECRETS[0])
    with server.smtp("submissions", "ann@here.test") as client:
        client.mail("ann@here.test")
        assert client.rcpt("nobody@here.test")[0] == 550
    server.stop()
    files = [path for path in server.directory.rglob("*.log*") if path.is_file()]
    assert any(path.name == "events.log" for path in files)
    for path in files:
        octets = path.read_bytes()
        assert not re.search(rb"[\x00-\x08\x0b-\x1f\x7f-\xff]", octets), f"{path.name} holds raw octets"
        for secret in (*SECRETS, PASSWORD):
            for form in (
                secret.encode(),
                base64.b64encode(secret.encode()).rstrip(b"="),
                plain("ann@here.test", secret),
            ):
                assert form not in octets, f"{path.name} holds a password"
        assert max(map(len, octets.splitlines()), default=0) < 12_000
    text = (server.directory / "log" / "events.log").read_text()
    assert "%n" in text and LONG.decode() in text, "the client's words are there, as they were said"
    assert "y" * 600 not in text and "z" * 600 not in text
    if style == "json":
        rows = [json.loads(line) for line in text.splitlines()]
        assert any(row.get("login") == EVIL for row in rows), "and can be read back"
        assert all(
            len(value) <= 512
            for row in rows
            for key, value in row.items()
            if isinstance(value, str) and key != "traceback"
        )
    assert "Traceback" not in text
