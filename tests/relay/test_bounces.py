# SPDX-License-Identifier: MIT
"""Who gets a report about what, and what is done when the parts that are asked cannot answer."""

from __future__ import annotations

import email
from typing import Any

import pytest
from twisted.internet.defer import Deferred, fail, succeed

from polarismail.relay.bounces import Bounces
from polarismail.store.interfaces import (
    Account,
    Outcome,
    QueuedMessage,
    QueuedRecipient,
    Resolution,
    Submission,
    Target,
)
from polarismail.values.address import Mailbox
from polarismail.values.envelope import LOCAL, DsnRequest, RecipientState
from polarismail.values.errors import Unavailable

JOE, ANN = Mailbox.parse("joe@example.org"), Mailbox.parse("ann@example.net")
CONTENT = b"Subject: lunch\r\n\r\nhello\r\n"
FOREIGN = Resolution(ours=False)
OURS = Resolution(ours=True, targets=(Target(JOE, Account(7, JOE, "joe", None, None, "x")),))
NOBODY = Resolution(ours=True)
NOW = 1795316030.0


class Draft:
    queue_id = "r1"

    def __init__(self) -> None:
        self.octets, self.abandoned = b"", False
        self.trouble: Exception | None = None

    def write(self, octets: bytes) -> Deferred[None]:
        self.octets += octets
        return fail(self.trouble) if self.trouble else succeed(None)

    def abandon(self) -> None:
        self.abandoned = True


class Store:
    """The part of a spool and a directory that reports need."""

    def __init__(self, resolution: Any = FOREIGN, content: bytes = CONTENT) -> None:
        self.resolution, self.content, self.drafts, self.reads = resolution, content, list[Draft](), list[int]()

    def resolve(self, mailbox: Mailbox) -> Any:
        return self.resolution

    def draft(self) -> Draft:
        self.drafts.append(Draft())
        return self.drafts[-1]

    def read(self, message: QueuedMessage, offset: int, octets: int) -> Deferred[bytes]:
        self.reads.append(offset)
        return succeed(self.content[offset : offset + min(octets, 20_000)])


def outcome(state: RecipientState = RecipientState.FAILED, reply: str = "550 5.1.1 who", **fields: Any) -> Outcome:
    message = QueuedMessage(
        "q1",
        fields.pop("reverse_path", JOE),
        NOW - 60,
        fields.pop("size", len(CONTENT)),
        ret=fields.pop("ret", None),
        inline=fields.pop("inline", CONTENT),
    )
    dsn = DsnRequest(fields.pop("notify", None), fields.pop("orcpt", None))
    recipient = QueuedRecipient(message, 0, ANN, ANN, "example.net", None, 1, 0, NOW + 60, 1, dsn)
    return Outcome(recipient, state, reply, **{"remote": "mx.example.net[192.0.2.1]:25", **fields})


def compose(store: Store, *outcomes: Outcome) -> Submission | None:
    bounces = Bounces(store, store, hostname="mail.example.org", now=lambda: NOW)  # type: ignore[arg-type]
    results: list[Any] = []
    Deferred.fromCoroutine(bounces.compose(outcomes)).addBoth(results.append)
    assert len(results) == 1
    if hasattr(results[0], "raiseException"):
        results[0].raiseException()
    return results[0]


def fields_of(submission: Submission | None) -> list[Any]:
    assert submission is not None
    return email.message_from_bytes(submission.draft.octets).get_payload(1).get_payload()


def test_a_report_to_a_foreign_sender() -> None:
    submission = compose(Store(), outcome(), outcome(RecipientState.EXPIRED, "451 4.4.1 Cannot connect"))
    assert submission is not None
    envelope = submission.envelope
    assert envelope.reverse_path is None and envelope.body is None
    assert [(one.forward_path, one.next_hop) for one in envelope.recipients] == [(JOE, "example.org")]
    assert submission.expires_seconds == 86400
    assert submission.trace.startswith(b"Received: by mail.example.org\r\n\tid r1\r\n\tfor <joe@example.org>;")
    _, failed, expired = fields_of(submission)
    assert (failed["Action"], failed["Status"]) == ("failed", "5.1.1")
    assert (expired["Action"], expired["Status"]) == ("failed", "4.4.7")
    assert CONTENT in submission.draft.octets


def test_a_sender_of_ours_gets_it_in_the_maildrop() -> None:
    for resolution in (OURS, succeed(OURS)):
        submission = compose(Store(resolution), outcome(inline="ü\r\n".encode() * 10, size=40))
        assert submission is not None
        assert [(one.next_hop, one.account_id) for one in submission.envelope.recipients] == [(LOCAL, 7)]
        assert submission.envelope.body == "8BITMIME"


@pytest.mark.parametrize(
    "fields",
    [
        {"reverse_path": None},
        {"notify": "NEVER"},
        {"notify": "SUCCESS,DELAY"},
        {"state": RecipientState.RELAYED, "reply": "250 ok"},
        {"state": RecipientState.QUEUED, "reply": "451 later"},
        {"state": RecipientState.QUEUED, "reply": "451 later", "warned": True, "notify": "FAILURE"},
        {"state": RecipientState.DELETED},
    ],
)
def test_nobody_is_told(fields: dict[str, Any]) -> None:
    store = Store()
    assert compose(store, outcome(**fields)) is None
    assert not store.drafts


def test_a_sender_of_ours_who_does_not_exist_is_not_told() -> None:
    store = Store(NOBODY)
    assert compose(store, outcome()) is None
    assert not store.drafts


def test_a_long_delay() -> None:
    submission = compose(Store(), outcome(RecipientState.QUEUED, "450 4.2.1 busy", warned=True))
    _, delayed = fields_of(submission)
    assert (delayed["Action"], delayed["Status"]) == ("delayed", "4.2.1")
    assert "Will-Retry-Until" in delayed


@pytest.mark.parametrize(
    ("reply", "status"), [("550 no", "5.0.0"), ("", "5.0.0"), ("junk", "5.0.0"), ("552 5.3.4 big", "5.3.4")]
)
def test_the_status_is_the_replys_or_general(reply: str, status: str) -> None:
    assert fields_of(compose(Store(), outcome(reply=reply)))[1]["Status"] == status


def test_a_maildrop_is_no_remote_host() -> None:
    failed = fields_of(compose(Store(), outcome(remote="local")))[1]
    assert "Remote-MTA" not in failed and failed["Diagnostic-Code"].startswith("x-polarismail;")


def test_only_the_beginning_of_a_large_message_is_read() -> None:
    content = b"Subject: x\r\n\r\n" + b"line\r\n" * 1_000_000
    store = Store(content=content)
    submission = compose(store, outcome(inline=None, size=len(content)))
    assert submission is not None and len(submission.draft.octets) < 3000
    assert store.reads == [0, 20_000, 40_000]
    whole = Store(content=CONTENT)
    submission = compose(whole, outcome(inline=None))
    assert submission is not None and CONTENT in submission.draft.octets


def test_a_message_that_cannot_be_read_is_reported_all_the_same() -> None:
    """Else one broken file would hold up what is recorded with it, for ever."""

    class Broken(Store):
        def read(self, message: QueuedMessage, offset: int, octets: int) -> Deferred[bytes]:
            return fail(Unavailable("input/output error"))

    submission = compose(Broken(), outcome(inline=None))
    assert submission is not None
    assert b"550 5.1.1 who" in submission.draft.octets and b"hello" not in submission.draft.octets


def test_headers_only_where_asked() -> None:
    submission = compose(Store(), outcome(ret="HDRS"))
    assert submission is not None and b"hello" not in submission.draft.octets


def test_an_unavailable_directory_writes_nothing() -> None:
    store = Store(fail(Unavailable("database")))
    with pytest.raises(Unavailable):
        compose(store, outcome())
    assert not store.drafts


def test_a_draft_that_cannot_be_written_is_abandoned() -> None:
    class Full(Store):
        def draft(self) -> Draft:
            draft = super().draft()
            draft.trouble = Unavailable("disk")
            return draft

    store = Full()
    with pytest.raises(Unavailable):
        compose(store, outcome())
    assert [draft.abandoned for draft in store.drafts] == [True]
