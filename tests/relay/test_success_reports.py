# SPDX-License-Identifier: MIT
"""NOTIFY=SUCCESS: who hears what, recorded with the success itself; and mail that is held, through the whole relay."""

from __future__ import annotations

import email
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from polarismail.policy.relaying import expand_recipient
from polarismail.relay.verdicts import needs_report
from polarismail.store.interfaces import Account, Committed, Outcome, Resolution, Submission, Target
from polarismail.store.queue_operations import QueueFilter
from polarismail.values.address import Mailbox
from polarismail.values.envelope import (
    EXPANSION,
    LOCAL,
    NO_DSN_REQUEST,
    NO_OPTIONS,
    DsnRequest,
    Envelope,
    MailOptions,
    Recipient,
    RecipientState,
)
from polarismail.values.errors import TooManyTargets
from tests.reactor import run
from tests.relay.relays import CONTENT, Relay
from tests.relay.test_bounces import Store, compose, fields_of, outcome
from tests.relay.test_manager import ONE_MX
from tests.store.spools import FACTS, SENDER, TRACE

ZOE, ANN, BOB = (Mailbox.parse(address) for address in ("zoe@there.test", "ann@local.test", "bob@local.test"))
SUCCESS = DsnRequest("SUCCESS,FAILURE", "rfc822;old+2Bname@x.test")


@pytest.fixture
def make_relay(tmp_path: Path) -> Iterator[Callable[..., Relay]]:
    made: list[Relay] = []

    def make(zone: dict[str, Any] | None = None, **settings: Any) -> Relay:
        made.append(Relay(tmp_path, zone, **settings))
        return made[-1]

    yield make
    for relay in made:
        relay.stop()


def submit(
    relay: Relay, *recipients: Recipient, sender: Mailbox | None = SENDER, options: MailOptions = NO_OPTIONS
) -> str:
    async def commit() -> str:
        draft = relay.spool.draft()
        draft.write(CONTENT)
        letter = Envelope(sender, recipients, options=options)
        committed = await relay.spool.commit(Submission(draft, letter, FACTS, TRACE))
        assert isinstance(committed, Committed)
        relay.manager.accepted(committed)
        return committed.message.queue_id

    return run(commit)


def foreign(path: Mailbox = ZOE, dsn: DsnRequest = SUCCESS) -> Recipient:
    return Recipient(path, path, path.domain, None, dsn)


def ours(path: Mailbox, dsn: DsnRequest = SUCCESS) -> Recipient:
    return Recipient(path, path, LOCAL, 1, dsn)


def test_a_next_hop_with_dsn_answers_for_it(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay(ONE_MX)
    sink = relay.sink("127.0.0.21", extensions=("PIPELINING", "8BITMIME", "DSN"))
    submit(relay, foreign())
    relay.wait_empty()
    assert "RCPT TO:<zoe@there.test> NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;old+2Bname@x.test" in sink.commands
    assert [name for name, _ in relay.events] == ["relayed", "removed"]


def test_a_next_hop_without_dsn_does_not_and_we_do(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay(ONE_MX)
    relay.sink("127.0.0.21")
    queue_id = submit(relay, foreign(), foreign(Mailbox("yan", "there.test"), DsnRequest("FAILURE")))
    relay.wait_empty()
    (bounced,) = relay.named("bounced")
    assert bounced["queue_id"] == queue_id
    assert relay.maildrops.delivered == [(bounced["report"], "sender@example.org")]


def test_what_is_delivered_here_is_reported_at_once(make_relay: Callable[..., Relay]) -> None:
    """Not after the seconds that a failure waits for others: what is delivered must be recorded now."""
    relay = make_relay(merge_seconds=3600.0)
    queue_id = submit(relay, ours(ANN), ours(BOB))
    relay.wait_empty()
    (bounced,) = relay.named("bounced")  # one for both
    assert relay.maildrops.delivered == [
        (queue_id, "ann@local.test"),
        (queue_id, "bob@local.test"),
        (bounced["report"], "sender@example.org"),
    ]


def test_a_null_reverse_path_is_told_nothing(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay()
    submit(relay, ours(ANN), sender=None)
    relay.wait_empty()
    assert not relay.named("bounced")


def test_an_alias_of_several_is_expanded_and_its_targets_keep_the_rest(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay(ONE_MX)
    sink = relay.sink("127.0.0.21", extensions=("PIPELINING", "8BITMIME", "DSN"))
    team = Mailbox("team", "local.test")
    account = Account(1, ANN, "1", None, None, "")
    several = Resolution(True, (Target(ANN, account), Target(ZOE)))
    recipients = expand_recipient(several, team, SUCCESS)
    assert [(one.forward_path, one.next_hop, one.dsn.notify) for one in recipients] == [
        (team, EXPANSION, "SUCCESS,FAILURE"),
        (ANN, LOCAL, "FAILURE"),
        (ZOE, "there.test", "FAILURE"),
    ]
    submit(relay, *recipients)
    relay.wait_empty()
    (expanded,) = relay.named("expanded")
    assert expanded["recipient"] == "team@local.test" and len(relay.named("bounced")) == 1
    assert "RCPT TO:<zoe@there.test> NOTIFY=FAILURE ORCPT=rfc822;old+2Bname@x.test" in sink.commands
    assert len(relay.named("delivered")) == 2  # ann's, and the report


@pytest.mark.parametrize(
    ("notify", "kept"), [("SUCCESS", "NEVER"), ("delay,success", "delay"), ("NEVER", "NEVER"), (None, None)]
)
def test_what_targets_keep_of_notify(notify: str | None, kept: str | None) -> None:
    several = Resolution(True, (Target(ZOE), Target(ANN)))
    recipients = expand_recipient(several, BOB, DsnRequest(notify, "rfc822;x"))
    assert [one.dsn for one in recipients if one.next_hop != EXPANSION] == [DsnRequest(kept, "rfc822;x")] * 2
    one = expand_recipient(Resolution(True, (Target(ZOE),)), BOB, DsnRequest(notify, None))
    assert [each.dsn.notify for each in one] == [notify]


def test_a_success_is_recorded_though_its_report_cannot_be_written(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay()

    async def broken(outcomes: Any) -> Submission | None:
        raise RuntimeError("broken")

    relay.manager._recorder._compose = broken
    queue_id = submit(relay, ours(ANN))
    relay.wait_empty()
    assert relay.maildrops.delivered == [(queue_id, "ann@local.test")] and not relay.named("bounced")


def test_a_sender_that_is_an_alias_of_too_many_holds_up_nobody(make_relay: Callable[..., Relay]) -> None:
    """Anybody can say that they are such an alias of ours, and have a report made for it."""
    relay = make_relay()

    async def broken(outcomes: Any) -> Submission | None:
        raise TooManyTargets("the alias all@local.test leads to more than 100 addresses")

    relay.manager._recorder._compose = broken
    first, other = submit(relay, ours(ANN)), submit(relay, ours(BOB, NO_DSN_REQUEST))
    relay.wait_empty()
    assert not relay.manager._recorder.suspended
    assert sorted(relay.maildrops.delivered) == [(first, "ann@local.test"), (other, "bob@local.test")]


@pytest.mark.parametrize(
    ("state", "action", "status"),
    [
        (RecipientState.DELIVERED, "delivered", "2.0.0"),
        (RecipientState.RELAYED, "relayed", "2.0.0"),
        (RecipientState.EXPANDED, "expanded", "2.1.5"),
    ],
)
def test_the_report_of_a_success(state: RecipientState, action: str, status: str) -> None:
    done = outcome(state, f"250 {status} ok", notify="SUCCESS", orcpt="rfc822;old+2Bname@x.test")
    assert needs_report(done)
    submission = compose(Store(), done)
    assert submission is not None
    _, recipient = fields_of(submission)
    assert (recipient["Action"], recipient["Status"]) == (action, status)
    assert recipient["Original-Recipient"] == "rfc822; old+name@x.test"
    # Of what did not fail, the header section goes back (RFC 3461 §4.3).
    returned = email.message_from_bytes(submission.draft.octets).get_payload(2)
    assert returned.get_content_type() == "text/rfc822-headers" and b"hello" not in submission.draft.octets
    assert compose(Store(), evolve(done, passed_dsn=True)) is None and not needs_report(evolve(done, passed_dsn=True))


def test_a_report_has_the_priority_of_its_message() -> None:
    failed = outcome()
    message = evolve(failed.recipient.message, options=MailOptions(priority=-4, hold_until=5.0))
    submission = compose(Store(), evolve(failed, recipient=evolve(failed.recipient, message=message)))
    assert submission is not None and submission.envelope.options == MailOptions(priority=-4)


def test_held_mail_goes_out_when_it_is_time_and_not_before(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay(ONE_MX)
    sink = relay.sink("127.0.0.21")
    until = relay.now() + 86_400.0
    queue_id = submit(relay, foreign(dsn=DsnRequest()), ours(ANN, DsnRequest()), options=MailOptions(hold_until=until))
    relay.wait(lambda: not relay.manager._looking)
    assert relay.manager.counts().in_hand == 0 and len(relay.queue()) == 2
    relay.advance(86_390)
    relay.process.retry(QueueFilter())
    relay.wait(lambda: not relay.manager._looking)
    assert not sink.received and not relay.maildrops.delivered and relay.manager.counts().in_hand == 0
    relay.advance(11)
    relay.wait_empty()
    assert relay.maildrops.delivered == [(queue_id, "ann@local.test")] and len(sink.received) == 1


def test_the_timer_is_set_for_what_is_held(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay()
    queue_id = submit(relay, ours(ANN), options=MailOptions(hold_until=relay.now() + 0.5))
    assert not relay.maildrops.delivered

    async def tick() -> None:
        relay.process.clock += 1.0

    run(tick)
    relay.wait(lambda: relay.maildrops.delivered, seconds=20)
    assert relay.maildrops.delivered[0] == (queue_id, "ann@local.test")


def test_the_delay_of_held_mail_counts_from_its_release(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay(ONE_MX)
    relay.sink("127.0.0.21", {"RCPT": "451 4.3.0 later"})
    submit(relay, foreign(dsn=DsnRequest()), options=MailOptions(hold_until=relay.now() + 86_400.0))
    relay.advance(86_401)
    relay.wait(lambda: relay.named("deferred"))
    relay.wait(lambda: relay.manager.counts().in_hand == 0)
    assert not relay.named("bounced")
    (left,) = relay.queue().values()
    assert left.recipient.expires == left.recipient.message.released + 432_000.0


def test_plain_outcomes_are_no_business_of_reports() -> None:
    for state in RecipientState:
        done: Outcome = outcome(state)
        plain = evolve(done, recipient=evolve(done.recipient, dsn=DsnRequest()))
        assert needs_report(plain) == (state in (RecipientState.FAILED, RecipientState.EXPIRED))
