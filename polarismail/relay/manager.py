# SPDX-License-Identifier: MIT
"""The service that brings accepted mail onwards: into maildrops of ours, to other hosts, or back as a DSN.

Guarantees
    New mail is tried at once, when reception says `accepted`; retries when they are due, by one timer and no polling.
    Every recipient in hand ends as delivered, relayed, failed, expired, deferred to a time, or given back; no recipient
    is tried twice at once. What an operator holds, deletes or retries while it waits in memory is let go at once.
    Memory is bounded: what is beyond waits in the database. While outcomes cannot be recorded nothing new is tried.
Never
    A decision of policy, or a word to a client. RFC 5321 §4.5.4.1, §6.1.
"""

from __future__ import annotations

import random as randomness
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from attrs import evolve
from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList, DeferredLock
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from polarismail.net.bus import Bus
from polarismail.relay.greylisting import Greylist
from polarismail.relay.handover import HandOver
from polarismail.relay.maildrops import Maildrops
from polarismail.relay.mx import Lookup
from polarismail.relay.pieces import Pieces
from polarismail.relay.queue import Counts, Hand, Item
from polarismail.relay.recorder import Compose, Recorder
from polarismail.relay.routing import Router
from polarismail.relay.session import connect as connect_session
from polarismail.relay.settings import RelaySettings
from polarismail.relay.sites import Connect, Sites, Verdict
from polarismail.relay.verdicts import describe, judge
from polarismail.store.interfaces import Committed, Outcome, QueuedRecipient
from polarismail.values.envelope import EXPANSION, LOCAL, RecipientState
from polarismail.values.events import RecordEvent
from polarismail.values.reply import ALIAS_EXPANDED, TRY_AGAIN, Reply, parse_rendered

_SOON_SECONDS = 1.0
"""Least distance of two looks for due mail of which nothing came."""
_FRESH_SHARE = 0.1
"""This part of the memory is kept free for mail that comes in: retries do not take it."""
_BUSY_SECONDS = 1.0
"""So long after new mail there is probably more, which goes before retries."""
_CLAIM_REST = 4.0
"""While there is new mail, so many times as long as it took to claim some due mail the rest stays where it is."""


class RelayManager(Service):
    """See the module. `now` is the wall clock (a test may shift it); durations are the reactor's.

    `greylist` lives as long as the manager does; reception asks it through `check`.
    `local.deliver(recipients)` fires with outcomes; `compose` makes DSNs. Start it behind the spool, stop it before.
    """

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        spool: Any,
        resolver: Lookup,
        local: Any,
        settings: RelaySettings,
        *,
        hostname: str,
        compose: Compose,
        record_event: RecordEvent,
        now: Callable[[], float],
        random: randomness.Random,
        connect: Connect = connect_session,
        greylist: Greylist | None = None,
        bus: Bus | None = None,
        connection_limit: Callable[[int], int] | None = None,
    ) -> None:
        """`bus`: to the other workers, where there are any; `connection_limit`: see Sites."""
        self._reactor, self._spool = reactor, spool
        self._hostname, self._record_event, self._now, self._random = hostname, record_event, now, random
        self.settings, self.greylist = settings, greylist
        self._pieces = Pieces(reactor, self._settle, self._is_busy)
        self._accepted_at = float("-inf")
        self._router = Router(resolver, self._own_routing(settings), random, reactor.seconds)
        self._hand = Hand(settings.max_recipients_in_memory, settings.max_octets_in_memory)
        self._sites = Sites(
            reactor,
            self._router,
            settings,
            evolve(settings.client, hostname=hostname),
            connect=connect,
            read=spool.read,
            settle=self._pieces.put,
            limit=connection_limit,
        )
        self.handover: HandOver | None = None
        if bus is not None:
            self.handover = HandOver(
                reactor, bus, spool, self._hand, self._sites, take=self._take_over, forget=self._forget, look=self.look
            )
            self._sites.returned = self.handover.put
        self._send_on = self._sites.put if self.handover is None else self.handover.put
        self._recorder = Recorder(
            reactor,
            spool,
            self._hand,
            self,
            compose=compose,
            record_event=record_event,
            now=now,
            merge_seconds=settings.merge_seconds,
            retry_seconds=settings.retry_record_seconds,
        )
        self._outcomes: list[Outcome] = []  # of this turn
        self._recording: Any = None
        self._finding: dict[str, list[Item]] = {}  # by next hop, while its site is looked up
        self._maildrops = Maildrops(reactor, local.deliver, settings, self._settle_local)
        self._listens = False
        self._timer: Any = None
        self._timer_due = 0.0
        self._looking = self._look_again = self._look_failing = self._behind = self._closing = False
        self._to_release: list[QueuedRecipient] = []
        self._releasing = DeferredLock()

    # -- life ----------------------------------------------------------------------------------------------------------

    def startService(self) -> None:
        """Take work: first what is due already."""
        super().startService()
        self._closing = False
        self._recorder.start()
        self._resume()
        if not self._listens:
            self._listens = True
            self._spool.on_operator_change(self.operator_changed)
            self._spool.when_removed(self._removed)
        self.look()

    async def _stop(self) -> None:
        self._pause()
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        if self.handover is not None:
            self.handover.stop()
        self._let_go(self._take_waiting(None))
        self._pieces.finish()
        self._record()
        self._recorder.flush()
        running = DeferredList([self._sites.when_stopped(), self._maildrops.when_idle()])
        await _at_most(self._reactor, running, self.settings.stop_seconds)
        self._closing = True
        self._sites.abort()
        await _at_most(self._reactor, self._sites.when_stopped(), _SOON_SECONDS)
        self._pieces.finish()
        self._record()
        self._recorder.flush()
        await _at_most(self._reactor, self._recorder.when_idle(), self.settings.stop_seconds)
        self._recorder.stop()
        if self.greylist is not None:
            await _at_most(self._reactor, self.greylist.stop(), self.settings.stop_seconds)
        await _at_most(self._reactor, self._release(self._hand.everyone()), self.settings.stop_seconds)

    def stopService(self) -> Deferred[None]:
        """Take no more work, let what is under way finish for `stop_seconds`, give back the rest. Never fails."""
        super().stopService()
        return Deferred.fromCoroutine(self._stop()).addErrback(
            lambda failure: self.log.failure("the relay did not stop in good order", failure)
        )

    def reconfigure(self, settings: RelaySettings) -> None:
        """New routes, waits and limits, for attempts that begin from now on."""
        self.settings = self._sites.settings = self._maildrops.settings = settings
        self._sites.client = evolve(settings.client, hostname=self._hostname)
        self._router.settings = self._own_routing(settings)

    def _own_routing(self, settings: RelaySettings) -> Any:
        return evolve(settings.routing, own_names=settings.routing.own_names | {self._hostname.lower()})

    # -- work comes in -------------------------------------------------------------------------------------------------

    def accepted(self, committed: Committed) -> None:
        """Fresh mail is on stable storage and ours: try it now. Where memory is full, it is left to the database."""
        self._accepted_at = self._reactor.seconds()
        if committed.recipients:
            self._take_over(committed.recipients)
        else:  # held for the future: nobody's until then
            self._wake_at(committed.message.options.hold_until)

    def operator_changed(self, action: str = "", recipients: Sequence[tuple[str, int]] | None = None) -> None:
        """An operator retries, holds or deletes these (queue id, number): what of them waits in memory is let go, and
        the database is asked what is due. None: everything may have changed."""
        changed = None if recipients is None else {queue_id for queue_id, _ in recipients}
        if changed is None or changed:
            self._let_go(self._take_waiting(changed))
        self.look()

    def look(self) -> None:
        """Ask the database for due mail, now."""
        if self._looking:
            self._look_again = True
        elif self.running:
            self._looking = True
            Deferred.fromCoroutine(self._look()).addErrback(self._look_failed)

    @property
    def connections(self) -> int:
        """Outgoing connections that are open, or being opened."""
        return self._sites.connections

    def more_connections(self) -> None:
        """There may be more of them than before."""
        self._sites.more_connections()

    def counts(self) -> Counts:
        """What is in memory now."""
        return Counts(
            in_hand=len(self._hand),
            octets=self._hand.octets,
            connections=self._sites.connections,
            sites=len(self._sites.overview()),
            waiting=len(self._sites) + sum(map(len, self._finding.values())) + len(self.handover or ()),
            local=len(self._maildrops),
            behind=self._behind,
            suspended=self._recorder.suspended,
            by_site=self._sites.overview(),
        )

    def _is_busy(self) -> bool:
        return bool(0 <= self._reactor.seconds() - self._accepted_at < _BUSY_SECONDS)

    def _claim_room(self) -> int:
        return self._hand.room - int(self.settings.max_recipients_in_memory * _FRESH_SHARE)

    async def _look(self) -> None:
        try:
            while self.running and not self._recorder.suspended:
                self._look_again = False
                if self._to_release:
                    await self._release([])  # what could not be given back before
                room = self._claim_room()
                if room <= 0:
                    self._behind = True  # asked again when there is room
                    break
                wanted = min(room, self.settings.claim_at_once)
                began = self._reactor.seconds()
                claimed = await self._spool.claim(self._now(), wanted, self.settings.schedule.longest_wait_seconds)
                self._look_failing = False
                if not self.running:
                    self._give_back(claimed)
                    break
                self._take(claimed)
                if len(claimed) < wanted and not self._look_again:
                    self._wake_at(await self._spool.next_due())
                    break
                if self._is_busy():  # new mail needs the disk, too
                    took = self._reactor.seconds() - began
                    await deferLater(self._reactor, min(took * _CLAIM_REST, _SOON_SECONDS))
        finally:
            self._looking = False

    def _look_failed(self, failure: Failure) -> None:
        if not self._look_failing:
            self.log.warn("due mail cannot be claimed: {problem}", problem=failure.getErrorMessage())
        self._look_failing = True
        self._wake_at(self._now() + self.settings.retry_record_seconds)

    def _wake_at(self, due: float | None) -> None:
        """Look again when something is due; sooner or later all the same, should the clock have jumped."""
        if not self.running:
            return
        delay = self.settings.look_seconds
        if due is not None:
            left = due - self._now()
            delay = min(delay, left if left > 0 else _SOON_SECONDS)
        when = self._reactor.seconds() + delay
        if self._timer is not None and self._timer.active():
            if self._timer_due <= when:
                return
            self._timer.cancel()
        self._timer, self._timer_due = self._reactor.callLater(delay, self.look), when

    def _take(self, recipients: Iterable[QueuedRecipient]) -> None:
        """Into hand, and on the way."""
        found: list[str] = []
        for recipient in self._hand.keep(recipients):
            if recipient.next_hop == LOCAL:
                self._maildrops.put(recipient)
                continue
            if recipient.next_hop == EXPANSION:
                self._settle_local([Outcome(recipient, RecipientState.EXPANDED, str(ALIAS_EXPANDED))])
                continue
            item, next_hop = Item(recipient, self._reactor.seconds()), recipient.next_hop
            waiting = self._finding.get(next_hop)
            if waiting is not None:
                waiting.append(item)
            elif (destination := self._router.known(next_hop)) is not None:
                self._send_on(destination, [item])
            else:
                self._finding[next_hop] = [item]
                found.append(next_hop)
        for next_hop in found:
            Deferred.fromCoroutine(self._find(next_hop)).addErrback(
                lambda failure: self.log.failure("a route could not be taken", failure)
            )

    async def _find(self, next_hop: str) -> None:
        try:
            destination = await self._router.find(next_hop)
        except Exception:
            self.log.failure("no route to {next_hop}, for an unexpected reason", next_hop=next_hop)
            destination = TRY_AGAIN
        items = self._finding.pop(next_hop, [])
        if not items:
            return
        if isinstance(destination, Reply):
            self._pieces.put(Verdict(items, [destination] * len(items), ""))
        else:
            self._send_on(destination, items)

    def _take_over(self, recipients: Sequence[QueuedRecipient]) -> None:
        """These are ours now: just accepted, or another's until now. Where memory is full, it is left to the database."""
        if not self.running or len(recipients) > self._hand.room:
            self._behind = True
            self._give_back(recipients)
        else:
            self._take(recipients)

    def _forget(self, recipients: Sequence[QueuedRecipient]) -> None:
        """Out of hand: they are another worker's."""
        closed = [each.message.queue_id for each in recipients if self._hand.decided(each.message.queue_id)]
        for recipient in recipients:
            self._hand.drop(recipient)
        for queue_id in closed:
            self._recorder.close_message(queue_id)

    # -- verdicts ------------------------------------------------------------------------------------------------------

    def _settle(self, verdict: Verdict) -> None:
        """Judge, log, record."""
        now, seconds = self._now(), self._reactor.seconds()
        outcomes, returned = [], []
        for item, reply in zip(verdict.items, verdict.replies, strict=True):
            if self._closing and reply.is_transient:
                returned.append(item.recipient)  # cut by ourselves: that was no attempt
                continue
            outcome = judge(
                item.recipient,
                reply,
                remote=verdict.remote,
                now=now,
                luck=self._random.random(),
                settings=self.settings.schedule,
                is_explicit=verdict.is_explicit,
                is_final=verdict.is_final,
                passes_dsn=verdict.passes_dsn,
            )
            waited = max(0.0, seconds - item.since - verdict.sending_seconds)
            self._record_event(*describe(outcome, now, waited, verdict.sending_seconds))
            outcomes.append(outcome)
        if returned:
            self._let_go(returned)
        self._outcomes += outcomes
        if self._recording is None:
            # The verdicts of one turn of the reactor are recorded together: each by itself costs as much as its judgement.
            self._recording = self._reactor.callLater(0, self._record)

    def _record(self) -> None:
        if self._recording is not None:
            if self._recording.active():
                self._recording.cancel()
            self._recording = None
            outcomes, self._outcomes = self._outcomes, []
            self._recorder.put(outcomes)

    def _settle_local(self, outcomes: list[Outcome]) -> None:
        """Log and record what became of local deliveries; when to try again is the schedule's."""
        now = self._now()
        judged = [outcome if outcome.state.is_final else self._judge_local(outcome, now) for outcome in outcomes]
        for outcome in judged:
            self._record_event(*describe(outcome, now))
        self._recorder.put(judged)

    def _judge_local(self, outcome: Outcome, now: float) -> Outcome:
        return judge(
            outcome.recipient,
            parse_rendered(outcome.reply),
            remote=outcome.remote,
            now=now,
            luck=self._random.random(),
            settings=self.settings.schedule,
            is_final=False,
        )

    def recorded(self, outcomes: Sequence[Outcome], committed: Sequence[Committed]) -> None:
        """The recorder's word: these are on stable storage, and these DSNs are fresh mail."""
        due: float | None = None
        for outcome in outcomes:
            self._hand.drop(outcome.recipient)
            if outcome.state is RecipientState.QUEUED and (due is None or outcome.next_attempt < due):
                due = outcome.next_attempt
        for report in committed:
            self.accepted(report)
        if due is not None:
            self._wake_at(due)
        if self._behind and self._claim_room() >= min(
            self.settings.claim_at_once, self.settings.max_recipients_in_memory // 2
        ):
            self._behind = False
            self.look()

    def _removed(self, queue_ids: Sequence[str]) -> None:
        for queue_id in queue_ids:
            self._record_event("removed", {"queue_id": queue_id})

    def suspended(self) -> None:
        """The recorder's word: the spool cannot be written, so nothing new is tried."""
        self._pause()

    def resumed(self) -> None:
        """The recorder's word: the spool can be written again."""
        if self.running:
            self._resume()
            self.look()

    def _pause(self) -> None:
        self._sites.pause()
        self._maildrops.pause()

    def _resume(self) -> None:
        self._sites.start()
        self._maildrops.start()

    # -- giving back ---------------------------------------------------------------------------------------------------

    def _take_waiting(self, queue_ids: set[str] | None) -> list[QueuedRecipient]:
        """Out of every line: the recipients of these messages (None: all) that nobody works on."""
        taken = self._maildrops.drop(queue_ids)
        taken += [item.recipient for item in self._sites.drop(queue_ids)]
        for next_hop, items in self._finding.items():
            kept = [] if queue_ids is None else [item for item in items if item.message.queue_id not in queue_ids]
            if len(kept) != len(items):
                taken += [item.recipient for item in items if item not in kept]
                self._finding[next_hop] = kept
        if self.handover is not None:
            taken += self.handover.drop(queue_ids)
        return taken

    def _let_go(self, recipients: Sequence[QueuedRecipient]) -> None:
        """Out of hand, back to the database, untried."""
        newest = [self._hand.newest(recipient) for recipient in recipients]
        self._forget(recipients)
        self._give_back(newest)

    def _give_back(self, recipients: Iterable[QueuedRecipient]) -> None:
        self._to_release += recipients
        if self._to_release:
            Deferred.fromCoroutine(self._release([])).addCallback(lambda _: self.look())

    async def _release(self, more: Sequence[QueuedRecipient]) -> None:
        self._to_release += more
        async with self._releasing:
            recipients, self._to_release = self._to_release, []
            if not recipients:
                return
            try:
                await self._spool.release(recipients)
            except Exception as problem:
                self.log.warn("claimed mail cannot be given back yet: {problem}", problem=str(problem))
                if self.running:
                    self._to_release += recipients
                    self._wake_at(self._now() + self.settings.retry_record_seconds)


async def _at_most(reactor: Any, event: Any, seconds: float) -> None:
    """Wait for the event, but not longer."""
    over: Deferred[None] = Deferred()
    timer = reactor.callLater(seconds, over.callback, None)

    def done(_: object) -> None:
        if timer.active():
            timer.cancel()
            over.callback(None)

    waited = event if isinstance(event, Deferred) else Deferred.fromCoroutine(event)
    waited.addBoth(done)
    await over
