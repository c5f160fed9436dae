# SPDX-License-Identifier: MIT
"""The full history of a run and the verdict on it: what was promised, what became of it, and why anything came twice.

`History` is written by clients (tests/crash/load.py), by the remote (remote.py) and by whoever cuts, kills or breaks.
`Places` is where mail can be at the end. `judge` compares the two by DURABILITY's invariants; it knows nothing of how the
faults were made, so that any test that crashes servers can use it.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from enum import Enum

from attrs import define, field, frozen

# What may stand above the content that a client sent.
_OUR_FIELDS = (b"return-path", b"delivered-to", b"received")


class Answer(Enum):
    """How the end of data was answered."""

    NONE = "no reply to the final dot"  # in doubt: a client would send it again
    UNSENT = "the final dot was never sent"
    YES = "250"
    LATER = "4yz"
    NO = "5yz"


@define
class Message:
    """One mail transaction of one client. Each is sent once: what a client would repeat is counted, not repeated."""

    number: int
    reverse_path: str
    octets: int
    bare: bool = False  # some lines end in a bare LF on the way in
    refused: bool = False  # holds what must be refused for good
    recipients: list[str] = field(factory=list)  # those with a 250
    strangers: list[str] = field(factory=list)  # those with a 5yz
    answer: Answer = Answer.UNSENT
    queue_id: str = ""
    moment: float = 0.0  # when the answer was read

    def content(self, seed: int) -> bytes:
        """What a reader must find, with CRLF line ends. The same for the same seed."""
        pool = hashlib.shake_128(f"{seed}/{self.number}".encode()).hexdigest(max(self.octets, 80) // 2).encode()
        lines = [pool[at : at + 76] for at in range(0, len(pool), 76)]
        lines[::7] = [b"." + line[1:] for line in lines[::7]]
        lines[3::31] = [b"Gr\xc3\xbc\xc3\x9fe: " + line for line in lines[3::31]]
        head = b"From: <%s>\r\nSubject: %d\r\nX-Crash: %d\r\n\r\n" % (
            self.reverse_path.encode(),
            self.number,
            self.number,
        )
        return head + b"\r\n".join(lines) + b"\r\n"


@frozen
class Copy:
    """A delivered message for one recipient.

    At the remote: `moment`, when it was taken, by the monotonic clock, and `faults`, how many there had been when its
    session began. (A session that gets as far as content had a living server; the moment may be noted after its death.)
    """

    number: int
    recipient: str
    problem: str = ""  # how its octets differ from what was sent
    moment: float = 0.0
    faults: int = 0


@define
class Places:
    """Where mail is at the end."""

    maildirs: list[Copy] = field(factory=list)
    remote: list[Copy] = field(factory=list)
    reports: Counter[tuple[int, str]] = field(factory=Counter)  # failed, by number and recipient
    delays: int = 0
    queued: set[tuple[str, str]] = field(factory=set)  # queue id, recipient


@define
class History:
    """All that was said and done, in one run on one file system."""

    seed: int
    messages: dict[int, Message] = field(factory=dict)
    taken: list[Copy] = field(factory=list)
    faults: list[float] = field(factory=list)
    acknowledged: int = 0  # so far

    def begin(self, reverse_path: str, octets: int, *, bare: bool = False, refused: bool = False) -> Message:
        """A new message, with a number of its own."""
        message = Message(len(self.messages) + 1, reverse_path, octets, bare, refused)
        self.messages[message.number] = message
        return message

    def compare(self, octets: bytes) -> tuple[int, str]:
        """(number, how it differs from what was sent) of octets with CRLF line ends; number 0: not one of ours."""
        at = octets.find(b"\r\nX-Crash: ")
        number = octets[at + 11 : at + 31].split(b"\r")[0]
        message = self.messages.get(int(number)) if at >= 0 and number.isdigit() else None
        if message is None:
            return 0, "unknown"
        expected = message.content(self.seed)
        if not octets.endswith(expected):
            return message.number, f"octets differ, {len(octets)} for {len(expected)} and our trace fields"
        for line in octets[: -len(expected)].split(b"\r\n")[:-1]:
            name = line.partition(b":")[0].lower()
            if line[:1] not in (b" ", b"\t") and name not in _OUR_FIELDS:
                return message.number, f"a line that nobody sent: {line[:60]!r}"
        return message.number, ""


@define
class Verdict:
    """What a run showed. `failures` is empty where every promise was kept."""

    failures: list[str] = field(factory=list)
    lost: int = 0
    acknowledged: int = 0  # messages
    promises: int = 0  # (message, recipient)
    delivered: int = 0
    relayed: int = 0
    reported: int = 0
    queued: int = 0
    duplicates: Counter[str] = field(factory=Counter)
    longest_open_seconds: float = (
        0.0  # from a final dot at the remote to the fault that came before its outcome was durable
    )

    def add(self, other: Verdict) -> None:
        """Count another run's in."""
        self.failures += other.failures
        for name in ("lost", "acknowledged", "promises", "delivered", "relayed", "reported", "queued"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.duplicates += other.duplicates
        self.longest_open_seconds = max(self.longest_open_seconds, other.longest_open_seconds)


# The classes of duplicates that DURABILITY allows.
UNANSWERED = "the client got no reply, yet it was accepted"
PUT_OFF = "the client got 4yz in doubt, yet it was accepted"
REMOTE_TWICE = "the remote's 250 was not yet recorded: sent again"
REMOTE_AND_REPORT = "the remote's 250 was not yet recorded: expired instead"


def judge(history: History, places: Places, *, open_seconds: float = 5.0) -> Verdict:
    """Every invariant, over the whole history. `open_seconds`: what the remote took may be unrecorded for so long."""
    verdict = Verdict()
    found: dict[tuple[int, str], list[str]] = defaultdict(list)
    for where, copies in (("maildir", places.maildirs), ("remote", places.remote)):
        for copy in copies:
            if copy.problem:
                verdict.failures.append(f"{where}: message {copy.number} for {copy.recipient}: {copy.problem}")
            found[copy.number, copy.recipient].append(where)
    for (number, recipient), count in places.reports.items():
        found[number, recipient] += ["report"] * count
    for message in history.messages.values():
        _judge_message(message, found, places, verdict, history.faults)
    _judge_repetitions(history, found, places, verdict, open_seconds)
    known = {(message.number, each) for message in history.messages.values() for each in message.recipients}
    for key in found.keys() - known:
        if key[1] not in getattr(history.messages.get(key[0]), "strangers", ()):
            verdict.failures.append(f"message {key[0]} for {key[1]}, which nobody sent: {found[key]}")
    verdict.delivered = len(places.maildirs)
    verdict.relayed = len(places.remote)
    verdict.reported = sum(places.reports.values())
    verdict.queued = len(places.queued)
    return verdict


def _judge_message(
    message: Message,
    found: dict[tuple[int, str], list[str]],
    places: Places,
    verdict: Verdict,
    faults: list[float],
) -> None:
    there = {each for each in message.recipients if (message.number, each) in found}
    there |= {each for each in message.recipients if (message.queue_id, each) in places.queued}
    missing = set(message.recipients) - there
    refused = [each for each in message.strangers if (message.number, each) in found]
    if refused:
        verdict.failures.append(f"message {message.number} delivered to {refused}, who had been refused")
    name = f"message {message.number} ({message.queue_id or 'no queue id'}, {message.octets} octets)"
    if message.answer is Answer.YES:
        verdict.acknowledged += 1
        verdict.promises += len(message.recipients)
        verdict.lost += len(missing)
        if missing:
            before = [fault - message.moment for fault in faults if fault >= message.moment][:1]
            verdict.failures.append(
                f"LOST: {name} for {sorted(missing)}; is there for {sorted(there)}; answered {before} s before a fault"
            )
    elif message.answer in (Answer.NO, Answer.UNSENT):
        if there:
            verdict.failures.append(f"{name} had the answer {message.answer.value!r}, yet is there for {sorted(there)}")
    elif there:
        verdict.duplicates[UNANSWERED if message.answer is Answer.NONE else PUT_OFF] += 1
        if missing:
            verdict.failures.append(f"HALVED: {name}, unanswered: there for {sorted(there)}, not for {sorted(missing)}")


def _judge_repetitions(
    history: History,
    found: dict[tuple[int, str], list[str]],
    places: Places,
    verdict: Verdict,
    open_seconds: float,
) -> None:
    copies: dict[tuple[int, str], list[Copy]] = defaultdict(list)
    for copy in places.remote:
        copies[copy.number, copy.recipient].append(copy)
    for (number, recipient), wheres in found.items():
        if len(wheres) == 1:
            continue
        name = f"message {number} for {recipient}: {wheres}"
        taken = sorted(copies.get((number, recipient), ()), key=lambda copy: copy.moment)
        if len(wheres) - len(taken) > 1 or not taken:
            verdict.failures.append(f"TWICE, where that must never be: {name}")
            continue
        # All copies at the remote but the last, which a report may follow too, were followed by a fault soon enough.
        for at, copy in enumerate(taken if "report" in wheres else taken[:-1]):
            is_last = at + 1 == len(taken)
            if copy.faults >= len(history.faults) or (not is_last and taken[at + 1].faults == copy.faults):
                verdict.failures.append(f"TWICE, and no fault in between: {name}")
                continue
            open_for = max(0.0, history.faults[copy.faults] - copy.moment)
            verdict.longest_open_seconds = max(verdict.longest_open_seconds, open_for)
            if open_for > open_seconds:
                verdict.failures.append(f"TWICE, unrecorded for {open_for:.1f} s before the fault: {name}")
            else:
                verdict.duplicates[REMOTE_AND_REPORT if is_last else REMOTE_TWICE] += 1
