# SPDX-License-Identifier: MIT
"""The parameters of MAIL and RCPT with programs that people run: swaks, smtplib, msmtp, curl, and Postfix on either side."""

from __future__ import annotations

import base64
import contextlib
import email
import os
import shutil
import smtplib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import DOMAIN, Postfix
from polarismail.wire.smtp_parameters import render_moment
from tests.e2e.server import PASSWORD, Helper, Server, free_port, wait_until
from tests.interop.test_peers import needs, run_program, swaks

JOERG = "jörg@bücher.test"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with ann, bob and jörg, that relays what is foreign to a sink which offers neither DSN nor SMTPUTF8."""
    directory = tmp_path_factory.mktemp("parameters")
    sink = Helper(directory, "sink")
    dns = Helper(
        directory, "dns", {"there.test": {"MX": [[10, "mx.there.test"]]}, "mx.there.test": {"A": ["127.0.0.1"]}}
    )
    server = Server(
        directory / "server",
        domains=("here.test", "bücher.test"),
        accounts=("ann@here.test", "bob@here.test", "eve@here.test", JOERG),
        dns_port=dns.port,
        remote_port=sink.port,
    )
    server.sink = sink  # type: ignore[attr-defined]
    try:
        server.start()
        server.command("alias", "add", "team@here.test", "bob@here.test", "zoe@there.test")
        yield server
    finally:
        server.kill()
        dns.stop()
        sink.stop()
        print(server.twistd_log()[-3000:])


def report_to(server: Server, account: str, words: str) -> Any:
    """The newest report in this account whose status part holds the words."""

    def find() -> Any:
        for octets in server.messages(account):
            message = email.message_from_bytes(octets)
            if message.get_content_type() == "multipart/report" and words.encode() in octets:
                return message
        return None

    return wait_until(find, f"a report with {words}")


def blocks(report: Any) -> list[Any]:
    """The field blocks of its status part."""
    return list(report.get_payload(1).get_payload())


@contextlib.contextmanager
def as_joerg(server: Server) -> Iterator[smtplib.SMTP]:
    """A session of jörg's, whose name smtplib's own login cannot say."""
    with server.smtp("submission") as client:
        client.starttls(context=server.tls)
        client.ehlo()
        response = base64.b64encode(f"\0{JOERG}\0{PASSWORD}".encode()).decode()
        assert client.docmd("AUTH", f"PLAIN {response}")[0] == 235
        yield client


# -- DSN --------------------------------------------------------------------------------------------------------------------


def test_success_and_failure_are_reported_as_asked(server: Server) -> None:
    with server.smtp("submission", "ann@here.test") as client:
        assert client.has_extn("dsn")
        client.mail("ann@here.test", ["RET=HDRS", "ENVID=QQ+2B1"])
        for address, options in (
            ("bob@here.test", ["NOTIFY=SUCCESS", "ORCPT=rfc822;Old+2Bbob@here.test"]),
            ("zoe@there.test", ["NOTIFY=SUCCESS,FAILURE"]),
            ("eve@here.test", ["NOTIFY=NEVER"]),
        ):
            assert client.rcpt(address, options)[0] == 250
        assert client.data("From: ann@here.test\r\nSubject: dsn\r\n\r\nbody of it\r\n")[0] == 250
    report = report_to(server, "ann@here.test", "Action: delivered")
    whole, recipient = blocks(report)[:2]
    assert whole["Original-Envelope-Id"] == "QQ+1" and recipient["Original-Recipient"] == "rfc822; Old+bob@here.test"
    relayed = report_to(server, "ann@here.test", "Action: relayed")
    assert any(block["Final-Recipient"] == "rfc822; zoe@there.test" for block in blocks(relayed))
    assert "eve@here.test" not in report.as_string() + relayed.as_string()
    assert "body of it" not in report.as_string()


def test_an_alias_is_reported_as_expanded(server: Server) -> None:
    with server.smtp("submission", "ann@here.test") as client:
        client.mail("ann@here.test", ["ENVID=team1"])
        assert client.rcpt("team@here.test", ["NOTIFY=SUCCESS"])[0] == 250
        assert client.data("From: ann@here.test\r\nSubject: to the team\r\n\r\nx\r\n")[0] == 250
    report = report_to(server, "ann@here.test", "Action: expanded")
    assert [block["Final-Recipient"] for block in blocks(report)[1:]] == ["rfc822; team@here.test"]
    wait_until(lambda: [m for m in server.messages("bob@here.test") if b"to the team" in m], "bob's copy")
    assert "expanded" in {event["event"] for event in server.events()}


@needs("msmtp")
def test_msmtp_asks_for_reports(server: Server, tmp_path: Path) -> None:
    config = tmp_path / "msmtprc"
    config.write_text(
        f"account default\nhost localhost\nport {server.ports['submission']}\ntls on\ntls_starttls on\n"
        f"tls_trust_file {server.ca}\nauth on\nuser eve@here.test\npassword {PASSWORD}\nfrom eve@here.test\n"
        "dsn_notify success,failure\ndsn_return headers\n"
    )
    config.chmod(0o600)
    run_program(
        "msmtp", "-C", config, "bob@here.test", input="From: ann@here.test\nSubject: by msmtp with dsn\n\nHello\n"
    )
    report = report_to(server, "eve@here.test", "Action: delivered")
    assert "by msmtp with dsn" in report.as_string() and "Hello" not in report.as_string()


# -- SMTPUTF8 -----------------------------------------------------------------------------------------------------------------


def test_eai_from_end_to_end(server: Server) -> None:
    for port, session in (("submission", as_joerg(server)), ("mx", server.smtp("mx"))):
        with session as client:
            assert client.has_extn("smtputf8")
            text = f"From: <{JOERG}>\r\nSubject: grüße über {port}\r\n\r\nüber\r\n".encode()
            client.sendmail(JOERG, [JOERG], text, ["SMTPUTF8", "BODY=8BITMIME"])

    def find() -> list[bytes]:
        return [m for m in server.messages(JOERG) if "grüße über".encode() in m]

    found = wait_until(lambda: messages if len(messages := find()) == 2 else None, "two messages for jörg")
    for message in found:
        assert f"Return-Path: <{JOERG}>\r\nDelivered-To: jörg@".encode() in message
        assert f"for <{JOERG}>".encode() in message
    received = sorted(line.strip() for m in found for line in m.split(b"\r\n") if b" with UTF8" in line)
    assert [line.split(b" with ")[1].split()[0] for line in received] == [b"UTF8SMTP", b"UTF8SMTPSA"]


def test_nothing_is_downgraded_for_a_next_hop_without_it(server: Server) -> None:
    utf8 = ["SMTPUTF8", "BODY=8BITMIME"]
    head = "From: ann@here.test\r\nSubject: "
    with as_joerg(server) as client:
        client.sendmail(JOERG, ["zoe@there.test"], f"{head}never\r\n\r\nx\r\n".encode(), utf8)
    with server.smtp("submission", "ann@here.test") as client:
        for rest in ("nie grün\r\n\r\nx\r\n", "goes\r\n\r\ngrün\r\n"):
            client.sendmail("ann@here.test", ["zoe@there.test"], (head + rest).encode(), utf8)
    report = report_to(server, JOERG, "5.6.7")
    assert report.get_payload(1).get_content_type() == "message/global-delivery-status"
    assert report["To"] is not None and "jörg@bücher.test".encode() in report.as_bytes()
    report = report_to(server, "ann@here.test", "5.6.9")
    assert report.get_payload(2).get_content_type() == "message/global"
    sink: Helper = server.sink  # type: ignore[attr-defined]
    wait_until(lambda: [m for m in sink.received() if "Subject: goes" in m["content"]], "the message without SMTPUTF8")
    assert not [m for m in sink.received() if "never" in m["content"] or "nie gr" in m["content"]]


@needs("curl")
def test_curl_speaks_smtputf8(server: Server, tmp_path: Path) -> None:
    letter = tmp_path / "letter"
    letter.write_text(f"From: <ann@here.test>\r\nTo: <{JOERG}>\r\nSubject: by curl, größer\r\n\r\nx\r\n")
    run_program(
        *(
            "curl",
            "-sS",
            f"smtp://localhost:{server.ports['submission']}/client.test",
            "--ssl-reqd",
            "--cacert",
            server.ca,
        ),
        *("--user", f"ann@here.test:{PASSWORD}", "--mail-from", "ann@here.test", "--mail-rcpt", JOERG, "-T", letter),
    )
    wait_until(lambda: [m for m in server.messages(JOERG) if b"by curl" in m], "curl's message")


@needs("swaks")
def test_swaks_is_told_that_an_address_needs_it(server: Server) -> None:
    assert "553 5.6.7" in swaks(server, "mx", JOERG, ok=(24,))


# -- FUTURERELEASE, MT-PRIORITY, LIMITS -------------------------------------------------------------------------------------


def test_a_message_waits_for_its_time(server: Server) -> None:
    until = time.time() + 86_400
    with server.smtp("submission", "ann@here.test") as client:
        assert client.esmtp_features["futurerelease"].split()[0] == "604800"
        assert client.mail("ann@here.test", [f"HOLDUNTIL={render_moment(time.time() - 60)}"])[0] == 501
        for option, subject in ((f"HOLDUNTIL={render_moment(until)}", "tomorrow"), ("HOLDFOR=4", "in a moment")):
            assert client.mail("ann@here.test", [option])[0] == 250
            assert client.rcpt("bob@here.test")[0] == 250
            assert client.data(f"From: ann@here.test\r\nSubject: {subject}\r\n\r\nx\r\n")[0] == 250
    rows = {row["hold_until"]: row for row in server.json("queue", "list")}
    assert rows[float(int(until))]["next_attempt"] == float(int(until)) and len(rows) == 2
    server.command("queue", "retry", "--all")
    wait_until(lambda: [m for m in server.messages("bob@here.test") if b"in a moment" in m], "what was held for 4 s")
    (moment,) = (row["queue_id"] for hold, row in rows.items() if hold != float(int(until)))
    (delivered,) = wait_until(lambda: [e for e in server.events("delivered") if e["queue_id"] == moment], "its event")
    assert delivered["delay_seconds"] >= 3.9  # by the server's own clock: not before its time
    (left,) = server.json("queue", "list")
    assert left["hold_until"] == float(int(until))
    assert "held until" in server.command("queue", "show", left["queue_id"])
    server.kill()
    server.start()
    assert [row["queue_id"] for row in server.json("queue", "list")] == [left["queue_id"]]
    server.command("queue", "delete", "--all")


def test_a_priority_is_in_the_trace_and_in_the_log(server: Server) -> None:
    with server.smtp("submission", "ann@here.test") as client:
        assert client.mail("ann@here.test", ["MT-PRIORITY=9"]) == (
            250,
            b"2.3.6 4 is the priority of this message, not 9",
        )
        client.rcpt("bob@here.test")
        assert client.data("From: ann@here.test\r\nSubject: urgent\r\n\r\nx\r\n")[0] == 250
    (message,) = wait_until(lambda: [m for m in server.messages("bob@here.test") if b"urgent" in m], "the message")
    assert b"\r\n\tfor <bob@here.test>\r\n\tPRIORITY 4;\r\n" in message
    (received,) = wait_until(lambda: [e for e in server.events("received") if "priority" in e], "its event")
    assert received["priority"] == 4


def test_each_listener_offers_what_it_honours(server: Server) -> None:
    with server.smtp("mx") as client:
        assert client.esmtp_features["limits"] == "RCPTMAX=1000"
        offered = set(client.esmtp_features)
        assert {"dsn", "smtputf8", "pipelining"} <= offered
        assert not {"futurerelease", "mt-priority", "requiretls", "deliverby"} & offered
    with server.smtp("submission") as client:
        assert {"futurerelease", "mt-priority"} <= set(client.esmtp_features)


# -- Postfix ----------------------------------------------------------------------------------------------------------------


@needs("postfix")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts a Postfix of its own")
def test_postfix_on_either_side(tmp_path: Path) -> None:
    directory = Path(tempfile.mkdtemp(prefix="polarismail-postfix-"))  # open to Postfix's own users, unlike tmp_path
    postfix = Postfix(directory, port=free_port(), boxes=("box", "jörg"), settings={"smtputf8_enable": "yes"})
    dns = Helper(tmp_path, "dns", {DOMAIN: {"MX": [[10, "pf.lab.test"]]}, "pf.lab.test": {"A": ["127.0.0.1"]}})
    server = Server(
        tmp_path / "server",
        domains=("here.test", "bücher.test"),
        accounts=("ann@here.test", JOERG),
        dns_port=dns.port,
        remote_port=postfix.port,
    )
    try:
        server.start()
        postfix.smtp_port = server.ports["mx"]
        postfix.start()
        # To Postfix: it answers for what we were asked, with what we handed on.
        with server.smtp("submission", "ann@here.test") as client:
            client.mail("ann@here.test", ["RET=HDRS", "ENVID=to+2Bpf"])
            client.rcpt(f"box@{DOMAIN}", ["NOTIFY=SUCCESS", "ORCPT=rfc822;old+2Bbox@x.test"])
            assert client.data("From: ann@here.test\r\nSubject: to postfix\r\n\r\nx\r\n")[0] == 250
            client.sendmail(
                "ann@here.test",
                [f"jörg@{DOMAIN}"],
                "From: ann@here.test\r\nSubject: grün\r\n\r\nx\r\n".encode(),
                ["SMTPUTF8"],
            )
        report = report_to(server, "ann@here.test", "Action: delivered")
        whole, recipient = blocks(report)[:2]
        assert whole["Reporting-MTA"] == "dns; pf.lab.test" and whole["Original-Envelope-Id"] == "to+pf"
        assert recipient["Original-Recipient"] == "rfc822;old+box@x.test"
        assert not server.events("bounced")
        new = directory / "vmail" / "jörg" / "new"
        wait_until(lambda: new.is_dir() and list(new.iterdir()), "the message to jörg at Postfix")
        # From Postfix: NOTIFY, ORCPT and UTF-8 arrive here as its client gave them.
        with smtplib.SMTP("127.0.0.1", postfix.port, timeout=20) as client:
            client.ehlo()
            client.mail(f"box@{DOMAIN}", ["ENVID=from+2Bpf", "RET=HDRS"])
            client.rcpt("ann@here.test", ["NOTIFY=SUCCESS", "ORCPT=rfc822;old+2Bann@x.test"])
            assert client.data("Subject: from postfix\r\n\r\nx\r\n")[0] == 250
            client.sendmail(f"box@{DOMAIN}", [JOERG], "Subject: schöne Grüße\r\n\r\nx\r\n".encode(), ["SMTPUTF8"])
        wait_until(
            lambda: [m for m in server.messages(JOERG) if "schöne Grüße".encode() in m], "Postfix's UTF-8 message"
        )
        reports = wait_until(
            lambda: [t for f in postfix.new.iterdir() if "Action: delivered" in (t := f.read_text())],
            "our report there",
        )
        assert "Original-Envelope-Id: from+pf" in reports[0]
        assert "Original-Recipient: rfc822; old+ann@x.test" in reports[0] and "mail.here.test" in reports[0]
    finally:
        postfix.stop()
        server.kill()
        dns.stop()
        print((directory / "postfix.log").read_text()[-3000:] if (directory / "postfix.log").exists() else "no log")
        print(server.twistd_log()[-2000:])
        shutil.rmtree(directory)
