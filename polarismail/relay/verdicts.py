# SPDX-License-Identifier: MIT
"""From a next hop's reply to what is recorded about the recipient: done, failed, expired, or tried again at a time.

Pure: the reply, the recipient's history, the time and one random number decide. RFC 5321 §4.5.4.1.
"""

from __future__ import annotations

from typing import Any

from polarismail.relay.classify import classify, is_failure
from polarismail.relay.schedule import ScheduleSettings, next_attempt, should_warn
from polarismail.store.interfaces import Outcome, QueuedRecipient
from polarismail.values.envelope import NO_DSN_REQUEST, RecipientState
from polarismail.values.reply import Reply

_EVENTS = {
    RecipientState.QUEUED: "deferred",
    RecipientState.DELIVERED: "delivered",
    RecipientState.RELAYED: "relayed",
    RecipientState.EXPANDED: "expanded",
    RecipientState.FAILED: "failed",
    RecipientState.EXPIRED: "expired",
}

_QUEUED = RecipientState.QUEUED
_REPORTED = (RecipientState.FAILED, RecipientState.EXPIRED)
_SUCCESSES = (RecipientState.DELIVERED, RecipientState.RELAYED, RecipientState.EXPANDED)


def judge(
    recipient: QueuedRecipient,
    reply: Reply,
    *,
    remote: str,
    now: float,
    luck: float,
    settings: ScheduleSettings,
    is_explicit: bool = False,
    is_final: bool | None = None,
    passes_dsn: bool = False,
) -> Outcome:
    """What became of one attempt.

    `is_explicit`: the route is the operator's (see `classify.is_failure`). `is_final=False`: the reply is about a
    connection, not about the mail; not even a 5yz fails it. `passes_dsn`: the next hop was told what NOTIFY asks.
    """
    if reply.is_positive:
        return Outcome(recipient, RecipientState.RELAYED, str(reply), remote=remote, passed_dsn=passes_dsn)
    if is_failure(reply, explicit_route=is_explicit) if is_final is None else (is_final and reply.is_permanent):
        return Outcome(recipient, RecipientState.FAILED, str(reply), remote=remote)
    due = next_attempt(
        classify(reply), recipient.attempts, now=now, expires=recipient.expires, luck=luck, settings=settings
    )
    if due is None:
        return Outcome(recipient, RecipientState.EXPIRED, str(reply), remote=remote)
    warn = should_warn(recipient.message.released, now, warned=recipient.warned, settings=settings)
    return Outcome(recipient, RecipientState.QUEUED, str(reply), next_attempt=due, remote=remote, warned=warn)


def needs_report(outcome: Outcome) -> bool:
    """Whether the sender must hear of it: a failure, an expiry, a long delay, a success where NOTIFY asks for it; never
    behind a null reverse-path."""
    if outcome.warned or outcome.state in _REPORTED:
        return outcome.recipient.message.reverse_path is not None
    # Nearly every outcome ends here: the mail that asks for nothing.
    return outcome.recipient.dsn is not NO_DSN_REQUEST and is_owed_success(outcome)


def is_owed_success(outcome: Outcome) -> bool:
    """Whether this is a success that only we can report (RFC 3461 §5.2.2, §5.2.3): delivered here, expanded here, or relayed to
    one who knows nothing of DSN."""
    recipient = outcome.recipient
    return (
        outcome.state in _SUCCESSES
        and not outcome.passed_dsn
        and recipient.dsn.wants("SUCCESS")
        and recipient.message.reverse_path is not None
    )


def describe(outcome: Outcome, now: float, waited: float = 0.0, sending: float = 0.0) -> tuple[str, dict[str, Any]]:
    """The event's name and fields, as `record_event` takes them: one for each attempt for each recipient."""
    recipient = outcome.recipient
    message = recipient.message
    fields: dict[str, Any] = {
        "queue_id": message.queue_id,
        "recipient": str(recipient.forward_path),
        "relay": outcome.remote,
        "delay_seconds": round(max(0.0, now - message.created), 3),
        "reply": outcome.reply,
    }
    if recipient.original is not recipient.forward_path and recipient.original != recipient.forward_path:
        fields["original"] = str(recipient.original)
    if waited or sending:
        fields["waited_seconds"], fields["sending_seconds"] = round(waited, 3), round(sending, 3)
    if outcome.state is _QUEUED:
        fields["next_attempt"] = outcome.next_attempt
        fields["attempts"] = recipient.attempts + 1
    return _EVENTS.get(outcome.state, "deferred"), fields
