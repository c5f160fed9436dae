# SPDX-License-Identifier: MIT
"""What a reception answers when a part behind it fails: the reply follows what has become of the message."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from twisted.internet.defer import Deferred, fail, succeed
from twisted.logger import capturedLogs

from polarismail.serve.incoming import IncomingDraft
from polarismail.serve.reception import Desk, Reception, ReceptionSettings
from polarismail.store.interfaces import Refused
from polarismail.values.address import Mailbox
from polarismail.values.envelope import EXPANSION, LOCAL, NO_OPTIONS, Envelope, Recipient, SessionFacts
from polarismail.values.errors import SpoolFull, SpoolUnhealthy, Unavailable
from polarismail.values.reply import HEADER_TOO_BIG, NO_ROOM, NOT_QUEUED, SENDER_OK, TRY_AGAIN, Reply
from polarismail.wire.smtp_events import EndOfData, Mail, Rcpt

BOB = Mailbox("bob", "here.test")
ENVELOPE = Envelope(None, (Recipient(BOB, BOB, LOCAL, 1),))
END = EndOfData(10)


class Draft:
    queue_id = "0000000000001"
    trace = b""
    abandoned = False

    def write(self, octets: bytes) -> None:
        return None

    def abandon(self) -> None:
        self.abandoned = True


def reception(**parts: Any) -> Reception:
    given: dict[str, Any] = {
        "hostname": "mail.here.test",
        "spool": None,
        "directory": None,
        "accepted": lambda committed: None,
        "record_event": lambda name, fields: None,
        "now": lambda: 1.8e9,
    }
    return Reception(Desk(**{**given, **parts}))


def incoming(draft: Any) -> IncomingDraft:
    made = IncomingDraft(draft, "mail.here.test", True)
    made.write(b"Subject: x\r\n\r\n")
    return made


def answered(d: Deferred[Reply]) -> Reply:
    replies: list[Reply] = []
    d.addCallback(replies.append)
    return replies[0]


def spool(outcome: Deferred[Any]) -> Any:
    return SimpleNamespace(commit=lambda submission: outcome)


@pytest.mark.parametrize(
    ("problem", "reply"),
    [(SpoolFull("full"), NO_ROOM), (SpoolUnhealthy("sick"), NOT_QUEUED), (RuntimeError("?"), NOT_QUEUED)],
)
def test_a_commit_that_fails(problem: Exception, reply: Reply) -> None:
    draft = Draft()
    taking = reception(spool=spool(fail(problem)))
    assert answered(taking.end_of_data(SessionFacts(), ENVELOPE, incoming(draft), END)) == reply
    assert draft.abandoned


def test_a_commit_that_is_refused() -> None:
    refusal = Reply(452, (4, 2, 2), "Out of credit")
    taking = reception(spool=spool(succeed(Refused(refusal))))
    assert answered(taking.end_of_data(SessionFacts(), ENVELOPE, incoming(Draft()), END)) == refusal


def test_what_is_committed_is_250_whatever_happens_next() -> None:
    """The message is on stable storage: a reply that brings the client back would make a second copy."""

    def accepted(committed: Any) -> None:
        raise RuntimeError("broken")

    message = SimpleNamespace(
        queue_id=Draft.queue_id, reverse_path=None, size=10, recipient_count=1, options=NO_OPTIONS
    )
    committed = SimpleNamespace(message=message, recipients=(None,))
    taking = reception(spool=spool(succeed(committed)), accepted=accepted)
    with capturedLogs() as logged:
        assert answered(taking.end_of_data(SessionFacts(), ENVELOPE, incoming(Draft()), END)).code == 250
    assert len(logged) == 1


@pytest.mark.parametrize("problem", [Unavailable("no answer"), RuntimeError("broken")])
def test_a_recipient_that_cannot_be_looked_up_is_try_again(problem: Exception) -> None:
    taking = reception(directory=SimpleNamespace(resolve=lambda mailbox: fail(problem)))
    answers: list[Any] = []
    judged = taking.check_rcpt(SessionFacts(), ENVELOPE, Rcpt(BOB))
    assert isinstance(judged, Deferred)
    judged.addCallback(answers.append)
    assert answers == [(TRY_AGAIN, ())]


def test_no_transaction_begins_where_there_is_no_room_for_it() -> None:
    space = SimpleNamespace(is_short=False, free_octets=1000)
    taking = reception(space=space)

    def mail(size: int | None) -> Any:
        return taking.check_mail(SessionFacts(), Mail(None, size=size))

    assert [mail(None), mail(1000), mail(1001)] == [SENDER_OK, SENDER_OK, NO_ROOM]
    space.is_short = True
    assert mail(None) == mail(1) == NO_ROOM


def test_content_that_cannot_be_judged_leaves_no_draft() -> None:
    def resolve(mailbox: Mailbox) -> Any:
        raise RuntimeError("broken")

    account: Any = SimpleNamespace(id=1, address=BOB)
    desk = reception(directory=SimpleNamespace(resolve=resolve), settings=ReceptionSettings(check_from=True))._desk
    draft: Any = Draft()
    made = IncomingDraft(draft, "mail.here.test", True)
    made.write(b"From: eve@here.test\r\n\r\n")
    with pytest.raises(RuntimeError):
        Reception(desk, account).end_of_data(SessionFacts(), ENVELOPE, made, END)
    assert draft.abandoned


def test_claims_that_only_a_lenient_reader_finds_are_refused() -> None:
    draft: Any = Draft()
    made = IncomingDraft(draft, "mail.here.test", True)
    made.write(b"From: a@else.test\r\nno field\r\n" + b"X: y\r\n" * 20000 + b"Return-Path: <x@else.test>\r\n\r\n")
    assert answered(reception().end_of_data(SessionFacts(), ENVELOPE, made, END)) == HEADER_TOO_BIG
    assert draft.abandoned


def test_a_return_path_goes_where_an_alias_of_ours_is_expanded() -> None:
    """The alias itself, whose sender is to hear of it, is a recipient without a maildrop."""
    targets = tuple(Recipient(Mailbox(name, "here.test"), BOB, LOCAL, 1) for name in ("ann", "eve"))
    written: list[bytes] = []
    draft: Any = SimpleNamespace(write=written.append, queue_id="1")
    taking = reception(spool=SimpleNamespace(draft=lambda front=None: draft))
    for itself, kept in ((EXPANSION, b"\r\n"), ("else.test", b"Return-Path: <x>\r\n\r\n")):
        written.clear()
        envelope = Envelope(None, (Recipient(BOB, BOB, itself), *targets))
        taking.begin_content(SessionFacts(), envelope).write(b"From: a@b.test\r\nReturn-Path: <x>\r\n\r\n")
        assert b"".join(written) == b"From: a@b.test\r\n" + kept
