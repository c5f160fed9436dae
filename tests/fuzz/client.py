# SPDX-License-Identifier: MIT
"""The client's engine against a next hop that says anything: whole and in slices, through several transactions.

The input: two octets (cuts; how many recipients), then what the next hop says, in turns that 0xFF separates: it says a turn
when the client has nothing more to send.

What must hold: nothing raises; slices do not matter; each recipient has exactly one verdict in the end; nobody is told that
a message was taken whose end was not sent behind a 354, or that the server had not accepted the recipient of; lines are
never longer than the bound allows.
"""

from __future__ import annotations

from polarismail.values.reply import Reply
from polarismail.wire.smtp_client import Answered, Broken, Finished, SendContent, SmtpClient, Step, Transaction
from tests.fuzz.slicing import Choices, cut

_GONE = Reply(451, (4, 4, 2), "gone")


def check(octets: bytes) -> None:
    """Raises where a promise is broken."""
    choices = Choices(octets)
    cuts, count = choices.octet(), choices.octet() % 4 + 1
    turns = choices.rest().split(b"\xff")
    whole = _play(turns, count, None)
    assert _play(turns, count, cuts) == whole


def _play(turns: list[bytes], count: int, cuts: int | None) -> tuple[list[object], bytes]:
    """The verdicts of every transaction, and all that was sent."""
    client = SmtpClient("client.example")
    verdicts: list[object] = []
    sent, dotted, ended = b"", False, False
    transaction: Transaction | None = None
    for turn in turns:
        pieces = [turn] if cuts is None else cut(turn, cuts)
        for piece in pieces:
            client.receive(piece)
        # Only then: a client that writes between two slices of what it did not ask for may be right either way.
        while not ended and (event := client.next_event()) is not None:
            if isinstance(event, SendContent):
                assert transaction is not None and transaction.accepted
                sent += client.output() + client.content(b".x\r\n") + client.end_content()
                dotted = True
            elif isinstance(event, Broken):
                ended = True
                assert (event.transaction is not None) == (transaction is not None)
            elif isinstance(event, Finished):
                assert event.transaction is transaction
                _judge(transaction, dotted, verdicts)
                transaction = None
            elif isinstance(event, Answered) and event.step is Step.GREETING and event.reply.is_positive:
                client.ehlo()
            if event is not None and client.is_idle and transaction is None and not isinstance(event, Broken):
                transaction, dotted = Transaction(b"<>", [b"<%d@x.example>" % at for at in range(count)]), False
                client.begin(transaction)
        sent += client.output()
        if ended:
            break
    else:
        client.lost(_GONE)
    if transaction is not None:
        _judge(transaction, dotted, verdicts)
    return verdicts, sent


def _judge(transaction: Transaction | None, dotted: bool, verdicts: list[object]) -> None:
    assert transaction is not None and len(transaction.verdicts) == len(transaction.recipients)
    for at, verdict in enumerate(transaction.verdicts):
        assert verdict is not None, "a recipient without a verdict"
        assert not verdict.is_positive or (dotted and at in transaction.accepted), "a yes to nothing"
    verdicts += [(verdict.code, verdict.text) for verdict in transaction.verdicts if verdict is not None]
