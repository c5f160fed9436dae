# SPDX-License-Identifier: MIT
"""Trace fields say what is true and let nobody add to it."""

from __future__ import annotations

from email import message_from_bytes
from email.utils import parsedate_to_datetime

import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from polarismail.message.trace import delivered_to_field, received_field, return_path_field
from polarismail.values.address import Mailbox
from polarismail.values.envelope import SessionFacts

FACTS = SessionFacts(
    listener="mx",
    protocol="ESMTPS",
    client_address="192.0.2.1",
    client_port=4711,
    helo="client.example.org",
    client_name="host.example.org",
    tls="TLSv1.3 TLS_AES_256_GCM_SHA384",
)
JOE = Mailbox.parse("joe@example.net")


def test_a_received_field() -> None:
    assert received_field(FACTS, "mx.example.net", "q1", JOE, 1795316030.9) == (
        b"Received: from client.example.org (host.example.org [192.0.2.1])\r\n"
        b"\tby mx.example.net with ESMTPS (TLSv1.3 TLS_AES_256_GCM_SHA384)\r\n"
        b"\tid q1\r\n\tfor <joe@example.net>;\r\n"
        b"\tSun, 22 Nov 2026 02:53:50 +0000\r\n"
    )


@pytest.mark.parametrize(
    ("protocol", "shown"),
    [("ESMTP", "UTF8SMTP"), ("ESMTPSA", "UTF8SMTPSA"), ("LMTP", "UTF8LMTP"), ("LMTPS", "UTF8LMTPS")],
)
def test_a_received_field_of_an_smtputf8_transaction(protocol: str, shown: str) -> None:
    field = received_field(
        evolve(FACTS, protocol=protocol), "mx.example.net", "q1", Mailbox("jö", "x.net"), 0, smtputf8=True, priority=-3
    )
    assert f"\tby mx.example.net with {shown} (TLS".encode() in field
    assert "\r\n\tid q1\r\n\tfor <jö@x.net>\r\n\tPRIORITY -3;\r\n\tThu, ".encode() in field


def test_mail_that_is_made_here_has_no_client() -> None:
    assert received_field(SessionFacts(), "mx.example.net", "q1", None, 0) == (
        b"Received: by mx.example.net\r\n\tid q1;\r\n\tThu, 01 Jan 1970 00:00:00 +0000\r\n"
    )


def test_ipv6_is_tagged() -> None:
    field = received_field(SessionFacts(client_address="2001:db8::1"), "mx", "q1", None, 0)
    assert b"from unknown (unknown [IPv6:2001:db8::1])" in field


@settings(deadline=None)
@given(st.text(max_size=400), st.text(max_size=400), st.text(max_size=200))
def test_nothing_that_a_client_says_breaks_out(helo: str, name: str, tls: str) -> None:
    facts = SessionFacts(client_address="192.0.2.1", helo=helo, client_name=name, tls=tls)
    octets = received_field(facts, "mx.example.net", "q1", Mailbox("a\r\nX: y", "example.org"), 0)
    parsed = message_from_bytes(octets + b"\r\n")
    assert parsed.keys() == ["Received"] and not parsed.defects
    assert octets.isascii() and max(map(len, octets.split(b"\r\n"))) <= 998
    assert octets.count(b"(") == octets.count(b")") <= 2 and octets.count(b";") == 1
    assert parsedate_to_datetime(parsed["Received"].rpartition(";")[2].strip()).timestamp() == 0


def test_fields_of_final_delivery() -> None:
    assert return_path_field(None) == b"Return-Path: <>\r\n"
    assert return_path_field(Mailbox.parse('"a b"@example.org')) == b'Return-Path: <"a b"@example.org>\r\n'
    assert delivered_to_field(JOE) == b"Delivered-To: joe@example.net\r\n"
    assert delivered_to_field(Mailbox("jö", "example.net")) == "Delivered-To: jö@example.net\r\n".encode()
