# SPDX-License-Identifier: MIT
"""Mail for other people's domains: to the host that the MX record names, to the next when that is down, and back again."""

from __future__ import annotations

import email
import email.policy
from collections.abc import Callable
from email.message import Message
from typing import Any

from tests.e2e.server import Helper, Server, free_port, wait_until

DAY = 86400
TEXT = "From: ann@here.test\r\nTo: zoe@there.test\r\nSubject: outward\r\n\r\nHello Zoe\r\n"


def submit(server: Server, *recipients: str, text: str = TEXT) -> None:
    """Submit as ann, over TLS and with a login."""
    with server.smtp("submission", "ann@here.test") as client:
        refused = client.sendmail("ann@here.test", list(recipients), text)
        assert not refused


def queued(server: Server) -> list[dict[str, Any]]:
    """The queue, a row for each recipient."""
    return server.json("queue", "list")


def report_for(server: Server, name: str = "ann@here.test") -> tuple[Message, Message]:
    """The one DSN in a maildrop: the whole, and its delivery-status part's block for the recipient."""
    (octets,) = server.wait_for_messages(name, 1)
    report = email.message_from_bytes(octets, policy=email.policy.SMTP)
    assert report.get_content_type() == "multipart/report"
    assert report["Return-Path"] == "<>"
    status = next(part for part in report.walk() if part.get_content_type() == "message/delivery-status")
    blocks = status.get_payload()
    assert isinstance(blocks, list)
    return report, blocks[1]


def test_message_reaches_a_second_polarismail_by_mx(
    make_server: Callable[..., Server], make_helper: Callable[..., Helper]
) -> None:
    there = make_server(
        "there", hostname="mx.there.test", domains=("there.test",), accounts=("zoe@there.test",)
    ).start()
    dns = make_helper("dns", {"there.test": {"MX": [[10, "mx.there.test"]]}, "mx.there.test": {"A": ["127.0.0.1"]}})
    here = make_server("here", dns_port=dns.port, remote_port=there.ports["mx"]).start()
    submit(here, "zoe@there.test")
    (message,) = there.wait_for_messages("zoe@there.test", 1)
    assert message.startswith(b"Return-Path: <ann@here.test>\r\nDelivered-To: zoe@there.test\r\n")
    assert message.count(b"Received: ") == 2
    assert b"ESMTPS" in message.split(b"\r\n\r\n")[0]  # opportunistic TLS was used between the two
    assert message.endswith(b"\r\n\r\nHello Zoe\r\n")
    wait_until(lambda: not queued(here), "the queue to empty")


def test_second_mx_when_the_first_is_down(
    make_server: Callable[..., Server], make_helper: Callable[..., Helper]
) -> None:
    sink = make_helper("sink")
    zone = {
        "there.test": {"MX": [[10, "down.there.test"], [20, "up.there.test"]]},
        "down.there.test": {"A": ["127.0.0.9"]},  # nobody listens there
        "up.there.test": {"A": ["127.0.0.1"]},
    }
    dns = make_helper("dns", zone)
    here = make_server(dns_port=dns.port, remote_port=sink.port).start()
    submit(here, "zoe@there.test", "yan@there.test")
    (message,) = wait_until(sink.received, "the message at the second MX")
    assert message["reverse_path"] == "ann@here.test"
    assert sorted(message["recipients"]) == ["yan@there.test", "zoe@there.test"]
    wait_until(lambda: not queued(here), "the queue to empty")


def test_report_comes_back_for_550(make_server: Callable[..., Server], make_helper: Callable[..., Helper]) -> None:
    sink = make_helper("sink", {"RCPT": {"zoe@there.test": "550 5.1.1 nobody by that name"}})
    dns = make_helper("dns", {"there.test": {"MX": [[10, "mx.there.test"]]}, "mx.there.test": {"A": ["127.0.0.1"]}})
    here = make_server(dns_port=dns.port, remote_port=sink.port).start()
    submit(here, "zoe@there.test", "yan@there.test")
    report, block = report_for(here)
    assert block["Final-Recipient"] == "rfc822; zoe@there.test"
    assert block["Action"] == "failed"
    assert block["Status"] == "5.1.1"
    assert "nobody by that name" in block["Diagnostic-Code"]
    assert report["To"] == "ann@here.test"
    assert len(sink.received()) == 1, "the other recipient has its copy"
    wait_until(lambda: not queued(here), "the queue to empty")


def test_451_follows_the_schedule_and_ends_in_an_expiry_report(
    make_server: Callable[..., Server], make_helper: Callable[..., Helper]
) -> None:
    sink = make_helper("sink", {"RCPT": "451 4.3.0 not today"})
    dns = make_helper("dns", {"there.test": {"MX": [[10, "mx.there.test"]]}, "mx.there.test": {"A": ["127.0.0.1"]}})
    here = make_server(dns_port=dns.port, remote_port=sink.port).start()
    submit(here, "zoe@there.test")
    (row,) = wait_until(lambda: [r for r in queued(here) if r["attempts"] == 1], "the first deferral")
    first_wait = row["next_attempt"] - row["created"]
    assert 60 <= first_wait <= 1800
    assert "451" in row["last_reply"]
    here.stop()
    # Later: the second attempt is made, and the wait grows.
    here.start(clock_offset=first_wait + 60)
    (row,) = wait_until(lambda: [r for r in queued(here) if r["attempts"] == 2], "the second deferral")
    second_wait = row["next_attempt"] - row["created"] - first_wait - 60
    assert second_wait > first_wait
    here.stop()
    here.start(clock_offset=6 * DAY)
    _, block = report_for(here)
    assert block["Action"] == "failed"
    assert block["Status"].startswith(("4.", "5."))
    wait_until(lambda: not queued(here), "the queue to empty")
    assert not sink.received()


def test_dns_failures_defer_and_dns_answers_decide(
    make_server: Callable[..., Server], make_helper: Callable[..., Helper]
) -> None:
    zone: dict[str, Any] = {
        "nullmx.test": {"MX": [[0, "."]]},
        "broken.test": "SERVFAIL",
        "silent.test": "TIMEOUT",
        "plain.test": {"A": ["127.0.0.1"]},
    }
    sink = make_helper("sink")
    dns = make_helper("dns", zone)
    here = make_server(dns_port=dns.port, remote_port=sink.port).start()
    submit(here, "a@plain.test")
    (message,) = wait_until(sink.received, "the message at the implicit MX")
    assert message["recipients"] == ["a@plain.test"]
    submit(here, "b@broken.test", "c@silent.test")
    rows = wait_until(
        lambda: found if len(found := [r for r in queued(here) if r["attempts"] == 1]) == 2 else None, "both deferrals"
    )
    assert all("4.4.3" in row["last_reply"] for row in rows)
    submit(here, "d@nullmx.test")
    _, block = report_for(here)
    assert block["Status"] == "5.1.10"
    assert {row["recipient"] for row in queued(here)} == {"b@broken.test", "c@silent.test"}


def test_smarthost_takes_everything_with_a_login(make_server: Callable[..., Server]) -> None:
    smart = make_server(
        "smart",
        hostname="smart.test",
        domains=("there.test",),
        accounts=("zoe@there.test", "relay@there.test"),
        extra="[reception]\ncheck_reverse_path = false\n",  # it relays for others
    ).start()
    from tests.e2e.server import PASSWORD

    here = make_server(
        "here",
        dns_port=free_port(),  # nobody answers: DNS must not be needed
        extra=f'[smarthost]\nhost = "127.0.0.1"\nport = {smart.ports["submissions"]}\ntls = "implicit"\n'
        f'user = "relay@there.test"\npassword = "{PASSWORD}"\n',
    ).start()
    submit(here, "zoe@there.test")
    (message,) = smart.wait_for_messages("zoe@there.test", 1)
    assert b"ESMTPSA" in message


def test_one_connection_is_reused_for_what_waits(
    make_server: Callable[..., Server], make_helper: Callable[..., Helper]
) -> None:
    sink = make_helper("sink")
    zone = {"mx.there.test": {"A": ["127.0.0.1"]}}
    zone |= {f"d{n}.test": {"MX": [[10, "mx.there.test"]]} for n in range(20)}
    dns = make_helper("dns", zone)
    here = make_server(dns_port=dns.port, remote_port=sink.port, relay_extra="connections_per_site = 1\n").start()
    with here.smtp("submission", "ann@here.test") as client:
        for n in range(20):
            client.sendmail("ann@here.test", [f"zoe@d{n}.test"], TEXT)
    taken = wait_until(lambda: found if len(found := sink.received()) == 20 else None, "twenty messages")
    assert len({message["session"] for message in taken}) < 20
