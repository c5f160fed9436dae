# SPDX-License-Identifier: MIT
"""Whatever the remote side does, each recipient ends in exactly one way, and none is tried twice at once.

The remote side is made of dice, because its every mood cannot be had from sockets; the spool, its database, the resolver's
answers and the operator are real.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import deferLater

from polarismail.relay.clients import ConnectFailed, RemoteHost
from polarismail.store.queue_operations import QueueFilter
from polarismail.values.envelope import RecipientState
from polarismail.values.reply import Reply
from tests.reactor import reactor
from tests.relay.relays import Relay

YES = Reply(250, (2, 0, 0), "taken")
NO = Reply(550, (5, 1, 1), "unknown")
LATER = Reply(451, (4, 7, 1), "Greylisted")
CLOSING = Reply(421, (4, 3, 2), "closing")
LOST = Reply(451, (4, 4, 2), "Lost the connection")
CROWDED = Reply(452, (4, 5, 3), "Too many recipients")
ZONE = {
    "one.test": {"MX": [[10, "mx1.test"], [20, "mx2.test"]]},
    "two.test": {"MX": [[10, "mx1.test"], [20, "mx2.test"]]},
    "lone.test": {"MX": [[10, "mx3.test"]]},
    "broken.test": "SERVFAIL",
    "null.test": {"MX": [[0, "."]]},
    **{f"mx{n}.test": {"A": [f"127.0.0.{40 + n}"]} for n in (1, 2, 3)},
}
DOMAINS = ("one.test", "two.test", "lone.test", "broken.test", "null.test", "gone.test", "local.test")


class Remote:
    """Every host of the Internet. Keeps what it took, and who is on a connection now."""

    def __init__(self, dice: random.Random, gloom: float) -> None:
        self.dice, self.gloom = dice, gloom
        self.taken: Counter[tuple[str, str]] = Counter()
        self.on_the_way: set[tuple[str, str]] = set()
        self.twice_at_once = False

    async def connect(self, _: Any, host: RemoteHost, *args: Any, **options: Any) -> FakeSession:
        await deferLater(reactor, self.dice.random() * 0.004, lambda: None)
        if self.dice.random() < self.gloom:
            permanent = self.dice.random() < 0.2
            raise ConnectFailed(self.dice.choice([LATER, CLOSING, LOST, Reply(554, (5, 7, 1), "no")]), permanent)
        return FakeSession(self, host)


class FakeSession:
    def __init__(self, remote: Remote, host: RemoteHost) -> None:
        self.remote, self.host = remote, host
        self.usable, self.stale, self.transactions, self.tls = True, False, 0, ""
        self.max_recipients = self.max_transactions = 1000
        self.extensions: dict[str, str] = {}

    def describe(self) -> str:
        return str(self.host)

    def quit(self) -> Deferred[None]:
        self.usable = False
        return succeed(None)

    def abort(self) -> None:
        self.usable = False

    async def _send(self, message: Any, recipients: Any) -> list[Reply]:
        remote, dice = self.remote, self.remote.dice
        assert self.usable
        self.transactions += 1
        keys = [(message.queue_id, str(each.forward_path)) for each in recipients]
        remote.twice_at_once |= bool(remote.on_the_way & set(keys)) or len(set(keys)) != len(keys)
        remote.on_the_way |= set(keys)
        await deferLater(reactor, dice.random() * 0.004, lambda: None)
        remote.on_the_way -= set(keys)
        if dice.random() < remote.gloom / 2:
            self.usable = False
            self.stale = self.transactions > 1 and dice.random() < 0.5
            return [dice.choice([CLOSING, LOST])] * len(recipients)
        replies = [dice.choice([NO, LATER, CROWDED]) if dice.random() < remote.gloom else YES for _ in recipients]
        for key, reply in zip(keys, replies, strict=True):
            remote.taken[key] += reply.is_positive
        return replies

    def send(self, message: Any, recipients: Any, read: Any) -> Deferred[list[Reply]]:
        return Deferred.fromCoroutine(self._send(message, recipients))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.lists(st.sampled_from(DOMAINS), min_size=1, max_size=6), min_size=1, max_size=8),
    st.integers(0, 1 << 30),
    st.sampled_from([0.0, 0.2, 0.6]),
    st.booleans(),
)
def test_each_recipient_ends_once(messages: list[list[str]], seed: int, gloom: float, meddles: bool) -> None:
    dice = random.Random(seed)
    remote = Remote(dice, gloom)
    with tempfile.TemporaryDirectory() as directory:
        relay = Relay(
            Path(directory),
            ZONE,
            connect=remote.connect,
            idle_seconds=0.0,
            merge_seconds=0.05,
            max_recipients_in_memory=12,
            claim_at_once=5,
            recipients_per_transaction=3,
        )
        try:
            _live(relay, remote, messages, dice, meddles)
        finally:
            relay.stop()


def _live(relay: Relay, remote: Remote, messages: list[list[str]], dice: random.Random, meddles: bool) -> None:
    wanted = [[f"u{m}n{n}@{domain}" for n, domain in enumerate(domains)] for m, domains in enumerate(messages)]
    queue_ids = relay.submit_many(wanted)
    everyone = {(queue_id, one) for queue_id, addresses in zip(queue_ids, wanted, strict=True) for one in addresses}
    held: set[str] = set()
    for day in range(8):
        if meddles and day < 3:
            chosen = dice.choice(queue_ids)
            relay.process.hold(QueueFilter(queue_ids=(chosen,)))
            held.add(chosen)
            if dice.random() < 0.5:
                relay.process.unhold(QueueFilter(queue_ids=(chosen,)))
                held.discard(chosen)
            relay.process.retry(QueueFilter())
        for _ in range(4):
            relay.wait(lambda: _is_quiet(relay), "quiet")
            relay.advance(86400 / 4)
    relay.wait(lambda: _is_quiet(relay), "quiet")
    assert not remote.twice_at_once

    ended: Counter[tuple[str, str]] = Counter()
    for name in ("delivered", "relayed", "failed", "expired"):
        for fields in relay.named(name):
            if (fields["queue_id"], fields["recipient"]) in everyone:
                ended[(fields["queue_id"], fields["recipient"])] += 1
    left = {
        (entry.message.queue_id, str(one.recipient.forward_path)): one.state
        for entry in relay.process.select(QueueFilter())
        for one in entry.recipients
    }
    for key in everyone:
        if key in left:
            assert left[key] is RecipientState.HELD and key[0] in held, (key, left[key])
            assert key not in ended
        else:
            assert ended[key] == 1, (key, ended[key])
    assert max([*remote.taken.values(), 0]) <= 1
    delivered = [key for key in relay.maildrops.delivered if key in everyone]
    assert len(delivered) == len(set(delivered))
    # Every failure and expiry is in a report, and only those.
    told = Counter(fields["queue_id"] for fields in relay.named("bounced"))
    failed = {f["queue_id"] for name in ("failed", "expired") for f in relay.named(name)} & set(queue_ids)
    warned = {f["queue_id"] for f in relay.named("deferred")}
    assert failed <= set(told) <= failed | warned
    reports = [one for one in relay.maildrops.delivered if one not in everyone]
    assert len(reports) + len([f for f in relay.named("relayed") if f["queue_id"] not in queue_ids]) <= sum(
        told.values()
    )


def _is_quiet(relay: Relay) -> Any:
    """Nothing in hand, and nothing due."""

    async def look() -> bool:
        if relay.manager.counts().in_hand:
            return False
        due = await relay.spool.next_due()
        return (due is None or due > relay.now()) and not relay.manager.counts().in_hand

    return Deferred.fromCoroutine(look())
