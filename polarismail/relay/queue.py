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


_PATIENCE = 8
"""So many messages go before one that came earlier, because of their priority; then it is its turn."""


class _Line:
    """Messages of one class by priority (RFC 6710 §5.1): the highest first and in it what came first, but nobody starves."""

    __slots__ = ("_ahead", "_by_priority")

    def __init__(self) -> None:
        self._by_priority: dict[int, OrderedDict[str, deque[Item]]] = {}
        self._ahead = 0  # messages that went before one that came earlier

    def __len__(self) -> int:
        return sum(map(len, self._by_priority.values()))

    def __bool__(self) -> bool:
        return bool(self._by_priority)

    def put(self, item: Item) -> None:
        message = item.recipient.message
        groups = self._by_priority.get(message.options.priority)
        if groups is None:
            groups = self._by_priority[message.options.priority] = OrderedDict()
        group = groups.get(message.queue_id)
        if group is None:
            group = groups[message.queue_id] = deque()
        group.append(item)

    def take(self, limit: int) -> list[Item]:
        priority = next(iter(self._by_priority)) if len(self._by_priority) == 1 else self._choose()
        groups = self._by_priority[priority]
        queue_id, group = next(iter(groups.items()))
        taken = [group.popleft() for _ in range(min(limit, len(group)))]
        if not group:
            del groups[queue_id]
            if not groups:
                del self._by_priority[priority]
        return taken

    def _choose(self) -> int:
        highest = max(self._by_priority)
        oldest = min(self._by_priority, key=self._since)
        if oldest == highest or self._ahead >= _PATIENCE:
            self._ahead = 0
            return oldest
        self._ahead += 1
        return highest

    def _since(self, priority: int) -> float:
        return next(iter(self._by_priority[priority].values()))[0].since

    def drop(self, queue_ids: Set[str] | None) -> list[Item]:
        dropped: list[Item] = []
        for priority, groups in list(self._by_priority.items()):
            for queue_id in list(groups) if queue_ids is None else [each for each in groups if each in queue_ids]:
                dropped.extend(groups.pop(queue_id))
            if not groups:
                del self._by_priority[priority]
        return dropped


class ReadyQueue:
    """Items for one site, grouped by message; new mail first, in either class by priority, and then what came first."""

    def __init__(self) -> None:
        self._fresh, self._retries = _Line(), _Line()
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
        (self._retries if item.recipient.attempts else self._fresh).put(item)
        self._count += 1

    def take(self, limit: int) -> list[Item]:
        """The items of the next message, at most `limit`; what is left of it comes next. Empty where nothing waits."""
        line = self._fresh or self._retries
        taken = line.take(limit) if line else []
        self._count -= len(taken)
        return taken

    def drop(self, queue_ids: Set[str] | None) -> list[Item]:
        """Remove and return the items of these messages; None: all of them."""
        dropped = self._fresh.drop(queue_ids) + self._retries.drop(queue_ids)
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
