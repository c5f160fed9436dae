# SPDX-License-Identifier: MIT
"""LMTP: what a session does otherwise where our own front ends hand mail over.

Guarantees: the end of the content has one reply for each RCPT that was accepted, in their order, for duplicates too and for
addresses that stand for several recipients (RFC 2033 §4.2, §4.3); a reply is positive only if all recipients behind it were
taken.
"""

from __future__ import annotations

from twisted.internet.defer import Deferred

from polarismail.serve.smtp_context import SmtpContext
from polarismail.serve.smtp_session import SmtpSession
from polarismail.values.address import Mailbox
from polarismail.values.envelope import MailOptions, Recipient
from polarismail.values.reply import Reply
from polarismail.wire import smtp_events


class LmtpSession(SmtpSession):
    """See the module."""

    def __init__(self, context: SmtpContext) -> None:
        super().__init__(context)
        self._accepted: list[tuple[Recipient, ...]] = []  # what each successful RCPT stands for
        self._judged: tuple[Recipient, ...] = ()  # the recipients of the message whose end is to be answered

    def _mail_checked(
        self, result: Reply | tuple[Reply, MailOptions], event: smtp_events.Mail
    ) -> Deferred[None] | None:
        self._accepted = []
        return super()._mail_checked(result, event)

    def _rcpt_checked(self, result: tuple[Reply, tuple[Recipient, ...]]) -> Deferred[None] | None:
        reply, recipients = result
        if reply.is_positive:
            self._accepted.append(recipients)
        return super()._rcpt_checked(result)

    def _open_draft(self) -> Reply | None:
        self._judged = self._envelope.recipients
        return super()._open_draft()

    def _ended(self, reply: Reply | tuple[Reply, ...], event: smtp_events.EndOfData) -> Deferred[None] | None:
        accepted, self._accepted = self._accepted, []
        if isinstance(reply, tuple):
            by_path = {each.forward_path: answer for each, answer in zip(self._judged, reply, strict=True)}
            *first, last = [_worst(by_path, recipients) for recipients in accepted]
        else:
            first, last = [reply] * (len(accepted) - 1), reply
        for each in first:
            self._connection.send(each.octets)
        return super()._ended(last, event)


def _worst(by_path: dict[Mailbox, Reply], recipients: tuple[Recipient, ...]) -> Reply:
    """4yz before all, so that the client comes again: a copy too many is better than one too few."""
    answers = [by_path[recipient.forward_path] for recipient in recipients]
    return min(answers, key=lambda reply: 0 if reply.is_transient else 1 if reply.is_permanent else 2)
