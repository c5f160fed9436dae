# SPDX-License-Identifier: MIT
"""A relay for tests: the real manager on a real spool, a real DNS server, and SMTP sinks on loopback."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import deferLater

from polarismail.net.resolver import Resolver, ResolverSettings
from polarismail.relay.clients import ClientSettings
from polarismail.relay.manager import RelayManager
from polarismail.relay.routing import RoutingSettings
from polarismail.relay.settings import RelaySettings
from polarismail.store.interfaces import Committed, Outcome, QueuedRecipient, Submission
from polarismail.store.queue_operations import QueueFilter
from polarismail.testing import DnsServer, SmtpSink, Zone
from polarismail.values.address import Mailbox
from polarismail.values.envelope import LOCAL, Envelope, Recipient, RecipientState
from tests.reactor import reactor, run
from tests.store.spools import FACTS, SENDER, TRACE, Process

CONTENT = b"Subject: x\r\n\r\n.hello\r\n"
CLIENT = ClientSettings(
    connect_seconds=2, greeting_seconds=2, ehlo_seconds=2, mail_seconds=2, rcpt_seconds=2, data_seconds=2
)


class Maildrops:
    """Local delivery that keeps what it gets. `outcome` may be replaced."""

    def __init__(self) -> None:
        self.delivered: list[tuple[str, str]] = []  # queue id, forward-path
        self.batches: list[int] = []
        self.outcome: Callable[[QueuedRecipient], Outcome] = lambda recipient: Outcome(
            recipient, RecipientState.DELIVERED, "250 2.0.0 delivered", remote="local"
        )
        self.gate: Deferred[None] | None = None

    def deliver(self, recipients: Sequence[QueuedRecipient]) -> Deferred[list[Outcome]]:
        self.batches.append(len(recipients))
        outcomes = [self.outcome(recipient) for recipient in recipients]
        self.delivered += [
            (o.recipient.message.queue_id, str(o.recipient.forward_path))
            for o in outcomes
            if o.state is RecipientState.DELIVERED
        ]
        if self.gate is None:
            return succeed(outcomes)
        answered: Deferred[list[Outcome]] = Deferred()
        self.gate.addCallback(lambda _: answered.callback(outcomes))
        return answered


class Relay:
    """Everything around one manager. Methods block until they are done; call from the test's thread."""

    def __init__(self, directory: Path, zone: Zone | None = None, **settings: Any) -> None:
        self.process = Process(f"sqlite:///{directory}/main.db", directory / "content")
        self.process.clock = time.time()
        self.spool = self.process.spool
        self.dns = DnsServer(zone or {})
        self.sinks: list[SmtpSink] = []
        self.maildrops = Maildrops()
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.zone = self.dns.zone
        self.port = self._free_port()
        dns_port = run(self.dns.listen, reactor)
        resolver = Resolver(
            reactor, ResolverSettings(servers=(("127.0.0.1", dns_port),), timeout_seconds=0.3, tries=1, ipv6=False)
        )
        routing = settings.pop("routing", RoutingSettings(port=self.port, allow_private_targets=True))
        if routing.port == 25:
            routing = evolve(routing, port=self.port, allow_private_targets=True)
        extra = {name: settings.pop(name) for name in ("connect", "bus") if name in settings}
        options = {"routing": routing, "client": CLIENT, "idle_seconds": 0.2, "merge_seconds": 1.0, "stop_seconds": 3.0}
        self.manager = RelayManager(
            reactor,
            self.spool,
            resolver,
            self.maildrops,
            RelaySettings(**{**options, **settings}),
            hostname="relay.test",
            compose=self._compose,
            record_event=lambda name, fields: self.events.append((name, fields)),
            now=self.now,
            random=random.Random(1),
            **extra,
        )
        run(self.manager.startService)
        self._running = True

    def now(self) -> float:
        return self.process.clock

    @staticmethod
    def _free_port() -> int:
        probe = SmtpSink()
        port = run(probe.listen, reactor)
        run(probe.stop)
        return port

    async def _compose(self, outcomes: Sequence[Outcome]) -> Submission | None:
        message = outcomes[0].recipient.message
        draft = self.spool.draft()
        lines = [f"{o.recipient.forward_path} {o.state.name} {o.reply}" for o in outcomes]
        draft.write("\r\n".join(["Subject: report", "", message.queue_id, *lines, ""]).encode())
        to = message.reverse_path
        assert to is not None
        return Submission(draft, Envelope(None, (Recipient(to, to, LOCAL, 1),)), FACTS, b"")

    def sink(self, address: str, script: dict[str, Any] | None = None, **options: Any) -> SmtpSink:
        """A remote server on the relay's port, at this loopback address."""
        sink = SmtpSink(script=script or {}, hostname=f"sink-{address}", **options)
        run(sink.listen, reactor, address, self.port)
        self.sinks.append(sink)
        return sink

    def submit(
        self, *addresses: str, sender: Mailbox | None = SENDER, content: bytes = CONTENT, hand_over: bool = True
    ) -> str:
        """Commit a message and hand it to the manager, as reception does; returns its queue id."""
        return self.submit_many([addresses], sender=sender, content=content, hand_over=hand_over)[0]

    def submit_many(
        self,
        messages: Sequence[Sequence[str]],
        sender: Mailbox | None = SENDER,
        content: bytes = CONTENT,
        hand_over: bool = True,
    ) -> list[str]:
        async def submit() -> list[str]:
            queue_ids = []
            for addresses in messages:
                boxes = [Mailbox.parse(address) for address in addresses]
                recipients = tuple(
                    Recipient(b, b, LOCAL, 1) if b.domain == "local.test" else Recipient(b, b, b.domain) for b in boxes
                )
                draft = self.spool.draft()
                draft.write(content)
                committed = await self.spool.commit(Submission(draft, Envelope(sender, recipients), FACTS, TRACE))
                assert isinstance(committed, Committed)
                queue_ids.append(committed.message.queue_id)
                if hand_over:
                    self.manager.accepted(committed)
            return queue_ids

        return run(submit)

    def wait(self, condition: Callable[[], Any], what: str = "", seconds: float = 50) -> Any:
        """Until the condition holds, looked at on the reactor's thread."""

        async def look() -> Any:
            for _ in range(int(seconds / 0.02)):
                found = condition()
                if isinstance(found, Deferred):
                    found = await found
                if found:
                    return found
                await deferLater(reactor, 0.02, lambda: None)
            raise AssertionError(f"waited in vain: {what}; {self.events[-5:]} {self.manager.counts()}")

        return run(look)

    def queue(self) -> dict[str, Any]:
        """Open recipients by forward-path."""
        return {
            str(one.recipient.forward_path): one
            for entry in self.process.select(QueueFilter())
            for one in entry.recipients
        }

    def wait_empty(self) -> None:
        """Until the spool holds nothing."""

        async def is_empty() -> bool:
            counts = await self.spool.counts()
            return counts.messages == 0

        self.wait(lambda: Deferred.fromCoroutine(is_empty()), "an empty spool")

    def named(self, name: str) -> list[dict[str, Any]]:
        """Fields of the events with this name."""
        return [fields for event, fields in self.events if event == name]

    def advance(self, seconds: float) -> None:
        """Shift the wall clock, and look."""
        self.process.clock += seconds
        run(self.manager.look)

    def stop_manager(self) -> None:
        if self._running:
            self._running = False
            run(self.manager.stopService)

    def stop(self) -> None:
        self.stop_manager()
        for sink in self.sinks:
            run(sink.stop)
        run(self.dns.stop)
        self.process.stop()
