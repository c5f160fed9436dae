# SPDX-License-Identifier: MIT
"""Reports, read back by Python's email package; whatever a remote server said, it stays one field's text."""

from __future__ import annotations

import email
import email.policy
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polarismail.message.report import DELAYED, FAILED, MAX_RETURNED_OCTETS, Fate, Subject, status_report
from polarismail.values.address import Mailbox

JOE, ANN = Mailbox.parse("joe@example.org"), Mailbox.parse("ann@example.net")
ORIGINAL = b"Received: from x\r\n\tby y\r\nMessage-ID: <m1@example.org>\r\nSubject: lunch\r\n\r\n.\r\nFrom the top\r\n"
NOW = 1795316030.0


def subject(original: bytes = ORIGINAL, **fields: Any) -> Subject:
    return Subject("q1", NOW - 3600, fields.pop("size", len(original)), original[:MAX_RETURNED_OCTETS], **fields)


def fate(**fields: Any) -> Fate:
    known: dict[str, Any] = {
        "forward_path": ANN,
        "original": ANN,
        "action": FAILED,
        "status": "5.1.1",
        "diagnostic": "550 5.1.1 No such mailbox here",
        "remote": "mx.example.net[192.0.2.1]:25",
        "last_attempt": NOW,
    }
    return Fate(**{**known, **fields})


def report(about: Subject | None = None, *fates: Fate, **fields: Any) -> bytes:
    return status_report(
        hostname="mail.example.org",
        queue_id="r1",
        reverse_path=JOE,
        subject=about or subject(),
        fates=fates or (fate(),),
        now=NOW,
        **fields,
    )


def parsed(octets: bytes) -> tuple[Message, str, list[Message], Message]:
    """The report, its text, its blocks of status fields, what was returned. Fails on any defect."""
    assert octets.replace(b"\r\n", b"").count(b"\n") == 0 == octets.replace(b"\r\n", b"").count(b"\r")
    whole = email.message_from_bytes(octets, policy=email.policy.compat32)
    assert whole.get_content_type() == "multipart/report"
    assert whole.get_param("report-type") == "delivery-status"
    text, status, returned = whole.get_payload()
    assert not any(part.defects for part in whole.walk())
    assert text.get_content_type() == "text/plain" and status.get_content_type() == "message/delivery-status"
    return whole, " ".join(text.get_payload().split()), status.get_payload(), returned


def test_the_header_section() -> None:
    whole, *_ = parsed(report())
    assert whole["From"] == "Mail Delivery System <mailer-daemon@mail.example.org>"
    assert whole["To"] == "<joe@example.org>"
    assert whole["Auto-Submitted"] == "auto-replied"
    assert whole["MIME-Version"] == "1.0"
    assert whole["Message-ID"] == "<r1@mail.example.org>"
    assert whole["In-Reply-To"] == whole["References"] == "<m1@example.org>"
    assert parsedate_to_datetime(whole["Date"]).timestamp() == NOW
    assert len(whole.keys()) == len(set(whole.keys()))


def test_a_failure() -> None:
    _, text, (message, recipient), returned = parsed(report())
    assert "<ann@example.net>" in text and "550 5.1.1 No such mailbox here" in text and "q1" in text
    assert message["Reporting-MTA"] == "dns; mail.example.org"
    assert parsedate_to_datetime(message["Arrival-Date"]).timestamp() == NOW - 3600
    assert dict(recipient.items()) == {
        "Final-Recipient": "rfc822; ann@example.net",
        "Action": "failed",
        "Status": "5.1.1",
        "Remote-MTA": "dns; mx.example.net",
        "Diagnostic-Code": "smtp; 550 5.1.1 No such mailbox here",
        "Last-Attempt-Date": recipient["Last-Attempt-Date"],
    }
    assert parsedate_to_datetime(recipient["Last-Attempt-Date"]).timestamp() == NOW
    assert returned.get_content_type() == "message/rfc822"


def test_the_original_is_returned_octet_by_octet() -> None:
    octets = report()
    assert b"\r\n\r\n" + ORIGINAL + b"\r\n--" in octets


def test_several_recipients_of_all_kinds() -> None:
    octets = report(
        subject(envid="QQ+2B314159"),
        fate(orcpt="rfc822;anne+2Bx@example.net", original=Mailbox.parse("anne@example.org")),
        fate(action=FAILED, status="4.4.7", diagnostic="451 4.4.1 Cannot connect", expired=True),
        fate(action=DELAYED, status="4.2.1", diagnostic="450 4.2.1 busy", remote="", retry_until=NOW + 60),
    )
    whole, text, (message, first, second, third), _ = parsed(octets)
    assert message["Original-Envelope-Id"] == "QQ+314159"
    assert first["Original-Recipient"] == "rfc822; anne+x@example.net"
    assert second["Original-Recipient"] is None
    assert (second["Action"], second["Status"]) == ("failed", "4.4.7")
    assert (third["Action"], third["Remote-MTA"]) == ("delayed", None)
    assert third["Diagnostic-Code"] == "x-polarismail; 450 4.2.1 busy"
    assert parsedate_to_datetime(third["Will-Retry-Until"]).timestamp() == NOW + 60
    assert "<anne@example.org> (forwarded to <ann@example.net>)" in text
    assert "has expired" in text and "not been delivered to these recipients yet" in text
    assert whole["Subject"].startswith("Undelivered")


def test_a_delay_only() -> None:
    whole, text, *_ = parsed(report(None, fate(action=DELAYED, status="4.2.1")))
    assert whole["Subject"].startswith("Delayed") and "could not be delivered" not in text


@pytest.mark.parametrize(
    ("original", "fields", "kind"),
    [
        (ORIGINAL, {"headers_only": True}, "text/rfc822-headers"),
        (ORIGINAL + b"x" * 70 + b"\r\n" * 30_000, {}, "text/rfc822-headers"),
        (b"Subject: x\r\n\r\n" + b"x" * 2000 + b"\r\n", {}, "text/rfc822-headers"),
        (b"Subject: x\r\n\r\ngr\xc3\xbc\xc3\x9fe\r\n", {}, "text/rfc822-headers"),
        (b"Subject: gr\xfc\xdfe\r\nX: " + b"y" * 3000 + b"\r\n\r\nx\r\n", {}, "text/rfc822-headers"),
        (b"X: y\r\n" * 20_000, {}, "text/rfc822-headers"),
        (b"x" * 200_000, {}, "text/rfc822-headers"),
        (b"", {}, "message/rfc822"),
        (b"X: no line end", {}, "message/rfc822"),
    ],
)
def test_what_is_returned_fits_any_way(original: bytes, fields: dict[str, Any], kind: str) -> None:
    octets = report(subject(original, **fields))
    *_, returned = parsed(octets)
    assert returned.get_content_type() == kind
    assert octets.isascii() and max(map(len, octets.split(b"\r\n"))) <= 998
    assert len(octets) < MAX_RETURNED_OCTETS + 5000
    if kind == "text/rfc822-headers" and b"Subject" in original:
        assert returned.get_payload().strip().startswith(("Received:", "Subject:"))
        assert b"From the top" not in octets


def test_8bit_content_goes_back_whole_where_it_may() -> None:
    original = b"Subject: gr\xc3\xbc\xc3\x9fe\r\n\r\n" + b"\xe4" * 3000 + b"\r\n"
    octets = report(subject(original), allows_8bit=True)
    whole, *_, returned = parsed(octets)
    assert original in octets
    assert whole["Content-Transfer-Encoding"] == returned["Content-Transfer-Encoding"] == "8bit"


def test_content_cannot_close_the_report() -> None:
    original = b"Subject: x\r\n\r\n--=_r1\r\n--=_r1_--\r\n--=_r1__\r\n"
    whole, *_, returned = parsed(report(subject(original)))
    assert len(whole.get_payload()) == 3
    assert returned.get_payload()[0].get_payload() == "--=_r1\r\n--=_r1_--\r\n--=_r1__\r\n"


def test_a_forged_message_id_is_not_repeated() -> None:
    for value in (b"<a>\r\n X: y", b"<a> <b>", b"<\xff>", b"a", b"<" + b"a" * 300 + b">", b""):
        whole, *_ = parsed(report(subject(b"Message-ID: " + value + b"\r\n\r\n")))
        assert whole["In-Reply-To"] is None


evil = st.text(max_size=200) | st.lists(
    st.sampled_from(
        [
            "\r\n",
            "\n",
            "\r",
            "\r\n\r\n",
            "--=_r1",
            "Action: delivered",
            "Bcc: x@y",
            "\x00",
            "\x85",
            "\u2028",
            "é",
            "; ",
            " ",
            "x" * 1200,
        ]
    ),
    max_size=12,
).map("".join)


@settings(deadline=None)
@given(evil, evil, evil, evil, st.sampled_from([FAILED, DELAYED]))
def test_no_words_of_others_become_ours(diagnostic: str, remote: str, orcpt: str, local: str, action: str) -> None:
    hostile = Mailbox(local, "example.net")
    about = subject(envid=orcpt)
    octets = report(
        about, fate(diagnostic=diagnostic, remote=remote, orcpt=orcpt, forward_path=hostile, action=action), fate()
    )
    assert octets.isascii() and max(map(len, octets.split(b"\r\n"))) <= 998
    whole, _, (message, first, second), _ = parsed(octets)
    assert len(whole.get_payload()) == 3 and whole["Bcc"] is None
    assert set(message.keys()) <= {"Original-Envelope-Id", "Reporting-MTA", "Arrival-Date", "X-Polarismail-Queue-ID"}
    assert first["Action"] == action and first.get_all("Action") == [action]
    assert set(first.keys()) <= {
        "Original-Recipient",
        "Final-Recipient",
        "Action",
        "Status",
        "Remote-MTA",
        "Diagnostic-Code",
        "Last-Attempt-Date",
    }
    assert second["Final-Recipient"] == "rfc822; ann@example.net"


@settings(deadline=None)
@given(evil)
def test_a_hostile_reverse_path_breaks_nothing(local: str) -> None:
    octets = status_report(
        hostname="mail.example.org",
        queue_id="r1",
        reverse_path=Mailbox(local, "example.org"),
        subject=subject(),
        fates=[fate()],
        now=NOW,
    )
    whole, *_ = parsed(octets)
    assert whole["Bcc"] is None and len(whole.get_payload()) == 3


JOERG = Mailbox("jörg", "bücher.test")
UTF8 = "Subject: grün\r\nMessage-ID: <m@x>\r\n\r\nhello\r\n".encode()


def parts(octets: bytes) -> tuple[Message, Message, Message]:
    text, status, returned = email.message_from_bytes(octets).get_payload()
    return text, status, returned


def test_parameters_are_shown_without_their_coding() -> None:
    _, _, (whole, recipient), _ = parsed(report(subject(envid="QQ+2B31+0D+0AX"), fate(orcpt="rfc822;old+2Bname@x")))
    assert whole["Original-Envelope-Id"] == "QQ+31?X"
    assert recipient["Original-Recipient"] == "rfc822; old+name@x"


def test_a_sender_beyond_ascii_gets_a_report_beyond_ascii() -> None:
    fates = (
        fate(forward_path=JOERG, original=JOERG, orcpt=r"utf-8;J\x{F6}rg@x"),
        fate(action="relayed", status="2.0.0"),
    )
    octets = status_report(
        hostname="mail.example.org",
        queue_id="r1",
        reverse_path=JOERG,
        subject=subject(UTF8, smtputf8=True),
        fates=fates,
        now=NOW,
        smtputf8=True,
    )
    assert "To: <jörg@bücher.test>".encode() in octets
    text, status, returned = parts(octets)
    assert status.get_content_type() == "message/global-delivery-status"
    assert returned.get_content_type() == "message/global" and UTF8 in octets
    assert {part["Content-Transfer-Encoding"] for part in (text, status, returned)} == {"8bit"}
    assert "Final-Recipient: utf-8; jörg@bücher.test\r\n".encode() in octets
    assert "Original-Recipient: utf-8; Jörg@x\r\n".encode() in octets
    assert b"Final-Recipient: rfc822; ann@example.net" in octets
    headers_only = status_report(
        hostname="mail.example.org",
        queue_id="r1",
        reverse_path=JOERG,
        subject=subject(UTF8, smtputf8=True, headers_only=True),
        fates=fates,
        now=NOW,
        smtputf8=True,
    )
    assert parts(headers_only)[2].get_content_type() == "message/global-headers" and b"hello" not in headers_only


def test_an_ascii_sender_hears_of_addresses_beyond_ascii_in_ascii() -> None:
    about = fate(forward_path=JOERG, original=JOERG, orcpt="utf-8;jörg@x")
    for headers_only, kind in ((False, "message/global"), (True, "message/global-headers")):
        octets = report(subject(UTF8, smtputf8=True, headers_only=headers_only), about)
        assert octets.isascii()
        # Python takes every message/* for one that is not encoded, which RFC 6532 §3.7 allows: no `parsed` here.
        text, status, returned = parts(octets)
        recipient = status.get_payload()[1]
        assert recipient["Final-Recipient"] == r"utf-8; j\x{F6}rg@b\x{FC}cher.test"
        assert recipient["Original-Recipient"] == r"utf-8; j\x{F6}rg@x"
        assert r"<j\x{F6}rg@b\x{FC}cher.test>" in text.get_payload()
        # What a next hop without SMTPUTF8 cannot take goes encoded (RFC 6533 §4.5).
        assert (returned.get_content_type(), returned["Content-Transfer-Encoding"]) == (kind, "base64")
    local = report(subject(UTF8, smtputf8=True), about, allows_8bit=True)
    assert parts(local)[2].get_content_type() == "message/global" and UTF8 in local


def test_a_domain_beyond_ascii_alone_is_said_in_a_labels() -> None:
    _, _, (_, recipient), _ = parsed(report(None, fate(forward_path=Mailbox("jo", "bücher.test"))))
    assert recipient["Final-Recipient"] == "rfc822; jo@xn--bcher-kva.test"


@pytest.mark.parametrize("hostname", ["mail", "[192.0.2.25]"])
def test_a_host_without_a_full_name_is_none_of_dns(hostname: str) -> None:
    octets = status_report(
        hostname=hostname, queue_id="r1", reverse_path=JOE, subject=subject(), fates=[fate()], now=NOW
    )
    _, _, (message, _), _ = parsed(octets)
    assert message["Reporting-MTA"] == f"x-local-hostname; {hostname}"
