# SPDX-License-Identifier: MIT
"""What the relay holds in memory: who is in hand, and who is ready to go to which site, within bounds.

Guarantees
    A recipient is in hand once: one that is claimed again while an attempt is under way (its operator meddled) is not
    tried twice at once, and the attempt's outcome goes to its newest owner's epoch. New mail goes before retries. The
    recipients of one message for one site come out together. Recipients and octets in memory are counted.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Set

from attrs import define, evolve, field

from polarismail.store.interfaces import QueuedMessage, QueuedRecipient
from polarismail.store.lru import LruCache

Key = tuple[str, int]  # queue id, number of the recipient


def key_of(recipient: QueuedRecipient) -> Key:
    """What names a recipient, whatever its epoch."""
    return (recipient.message.queue_id, recipient.number)


@define(eq=False)
class Item:
    """One recipient that waits for a connection, or is on one. `since`: reactor seconds; `sessions`: how many it had
    in this attempt."""

    recipient: QueuedRecipient
    since: float
    sessions: int = 0

    @property
    def message(self) -> QueuedMessage:
        return self.recipient.message


class Hand:
    """Every recipient that this process has claimed and not yet recorded or released."""

    def __init__(self, max_recipients: int, max_octets: int) -> None:
        self._max_recipients, self._max_octets = max_recipients, max_octets
        self._newest: dict[Key, QueuedRecipient] = {}
        self._members: dict[str, int] = {}  # by queue id: recipients in hand
        self._open: dict[str, int] = {}  # by queue id: those of them without an outcome
        self._octets: dict[str, int] = {}
        self.octets = 0

    def __len__(self) -> int:
        return len(self._newest)

    def __contains__(self, key: Key) -> bool:
        return key in self._newest

    @property
    def room(self) -> int:
        """How many more recipients may be taken."""
        return self._max_recipients - len(self._newest)

    def keep(self, recipients: Iterable[QueuedRecipient]) -> list[QueuedRecipient]:
        """Take recipients in hand; returns those that were not there before, which are the ones to try.

        Content beyond the bound on octets is let go: it will be read from the spool.
        """
        fresh = []
        messages: dict[str, QueuedMessage] = {}
        for recipient in recipients:
            message = recipient.message
            queue_id = message.queue_id
            if message.inline is not None and queue_id not in self._octets:
                if self.octets + len(message.inline) <= self._max_octets:
                    self._octets[queue_id] = len(message.inline)
                    self.octets += len(message.inline)
                else:
                    if queue_id not in messages:
                        messages[queue_id] = evolve(message, inline=None)
                    recipient = evolve(recipient, message=messages[queue_id])
            key = (queue_id, recipient.number)
            is_fresh = key not in self._newest
            self._newest[key] = recipient
            if is_fresh:
                self._members[queue_id] = self._members.get(queue_id, 0) + 1
                self._open[queue_id] = self._open.get(queue_id, 0) + 1
                fresh.append(recipient)
        return fresh

    def newest(self, recipient: QueuedRecipient) -> QueuedRecipient:
        """The recipient as it was last claimed."""
        return self._newest.get((recipient.message.queue_id, recipient.number), recipient)

    def decided(self, queue_id: str) -> bool:
        """One recipient of the message has its outcome; returns whether none without one is left in hand."""
        left = self._open.get(queue_id, 0) - 1
        if left > 0:
            self._open[queue_id] = left
            return False
        self._open.pop(queue_id, None)
        return True

    def is_open(self, queue_id: str) -> bool:
        """Whether some recipient of the message is in hand without an outcome."""
        return queue_id in self._open

    def drop(self, recipient: QueuedRecipient) -> None:
        """Recorded or released: out of hand."""
        queue_id = recipient.message.queue_id
        if self._newest.pop((queue_id, recipient.number), None) is None:
            return
        left = self._members[queue_id] - 1
        if left:
            self._members[queue_id] = left
            return
        del self._members[queue_id]
        self._open.pop(queue_id, None)
        self.octets -= self._octets.pop(queue_id, 0)

    def everyone(self) -> list[QueuedRecipient]:
        """Every recipient in hand, as last claimed."""
        return list(self._newest.values())


class ReadyQueue:
    """Items for one site, grouped by message; new mail first, and in either class what came first."""

    def __init__(self) -> None:
        self._fresh: OrderedDict[str, deque[Item]] = OrderedDict()
        self._retries: OrderedDict[str, deque[Item]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def messages(self) -> int:
        """How many transactions wait, at least."""
        return len(self._fresh) + len(self._retries)

    @property
    def has_fresh(self) -> bool:
        """Whether new mail waits."""
        return bool(self._fresh)

    def put(self, item: Item) -> None:
        """Append an item."""
        groups = self._retries if item.recipient.attempts else self._fresh
        group = groups.get(item.message.queue_id)
        if group is None:
            group = groups[item.message.queue_id] = deque()
        group.append(item)
        self._count += 1

    def take(self, limit: int) -> list[Item]:
        """The items of the next message, at most `limit`; what is left of it comes next. Empty where nothing waits."""
        for groups in (self._fresh, self._retries):
            if groups:
                queue_id, group = next(iter(groups.items()))
                taken = [group.popleft() for _ in range(min(limit, len(group)))]
                if not group:
                    del groups[queue_id]
                self._count -= len(taken)
                return taken
        return []

    def drop(self, queue_ids: Set[str] | None) -> list[Item]:
        """Remove and return the items of these messages; None: all of them."""
        dropped: list[Item] = []
        for groups in (self._fresh, self._retries):
            for queue_id in list(groups) if queue_ids is None else [each for each in groups if each in queue_ids]:
                dropped.extend(groups.pop(queue_id))
        self._count -= len(dropped)
        return dropped


class HostMemory:
    """Hosts that failed not long ago, bounded; keys are of the caller's choice."""

    def __init__(self, seconds: Callable[[], float], lasts_seconds: float, entries: int = 10_000) -> None:
        self._seconds, self._lasts = seconds, lasts_seconds
        self._since: LruCache[object, float] = LruCache(entries)

    def add(self, key: object) -> None:
        """Remember from now on."""
        self._since.put(key, self._seconds())

    def forget(self, key: object) -> None:
        """It is well again."""
        self._since.drop(key)

    def __contains__(self, key: object) -> bool:
        since = self._since.get(key)
        return since is not None and 0 <= self._seconds() - since < self._lasts


@define
class Counts:
    """What the relay does now, for operators."""

    in_hand: int = 0
    octets: int = 0
    connections: int = 0
    sites: int = 0
    waiting: int = 0
    local: int = 0
    behind: bool = False
    suspended: bool = False
    by_site: dict[str, tuple[int, int]] = field(factory=dict)  # site -> (waiting, connections)
