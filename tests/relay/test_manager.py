# SPDX-License-Identifier: MIT
"""The relay as a whole: the real manager, spool, resolver, sessions and DNS, against SMTP sinks on loopback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred

from polarismail.relay.routing import RoutingSettings, Smarthost
from polarismail.store.interfaces import Outcome
from polarismail.store.queue_operations import QueueFilter
from polarismail.values.envelope import RecipientState
from tests.reactor import run
from tests.relay.relays import CONTENT, Relay
from tests.store.spools import TRACE

ONE_MX = {"there.test": {"MX": [[10, "mx.there.test"]]}, "mx.there.test": {"A": ["127.0.0.21"]}}
TWO_MX = {
    "there.test": {"MX": [[10, "mx1.there.test"], [20, "mx2.there.test"]]},
    "mx1.there.test": {"A": ["127.0.0.21"]},
    "mx2.there.test": {"A": ["127.0.0.22"]},
}


@pytest.fixture
def make_relay(tmp_path: Path) -> Iterator[Callable[..., Relay]]:
    made: list[Relay] = []

    def make(zone: dict[str, Any] | None = None, **settings: Any) -> Relay:
        made.append(Relay(tmp_path, zone, **settings))
        return made[-1]

    yield make
    for relay in made:
        relay.stop()


def test_new_mail_goes_out_at_once_and_leaves_the_spool(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay(ONE_MX)
    sink = relay.sink("127.0.0.21")
    queue_id = relay.submit("zoe@there.test")
    relay.wait_empty()
    (message,) = sink.received
    assert message.content == TRACE + CONTENT
    assert (message.reverse_path, message.recipients, message.helo) == (
        "sender@example.org",
        ("zoe@there.test",),
        "relay.test",
    )
    (event,) = relay.named("relayed")
    assert event["queue_id"] == queue_id and event["recipient"] == "zoe@there.test"
    assert event["relay"] == f"mx.there.test[127.0.0.21]:{relay.port}" and event["reply"].startswith("250")
    assert relay.manager.counts().in_hand == 0
    assert [name for name, _ in relay.events] == ["relayed", "removed"]


def test_local_and_foreign_recipients_of_one_message(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay(ONE_MX)
    sink = relay.sink("127.0.0.21")
    queue_id = relay.submit("ann@local.test", "zoe@there.test", "bob@local.test")
    relay.wait_empty()
    assert relay.maildrops.delivered == [(queue_id, "ann@local.test"), (queue_id, "bob@local.test")]
    assert len(sink.received) == 1
    assert len(relay.named("delivered")) == 2


def test_what_is_accepted_together_is_delivered_together(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay()

    async def hand_over_at_once() -> None:
        held: list[Any] = []
        accepted, relay.manager.accepted = relay.manager.accepted, held.append  # type: ignore[method-assign]
        try:
            await submit()
        finally:
            relay.manager.accepted = accepted  # type: ignore[method-assign]
        for committed in held:
            accepted(committed)

    async def submit() -> None:
        from tests.store.spools import FACTS, Submission, envelope

        for _ in range(30):
            draft = relay.spool.draft()
            draft.write(CONTENT)
            relay.manager.accepted(await relay.spool.commit(Submission(draft, envelope("a@b.test"), FACTS, TRACE)))

    run(hand_over_at_once)
    relay.wait_empty()
    assert relay.maildrops.batches == [30]


def test_second_mx_is_used_in_the_same_attempt(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay(TWO_MX)
    second = relay.sink("127.0.0.22")
    relay.submit("zoe@there.test")
    relay.wait_empty()
    assert len(second.received) == 1
    assert not relay.named("deferred")
    # The one that was down is remembered: it is not asked again before the other one.
    first = relay.sink("127.0.0.21")
    relay.submit("zoe@there.test")
    relay.wait_empty()
    assert (first.sessions, len(second.received)) == (0, 2)


@pytest.mark.parametrize("refusal", [{"BANNER": "554 5.7.1 no"}, {"BANNER": "421 4.3.2 busy"}, {"EHLO": "DROP"}])
def test_an_mx_that_refuses_the_session_is_passed_over(
    make_relay: Callable[..., Relay], refusal: dict[str, str]
) -> None:
    relay = make_relay(TWO_MX)
    first, second = relay.sink("127.0.0.21", refusal), relay.sink("127.0.0.22")
    relay.submit("zoe@there.test")
    relay.wait_empty()
    assert first.sessions == 1 and len(second.received) == 1


def test_an_mx_that_gives_up_with_421_is_passed_over(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay(TWO_MX)
    first, second = relay.sink("127.0.0.21", {"MAIL": "421 4.3.2 closing"}), relay.sink("127.0.0.22")
    relay.submit("zoe@there.test")
    relay.wait_empty()
    assert first.sessions == 1 and len(second.received) == 1


def test_all_mx_down_is_a_deferral_with_the_waits_of_a_connect_failure(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay(TWO_MX)
    relay.submit("zoe@there.test")
    relay.wait(lambda: relay.named("deferred"))
    (one,) = relay.wait(lambda: relay.manager.counts().in_hand == 0) and relay.queue().values()
    assert one.recipient.attempts == 1 and "4.4.1" in one.recipient.last_reply
    assert 600 <= one.recipient.next_attempt - relay.now() <= 660


def test_a_5yz_greeting_everywhere_is_no_bounce(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay(ONE_MX)
    relay.sink("127.0.0.21", {"BANNER": "554 5.7.1 go away"})
    relay.submit("zoe@there.test")
    relay.wait(lambda: relay.named("deferred"))
    assert not relay.named("failed")


def test_each_recipient_gets_what_it_deserves(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay(ONE_MX)
    script = {"RCPT": {"bad@there.test": "550 5.1.1 unknown", "grey@there.test": "451 4.7.1 Greylisted"}}
    sink = relay.sink("127.0.0.21", script)
    queue_id = relay.submit("ok@there.test", "bad@there.test", "grey@there.test")
    relay.wait(lambda: relay.maildrops.delivered)
    assert sink.received[0].recipients == ("ok@there.test",)
    assert [fields["recipient"] for fields in relay.named("failed")] == ["bad@there.test"]
    (bounced,) = relay.named("bounced")
    assert bounced["queue_id"] == queue_id
    assert relay.maildrops.delivered == [(bounced["report"], "sender@example.org")]
    relay.wait(
        lambda: relay.manager.counts().in_hand == 0
    )  # the outcome of the report itself is recorded a little later
    (left,) = relay.queue().values()
    assert str(left.recipient.forward_path) == "grey@there.test"
    assert 300 <= left.recipient.next_attempt - relay.now() <= 330
    # It goes out when it is due, and not before.
    relay.advance(250)
    assert len(sink.received) == 1
    sink.script["RCPT"] = {}
    relay.advance(100)
    relay.wait_empty()
    assert sink.received[1].recipients == ("grey@there.test",)


def test_failures_of_one_message_share_a_report(make_relay: Callable[..., Relay]) -> None:
    zone = {**ONE_MX, "null.test": {"MX": [[0, "."]]}}
    relay = make_relay(zone, merge_seconds=10.0)
    relay.sink("127.0.0.21", {"RCPT": "550 5.1.1 unknown"})
    relay.submit("a@there.test", "b@gone.test", "c@null.test", "d@there.test")
    relay.wait_empty()
    assert len(relay.named("failed")) == 4
    assert len(relay.named("bounced")) == 1
    codes = sorted(fields["reply"].split()[1] for fields in relay.named("failed"))
    assert codes == ["5.1.1", "5.1.1", "5.1.10", "5.1.2"]


def test_no_report_about_a_report(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay()
    relay.submit("a@gone.test", sender=None)
    relay.wait_empty()
    assert relay.named("failed") and not relay.named("bounced")


@pytest.mark.parametrize("fault", ["SERVFAIL", "TIMEOUT"])
def test_dns_failure_is_a_deferral(make_relay: Callable[..., Relay], fault: str) -> None:
    relay = make_relay({"there.test": fault})
    relay.submit("zoe@there.test")
    relay.wait(lambda: relay.named("deferred"))
    assert "4.4.3" in relay.named("deferred")[0]["reply"]


def test_what_never_works_expires_with_a_report(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay(ONE_MX)
    sink = relay.sink("127.0.0.21", {"RCPT": "451 4.3.0 not today"})
    relay.submit("zoe@there.test")
    attempts = 0
    while not relay.named("expired"):
        attempts += 1
        assert attempts < 60
        relay.wait(lambda n=attempts: len(relay.named("deferred")) + len(relay.named("expired")) == n)
        relay.wait(lambda: relay.manager.counts().in_hand == 0)
        left = relay.queue()
        if "zoe@there.test" in left:
            due = left["zoe@there.test"].recipient.next_attempt
            assert 0 < due - relay.now() <= 4 * 3600
            relay.process.clock = due
            run(relay.manager.look)
    relay.wait_empty()
    assert attempts > 25
    (expired,) = relay.named("expired")
    assert expired["delay_seconds"] == pytest.approx(5 * 86400, abs=60)
    assert relay.named("bounced")[-1]["queue_id"] == expired["queue_id"]
    assert not sink.received


def test_one_connection_serves_what_waits_for_the_site(make_relay: Callable[..., Relay]) -> None:
    zone = {
        **{f"d{n}.test": {"MX": [[10, "mx.there.test"]]} for n in range(5)},
        "mx.there.test": {"A": ["127.0.0.21"]},
    }
    relay = make_relay(zone, connections_per_site=1)
    sink = relay.sink("127.0.0.21")
    relay.submit_many([[f"a@d{n % 5}.test"] for n in range(25)])
    relay.wait_empty()
    assert len(sink.received) == 25
    assert sink.most_open == 1 and sink.sessions <= 3


def test_recipients_of_one_message_for_one_site_share_a_transaction(make_relay: Callable[..., Relay]) -> None:
    zone = {"a.test": {"MX": [[10, "mx.test"]]}, "b.test": {"MX": [[5, "mx.test"]]}, "mx.test": {"A": ["127.0.0.21"]}}
    relay = make_relay(zone)
    sink = relay.sink("127.0.0.21")
    relay.submit("x@a.test", "y@b.test", "z@a.test")
    relay.wait_empty()
    assert [sorted(message.recipients) for message in sink.received] == [["x@a.test", "y@b.test", "z@a.test"]]


def test_bounds_of_connections_messages_and_recipients(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay(
        ONE_MX, connections_per_site=3, messages_per_connection=2, recipients_per_transaction=10, connections=2
    )
    sink = relay.sink("127.0.0.21")
    relay.submit(*(f"u{n}@there.test" for n in range(25)))
    relay.submit_many([["a@there.test"]] * 12)
    relay.wait_empty()
    assert sorted(len(m.recipients) for m in sink.received) == [1] * 12 + [5, 10, 10]
    assert sink.most_open <= 2
    each = [sum(1 for m in sink.received if m.session == n) for n in range(1, sink.sessions + 1)]
    assert max(each) <= 2


def test_many_sites_share_the_connections(make_relay: Callable[..., Relay]) -> None:
    zone = {f"d{n}.test": {"A": [f"127.0.0.{30 + n}"]} for n in range(8)}
    relay = make_relay(zone, connections=2, idle_seconds=30.0)
    sinks = [relay.sink(f"127.0.0.{30 + n}") for n in range(8)]
    relay.submit_many([[f"a@d{n % 8}.test"] for n in range(24)])
    relay.wait_empty()
    assert [len(sink.received) for sink in sinks] == [3] * 8


def test_a_connection_that_died_while_idle_is_replaced(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay(ONE_MX, idle_seconds=30.0, connections_per_site=1)
    sink = relay.sink("127.0.0.21", {"max_messages": 1})
    for _ in range(3):
        relay.submit("zoe@there.test")
        relay.wait_empty()
    assert len(sink.received) == 3 and sink.sessions == 3
    assert not relay.named("deferred")


def test_a_smarthost_takes_everything_and_its_login_fault_is_ours(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay(routing=RoutingSettings(smarthost=Smarthost("127.0.0.21", 0)))
    relay.manager.reconfigure(
        type(relay.manager.settings)(
            routing=RoutingSettings(smarthost=Smarthost("127.0.0.21", relay.port)), client=relay.manager.settings.client
        )
    )
    sink = relay.sink("127.0.0.21")
    relay.submit("a@anywhere.test", "b@elsewhere.test")
    relay.wait_empty()
    assert sorted(sink.received[0].recipients) == ["a@anywhere.test", "b@elsewhere.test"]
    sink.script["MAIL"] = "530 5.7.0 Authentication required"
    relay.submit("a@anywhere.test")
    relay.wait(lambda: relay.named("deferred"))
    assert not relay.named("failed")


def test_an_operator_is_heard_at_once(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay(ONE_MX, connections_per_site=1, first_connections_per_site=1, idle_seconds=0.0)
    sink = relay.sink("127.0.0.21", {"MAIL": "SILENCE"})
    stuck = relay.submit("first@there.test")
    relay.wait(lambda: any(command.startswith("MAIL") for command in sink.commands))
    held, deleted, _ = relay.submit_many([["held@there.test"], ["deleted@there.test"], ["kept@there.test"]])
    relay.wait(lambda: relay.manager.counts().waiting == 3)
    relay.process.hold(QueueFilter(queue_ids=(held,)))
    relay.process.delete(QueueFilter(queue_ids=(deleted,)))
    assert relay.manager.counts().waiting == 1
    sink.script.clear()
    relay.wait(lambda: any(m.recipients == ("kept@there.test",) for m in sink.received))
    relay.wait(lambda: relay.manager.counts().in_hand == 0)
    assert {m.recipients[0] for m in sink.received} <= {"kept@there.test", "first@there.test"}
    assert set(relay.queue()) <= {"held@there.test", "first@there.test"}
    relay.process.unhold(QueueFilter(queue_ids=(held,)))
    relay.wait(lambda: any(m.recipients == ("held@there.test",) for m in sink.received))
    relay.process.retry(QueueFilter(queue_ids=(stuck,)))
    relay.wait_empty()
    taken = sorted(m.recipients[0] for m in sink.received)
    assert taken == ["first@there.test", "held@there.test", "kept@there.test"]


def test_retry_brings_a_deferral_forward(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay(ONE_MX)
    queue_id = relay.submit("zoe@there.test")
    relay.wait(lambda: relay.named("deferred") and relay.manager.counts().in_hand == 0)
    sink = relay.sink("127.0.0.21")
    relay.process.retry(QueueFilter(queue_ids=(queue_id,)))
    relay.wait_empty()
    assert len(sink.received) == 1


def test_memory_is_bounded_and_nothing_is_left_behind(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay(max_recipients_in_memory=20, claim_at_once=7, local_batches=1, local_batch=4)
    relay.maildrops.gate = Deferred()
    most: list[int] = []
    relay.submit_many([[f"u{n}@local.test", f"v{n}@local.test"] for n in range(60)])
    most.append(relay.manager.counts().in_hand)
    assert relay.manager.counts().behind
    gate, relay.maildrops.gate = relay.maildrops.gate, None
    run(lambda: gate.callback(None))
    relay.wait_empty()
    assert max(most) <= 20
    assert len(relay.maildrops.delivered) == len(set(relay.maildrops.delivered)) == 120


def test_content_beyond_the_bound_is_read_from_the_spool(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay(ONE_MX, max_octets_in_memory=1000)
    sink = relay.sink("127.0.0.21")
    content = b"Subject: long\r\n\r\n" + b"x" * 70 + b"\r\n" * 1000
    relay.submit_many([["a@there.test"], ["b@there.test"]], content=content)
    relay.wait_empty()
    assert [m.content for m in sink.received] == [TRACE + content] * 2


def test_mail_that_waited_in_the_database_is_found_at_start(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay(ONE_MX)
    sink = relay.sink("127.0.0.21")
    relay.stop_manager()
    relay.submit("zoe@there.test", "ann@local.test")  # not running: it is given back
    relay.wait(lambda: relay.manager.counts().in_hand == 0)
    run(relay.manager.startService)
    relay._running = True
    relay.wait_empty()
    assert len(sink.received) == 1 and len(relay.maildrops.delivered) == 1


def test_stop_lets_what_runs_finish_and_gives_back_the_rest(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay(ONE_MX, connections_per_site=1, first_connections_per_site=1)
    sink = relay.sink("127.0.0.21", {"DOT": "SILENCE"})
    relay.submit("running@there.test")
    relay.wait(lambda: sink.received)
    relay.submit("waiting@there.test")
    relay.wait(lambda: relay.manager.counts().waiting == 1)
    relay.stop_manager()
    left = relay.queue()
    assert set(left) == {"running@there.test", "waiting@there.test"}
    assert not any(one.owned for one in left.values())
    assert all(one.recipient.attempts == 0 for one in left.values())


def test_local_deferrals_follow_the_schedule(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay()
    full = "452 4.2.2 Mailbox full"
    working, relay.maildrops.outcome = (
        relay.maildrops.outcome,
        lambda each: Outcome(each, RecipientState.QUEUED, full, 0.0, "local"),
    )
    relay.submit("ann@local.test")
    relay.wait(lambda: relay.named("deferred") and relay.manager.counts().in_hand == 0)
    (one,) = relay.queue().values()
    assert 900 <= one.recipient.next_attempt - relay.now() <= 990
    relay.maildrops.outcome = working
    relay.advance(1000)
    relay.wait_empty()


def test_nothing_is_tried_while_outcomes_cannot_be_recorded(make_relay: Callable[..., Relay]) -> None:
    from polarismail.values.errors import Unavailable

    relay = make_relay(ONE_MX, retry_record_seconds=0.1)
    sink = relay.sink("127.0.0.21")
    record, broken = relay.spool.record, [True]

    def failing(*args: Any) -> Any:
        if broken[0]:
            raise Unavailable("the disk is gone")
        return record(*args)

    relay.spool.record = failing  # type: ignore[method-assign]
    relay.submit("one@there.test")
    relay.wait(lambda: relay.manager.counts().suspended)
    relay.submit("two@there.test", "ann@local.test")
    relay.wait(lambda: relay.manager.counts().waiting == 1)
    assert len(sink.received) == 1 and not relay.maildrops.delivered
    broken[0] = False
    relay.wait_empty()
    assert len(sink.received) == 2 and len(relay.maildrops.delivered) == 1


def test_broken_starttls_is_spoken_to_in_plain_text_and_remembered(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay(ONE_MX, idle_seconds=0.0)
    sink = relay.sink("127.0.0.21", {"STAR": "220 2.0.0 go ahead"}, extensions=("PIPELINING", "STARTTLS"))
    relay.submit("zoe@there.test")
    relay.wait_empty()
    assert len(sink.received) == 1 and sink.commands.count("STARTTLS") == 1
    relay.wait(lambda: relay.manager.counts().connections == 0)
    relay.submit("zoe@there.test")
    relay.wait_empty()
    assert len(sink.received) == 2 and sink.commands.count("STARTTLS") == 1
    assert not relay.named("deferred")


def test_the_sender_hears_of_a_long_delay_once(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay(ONE_MX, bad_host_seconds=0.0)
    queue_id = relay.submit("zoe@there.test")
    for attempt in range(1, 5):
        relay.wait(lambda n=attempt: len(relay.named("deferred")) == n and relay.manager.counts().in_hand == 0)
        relay.advance(3 * 3600)
    relay.wait(lambda: len(relay.named("deferred")) == 5 and relay.manager.counts().in_hand == 0)
    assert [fields["queue_id"] for fields in relay.named("bounced")] == [queue_id]
    assert len(relay.maildrops.delivered) == 1


def test_a_report_that_cannot_be_written_makes_the_failure_a_deferral(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay()
    compose = relay.manager._recorder._compose

    async def broken(outcomes: Any) -> Any:
        raise RuntimeError("a defect")

    relay.manager._recorder._compose = broken
    relay.submit("a@gone.test")
    relay.wait(lambda: relay.named("failed") and relay.manager.counts().in_hand == 0)
    (left,) = relay.queue().values()
    assert left.state is RecipientState.QUEUED and left.recipient.next_attempt > relay.now()
    relay.manager._recorder._compose = compose
    relay.advance(3700)
    relay.wait_empty()
    assert len(relay.named("bounced")) == 1


def test_an_outcome_that_the_store_does_not_take_does_not_stop_the_others(make_relay: Callable[..., Relay]) -> None:
    relay = make_relay(retry_record_seconds=0.1)
    record = relay.spool.record

    def picky(outcomes: Any, reports: Any = ()) -> Any:
        if any(str(outcome.recipient.forward_path) == "poison@local.test" for outcome in outcomes):
            raise ValueError("what is this")
        return record(outcomes, reports)

    relay.spool.record = picky  # type: ignore[method-assign]
    relay.submit("a@local.test", "poison@local.test", "b@local.test")
    relay.wait(lambda: relay.manager.counts().in_hand <= 1)
    assert set(relay.queue()) == {"poison@local.test"}
    assert not relay.manager.counts().suspended
