# SPDX-License-Identifier: MIT
"""From outcomes to the DSN that tells their sender: one for what is recorded of a message together, committed with it.

RFC 5321 §4.5.5 and §6.1 (null reverse-path, never a report about a report), RFC 3461 §5.2 (NOTIFY), RFC 6533 §4 (a sender
beyond ASCII), RFC 6710 §4.6 (the priority of the message).

Guarantees: no report is written for a null reverse-path, nor for a sender of ours who does not exist, nor about a recipient
for whom none was wanted. A sender of ours gets it in the maildrop, by way of the directory as any mail.
Raises Unavailable, and writes nothing, when directory or spool cannot answer now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from polarismail.message.report import (
    DELAYED,
    DELIVERED,
    EXPANDED,
    FAILED,
    MAX_RETURNED_OCTETS,
    RELAYED,
    Fate,
    Subject,
    status_report,
)
from polarismail.message.trace import received_field
from polarismail.policy.relaying import expand_recipient
from polarismail.relay.verdicts import is_owed_success
from polarismail.store.interfaces import IDirectory, ISpool, Outcome, QueuedMessage, Submission
from polarismail.values.address import Mailbox
from polarismail.values.envelope import (
    LOCAL,
    NO_OPTIONS,
    Envelope,
    MailOptions,
    Recipient,
    RecipientState,
    SessionFacts,
)
from polarismail.values.errors import BadReply, Unavailable
from polarismail.values.reply import parse_rendered

# The name under which reports enter the spool, where mail has its listener's.
LISTENER = "bounces"
_EXPIRED_STATUS = "4.4.7"  # RFC 3463 §3.5: delivery time expired
_GENERAL = {FAILED: "5.0.0", DELAYED: "4.0.0"}
_FACTS = SessionFacts(listener=LISTENER, protocol="")


class Bounces:
    """Writes DSNs. `compose` is what the relay's recorder asks. `life_seconds`: how long a report is tried."""

    log = Logger()

    def __init__(
        self,
        spool: ISpool,
        directory: IDirectory,
        *,
        hostname: str,
        now: Callable[[], float],
        life_seconds: float = 86_400.0,
    ) -> None:
        self._spool, self._directory = spool, directory
        self._hostname, self._now, self._life_seconds = hostname, now, life_seconds

    async def compose(self, outcomes: Sequence[Outcome]) -> Submission | None:
        """The report about outcomes of one message; None where nobody is to be told. Raises Unavailable."""
        reported = [outcome for outcome in outcomes if is_reported(outcome)]
        if not reported:
            return None
        message = reported[0].recipient.message
        sender = message.reverse_path
        if sender is None:
            return None
        recipients = await self._find(sender)
        if not recipients:
            self.log.warn("{queue_id}: no report, its sender does not exist here", queue_id=message.queue_id)
            return None
        now = self._now()
        subject = Subject(
            queue_id=message.queue_id,
            arrived=message.created,
            size=message.size,
            head=await self._head(message),
            headers_only=message.ret == "HDRS",
            envid=message.envid,
            smtputf8=message.smtputf8,
        )
        smtputf8 = not sender.local.isascii()
        if not smtputf8:
            sender = sender.in_ascii
        draft = self._spool.draft()
        try:
            content = status_report(
                hostname=self._hostname,
                queue_id=draft.queue_id,
                reverse_path=sender,
                subject=subject,
                fates=[_fate(outcome, now) for outcome in reported],
                now=now,
                # A maildrop takes anything; a foreign next hop may not, and nobody would hear of that.
                allows_8bit=all(recipient.next_hop == LOCAL for recipient in recipients),
                smtputf8=smtputf8,
            )
            waiting = draft.write(content)
            if waiting is not None:
                await waiting
        except BaseException:
            draft.abandon()
            raise
        priority = message.options.priority
        return Submission(
            draft=draft,
            envelope=Envelope(
                None,
                recipients,
                body=None if content.isascii() else "8BITMIME",
                smtputf8=smtputf8,
                options=MailOptions(priority=priority) if priority else NO_OPTIONS,
            ),
            facts=_FACTS,
            trace=received_field(_FACTS, self._hostname, draft.queue_id, sender, now),
            expires_seconds=self._life_seconds,
        )

    async def _find(self, sender: Mailbox) -> tuple[Recipient, ...]:
        """Where the sender's mail goes: foreign, or maildrops of ours; empty for a sender who does not exist."""
        resolution = self._directory.resolve(sender)
        if isinstance(resolution, Deferred):
            resolution = await resolution
        return expand_recipient(resolution, sender) if sender.domain or resolution.ours else ()

    async def _head(self, message: QueuedMessage) -> bytes:
        if message.inline is not None:
            return message.inline[:MAX_RETURNED_OCTETS]
        head = b""
        while len(head) < min(message.size, MAX_RETURNED_OCTETS):
            try:
                piece = await self._spool.read(message, len(head), MAX_RETURNED_OCTETS - len(head))
            except Unavailable as problem:
                # A file that is broken stays so. A database that cannot answer refuses the report's commit as well.
                self.log.warn(
                    "{queue_id}: its report goes without it: {why}", queue_id=message.queue_id, why=str(problem)
                )
                break
            if not piece:
                break  # it was cut short by a fault: the report goes out all the same
            head += piece
        return head


def is_reported(outcome: Outcome) -> bool:
    """Whether the sender is to hear of this outcome (RFC 3461 §4.1): failures, expiries and long delays, unless NOTIFY
    says otherwise; successes where it says so and nobody else can."""
    dsn = outcome.recipient.dsn
    if outcome.state in (RecipientState.FAILED, RecipientState.EXPIRED):
        return dsn.wants("FAILURE")
    if outcome.state is RecipientState.QUEUED:
        return outcome.warned and dsn.wants("DELAY")
    return is_owed_success(outcome)


_ACTIONS = {
    RecipientState.QUEUED: DELAYED,
    RecipientState.DELIVERED: DELIVERED,
    RecipientState.RELAYED: RELAYED,
    RecipientState.EXPANDED: EXPANDED,
}


def _fate(outcome: Outcome, now: float) -> Fate:
    recipient, expired = outcome.recipient, outcome.state is RecipientState.EXPIRED
    action = _ACTIONS.get(outcome.state, FAILED)
    return Fate(
        forward_path=recipient.forward_path,
        original=recipient.original,
        action=action,
        status=_EXPIRED_STATUS if expired else _status(outcome.reply, action),
        diagnostic=outcome.reply or ("delivery time expired" if expired else "no reason was given"),
        remote="" if outcome.remote == LOCAL else outcome.remote,
        orcpt=recipient.dsn.orcpt,
        last_attempt=now,
        retry_until=recipient.expires if action == DELAYED else None,
        expired=expired,
    )


def _status(reply: str, action: str) -> str:
    """The enhanced status of the reply, where it had one that fits the action; else the general one."""
    general = _GENERAL.get(action, "2.0.0")
    try:
        dotted = parse_rendered(reply).dotted
    except BadReply:
        return general
    return dotted if (dotted[0] == "2") == (general[0] == "2") else general
