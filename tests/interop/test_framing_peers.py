# SPDX-License-Identifier: MIT
"""Chunks, LMTP and front ends with real programs: Perl's Net::SMTP for BDAT, Postfix for LMTP and XFORWARD, smtplib for the
rest.

Debian's Postfix takes BDAT and never sends it; Exim, which does, cannot be installed beside it.
"""

from __future__ import annotations

import os
import smtplib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.peers import Postfix
from tests.e2e.server import PASSWORD, Server, free_port, wait_until
from tests.interop.test_peers import needs, run_program

_BDAT = r"""
use Net::SMTP;
my ($port, $debug) = @ARGV;
my $smtp = Net::SMTP->new("127.0.0.1", Port => $port, Hello => "perl.test", Timeout => 20) or die "no connection: $@";
# As somebody who has logged in, because strangers are greylisted here.
$smtp->command("XCLIENT", "LOGIN=ann\@here.test")->response() == 2 && $smtp->hello("perl.test") or die $smtp->message;
defined $smtp->supports("CHUNKING") or die "no CHUNKING";
${*$smtp}{"net_smtp_chunking"} = 1;  # it would wait for BINARYMIME, which is not offered
for my $number (1 .. 2) {
    $smtp->mail("ann\@here.test") && $smtp->to("ann\@here.test", "bob\@here.test") or die $smtp->message;
    $smtp->bdat("From: ann\@here.test\r\nSubject: perl $number\r\n\r") or die $smtp->message;
    $smtp->bdat("\n.dot\r\n..\r\n.\r\nQUIT\r\n") or die $smtp->message;
    $smtp->bdatlast(("x" x 998 . "\r\n") x 100 . "end") or die $smtp->message;
}
$smtp->mail("ann\@here.test") && $smtp->to("ann\@here.test") or die $smtp->message;
$smtp->bdat("From: ann\@here.test\r\nSubject: zero\r\n\r\n\0") and die "NUL was taken";
$smtp->code == 554 or die $smtp->code;
$smtp->reset && $smtp->quit or die $smtp->message;
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that greylists, with ports for LMTP and for front ends."""
    ports = {"lmtp": free_port(), "front": free_port()}
    place = Path(tempfile.mkdtemp(prefix="polarismail-lmtp-"))  # open to Postfix's own users, unlike tmp_path
    place.chmod(0o755)
    listeners = (
        f'[[listeners]]\nname = "lmtp-unix"\nrole = "lmtp"\ntls = "none"\naddress = "unix:{place}/lmtp"\n'
        'socket_mode = 0o666\nxclient_networks = ["local"]\n'
        f'[[listeners]]\nname = "lmtp"\nrole = "lmtp"\ntls = "none"\naddress = "127.0.0.1"\nport = {ports["lmtp"]}\n'
        'xclient_networks = ["127.0.0.1/32"]\n'
        f'[[listeners]]\nname = "front"\nrole = "mx"\ntls = "starttls"\naddress = "127.0.0.1"\nport = {ports["front"]}\n'
        'xclient_networks = ["127.0.0.0/8"]\n'
    )
    made = Server(tmp_path_factory.mktemp("framing") / "server", greylisting=True, extra=listeners)
    made.ports |= ports
    made.lmtp = {  # type: ignore[attr-defined]
        "lmtp": f"lmtp:[127.0.0.1]:{ports['lmtp']}",
        "lmtp-unix": f"lmtp:unix:{place}/lmtp",
    }
    try:
        made.start()
        made.command("alias", "add", "both@here.test", "ann@here.test", "bob@here.test")
        yield made
        assert "Traceback" not in made.twistd_log()
    finally:
        made.kill()
        print(made.twistd_log()[-3000:])


@needs("perl")
def test_net_smtp_sends_chunks(server: Server, tmp_path: Path) -> None:
    script = tmp_path / "bdat.pl"
    script.write_text(_BDAT)
    run_program("perl", script, str(server.ports["front"]))
    for name in ("ann@here.test", "bob@here.test"):
        server.wait_for_messages(name, 2)
        found = [message for message in server.messages(name) if b"\r\nSubject: perl " in message]
        assert len(found) == 2
        for message in found:
            assert message.endswith(b"\r\n\r\n.dot\r\n..\r\n.\r\nQUIT\r\n" + (b"x" * 998 + b"\r\n") * 100 + b"end\r\n")


@needs("postfix")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts a Postfix of its own")
@pytest.mark.parametrize(("listener", "client_address"), [("lmtp", "127.0.0.1"), ("lmtp-unix", "local")])
def test_postfix_hands_over_by_lmtp_and_says_for_whom(server: Server, listener: str, client_address: str) -> None:
    directory = Path(tempfile.mkdtemp(prefix="polarismail-postfix-"))  # open to Postfix's own users, unlike tmp_path
    postfix = Postfix(directory, port=free_port())
    postfix.settings = {
        "default_transport": server.lmtp[listener],  # type: ignore[attr-defined]
        "lmtp_send_xforward_command": "yes",
        "default_destination_recipient_limit": 50,
    }
    before = {name: len(server.messages(name)) for name in ("ann@here.test", "bob@here.test")}
    try:
        postfix.start()
        with smtplib.SMTP("127.0.0.1", postfix.port, "client.example", timeout=20) as client:
            recipients = ["ann@here.test", "nobody@here.test", "bob@here.test", "both@here.test"]
            client.sendmail("ann@here.test", recipients, f"Subject: by {listener} \r\n\r\n.dots\r\n")
        # One copy for each of the two, though an alias stands for both once more; and a report on the one that is not.
        messages = server.wait_for_messages("ann@here.test", before["ann@here.test"] + 2)
        subject = f"Subject: by {listener} ".encode()
        found = [message for message in messages if subject in message]
        assert len([message for message in found if b"No such mailbox" in message]) == 1
        (message,) = [m for m in server.wait_for_messages("bob@here.test", 1) if b"\r\n" + subject in m]
        assert message.endswith(b"\r\n\r\n.dots\r\n")
        assert b" with LMTP\r\n" in message and b"by pf.lab.test (Postfix)" in message
        log = (directory / "postfix.log").read_text()
        assert log.count("status=sent (250 2.0.0 Queued as ") >= 3
    finally:
        postfix.stop()
        print((directory / "postfix.log").read_text() if (directory / "postfix.log").exists() else "no log")
    (event,) = [
        event for event in server.events("received") if event["listener"] == listener and event.get("recipients") == 2
    ]
    assert event["client"] == client_address and event["protocol"] == "LMTP"
    assert "[127.0.0.1]" in event["origin"] and "helo=client.example" in event["origin"] and " id=" in event["origin"]


def test_greylisting_asks_about_the_client_that_a_front_end_speaks_for(server: Server) -> None:
    with smtplib.SMTP("127.0.0.1", server.ports["front"], "front.test", timeout=20) as client:
        client.ehlo()
        assert client.has_extn("xclient") and client.has_extn("xforward")
        said = "ADDR=203.0.113.7 PORT=1025 NAME=mail.else.test HELO=mail.else.test PROTO=ESMTP"
        assert client.docmd("XCLIENT", said)[0] == 220
        client.ehlo()
        assert client.mail("x@else.test")[0] == 250
        assert client.rcpt("bob@here.test")[0] == 451
        client.rset()
        # The same from someone who has logged in at the front end: no greylisting, and mail may go anywhere.
        assert client.docmd("XCLIENT", "LOGIN=ann@here.test")[0] == 220
        client.ehlo()
        client.sendmail("ann@here.test", ["bob@here.test"], "From: ann@here.test\r\nSubject: by a front end\r\n\r\n")
    refused = wait_until(lambda: server.events("tempfailed"), "the refusal in the log")
    assert refused[-1]["stage"] == "greylist"
    assert refused[-1]["client"] == "203.0.113.7" and refused[-1]["helo"] == "mail.else.test"
    found = [m for m in server.wait_for_messages("bob@here.test", 1) if b"Subject: by a front end" in m]
    assert b"from mail.else.test (mail.else.test [203.0.113.7])" in found[0]
    assert b"with ESMTPA" in found[0]
    event = [event for event in server.events("received") if event["listener"] == "front"][-1]
    assert event["account"] == "ann@here.test" and event["client"] == "203.0.113.7"


def test_a_front_end_cannot_vouch_for_nobody_and_others_cannot_at_all(server: Server) -> None:
    with smtplib.SMTP("127.0.0.1", server.ports["front"], "front.test", timeout=20) as client:
        client.ehlo()
        assert client.docmd("XCLIENT", "LOGIN=nobody@here.test")[0] == 535
        assert client.docmd("XCLIENT", f"LOGIN={PASSWORD.replace(' ', '+20')}")[0] == 535
    with smtplib.SMTP("127.0.0.1", server.ports["mx"], "front.test", timeout=20) as client:
        client.ehlo()
        assert not client.has_extn("xclient")
        assert client.docmd("XCLIENT", "LOGIN=ann@here.test")[0] == 550
        assert client.mail("ann@here.test")[0] == 250
        assert client.rcpt("x@else.test")[0] == 550


def test_lmtp_takes_mail_for_our_own_and_does_not_greylist(server: Server) -> None:
    with smtplib.LMTP("127.0.0.1", server.ports["lmtp"], timeout=20) as client:
        assert client.ehlo()[0] == 250
        assert client.mail("x@else.test")[0] == 250
        assert client.rcpt("x@away.test")[0] == 550
        assert client.rcpt("nobody@here.test")[0] == 550
        assert client.rcpt("ann@here.test")[0] == 250
        assert client.data("Subject: over LMTP\r\n\r\n")[0] == 250
    messages = server.wait_for_messages("ann@here.test", 1)
    assert any(b"Subject: over LMTP" in message for message in messages)
