# SPDX-License-Identifier: MIT
"""What the relay holds in memory."""

from __future__ import annotations

from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from polarismail.relay.queue import Hand, HostMemory, Item, ReadyQueue, key_of
from polarismail.store.interfaces import QueuedMessage, QueuedRecipient
from polarismail.values.address import Mailbox
from polarismail.values.envelope import MailOptions

SENDER = Mailbox("a", "example.org")


def recipient(
    queue_id: str, number: int = 0, *, attempts: int = 0, epoch: int = 1, inline: bytes | None = None
) -> QueuedRecipient:
    message = QueuedMessage(queue_id, SENDER, 1000.0, 10, inline=inline)
    path = Mailbox(f"r{number}", "example.net")
    return QueuedRecipient(message, number, path, path, "example.net", None, attempts, 1000.0, 2000.0, epoch)


def test_new_mail_goes_first_and_messages_stay_together() -> None:
    queue = ReadyQueue()
    for each in (recipient("old", 0, attempts=3), recipient("new1", 0), recipient("new2", 0), recipient("new1", 1)):
        queue.put(Item(each, 0.0))
    assert (len(queue), queue.messages) == (4, 3)
    taken = []
    while batch := queue.take(100):
        taken.append([key_of(item.recipient) for item in batch])
    assert taken == [[("new1", 0), ("new1", 1)], [("new2", 0)], [("old", 0)]]
    assert len(queue) == 0 and queue.take(1) == []


def test_a_message_with_many_recipients_comes_in_pieces() -> None:
    queue = ReadyQueue()
    for number in range(250):
        queue.put(Item(recipient("m", number), 0.0))
    assert [len(queue.take(100)) for _ in range(4)] == [100, 100, 50, 0]


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1)), max_size=60),
    st.integers(1, 5),
    st.sets(st.integers(0, 4)),
)
def test_nothing_is_lost_and_nothing_comes_twice(puts: list[tuple[int, int]], limit: int, dropped: set[int]) -> None:
    queue = ReadyQueue()
    for number, (message, attempts) in enumerate(puts):
        queue.put(Item(recipient(f"m{message}", number, attempts=attempts), 0.0))
    gone = queue.drop([f"m{number}" for number in dropped])
    seen = [key_of(item.recipient) for item in gone]
    assert {queue_id for queue_id, _ in seen} <= {f"m{number}" for number in dropped}
    while batch := queue.take(limit):
        assert len(batch) <= limit
        assert len({item.message.queue_id for item in batch}) == 1
        assert batch[0].message.queue_id not in {f"m{number}" for number in dropped}
        seen += [key_of(item.recipient) for item in batch]
    assert sorted(seen) == sorted((f"m{message}", number) for number, (message, _) in enumerate(puts))
    assert len(queue) == 0


def test_one_that_is_in_hand_is_not_tried_again_but_its_epoch_is_known() -> None:
    hand = Hand(10, 1000)
    first = recipient("m", epoch=1)
    assert hand.keep([first]) == [first]
    again = evolve(first, epoch=5)
    assert hand.keep([again]) == []
    assert hand.newest(first) is again
    assert len(hand) == 1 and hand.room == 9
    hand.drop(first)
    assert len(hand) == 0 and hand.newest(first) is first


def test_octets_in_memory_are_bounded() -> None:
    hand = Hand(10, 100)
    message = QueuedMessage("big", SENDER, 0.0, 80, inline=b"x" * 80)
    pair = [evolve(recipient("big", number), message=message) for number in range(2)]
    assert all(each.message.inline for each in hand.keep(pair))
    assert hand.octets == 80  # once for the message, not for each recipient
    more = hand.keep([evolve(recipient("more"), message=evolve(message, queue_id="more"))])
    assert more[0].message.inline is None and hand.octets == 80
    hand.drop(pair[0])
    assert hand.octets == 80
    hand.drop(pair[1])
    assert hand.octets == 0


def test_the_last_outcome_of_a_message_is_noticed() -> None:
    hand = Hand(10, 100)
    hand.keep([recipient("m", 0), recipient("m", 1), recipient("n", 0)])
    assert not hand.decided("m") and hand.is_open("m")
    assert hand.decided("m") and not hand.is_open("m")
    assert hand.is_open("n")


def test_bad_hosts_are_forgotten() -> None:
    clock = Clock()
    memory = HostMemory(clock.seconds, 120, entries=2)
    memory.add("a")
    clock.advance(119)
    assert "a" in memory and "b" not in memory
    clock.advance(2)
    assert "a" not in memory
    for name in ("b", "c", "d"):
        memory.add(name)
    assert "b" not in memory and "d" in memory
    memory.forget("d")
    assert "d" not in memory


def urgent(queue_id: str, priority: int, since: float = 0.0) -> Item:
    plain = recipient(queue_id)
    return Item(evolve(plain, message=evolve(plain.message, options=MailOptions(priority=priority))), since)


def test_a_higher_priority_goes_first() -> None:
    queue = ReadyQueue()
    for at, (name, priority) in enumerate((("b", 0), ("z", -3), ("a", 5), ("c", 0), ("d", 5))):
        queue.put(urgent(name, priority, at))
    assert queue.messages == 5
    taken = [queue.take(9)[0].message.queue_id for _ in range(5)]
    assert taken == ["a", "d", "b", "c", "z"] and not queue.take(9)


def test_nobody_starves_behind_higher_priorities() -> None:
    queue = ReadyQueue()
    queue.put(urgent("low", -9, 0.0))
    for at in range(100):
        queue.put(urgent(f"high{at}", 9, 1.0 + at))
    order = [queue.take(1)[0].message.queue_id for _ in range(101)]
    assert order.index("low") == 8
    assert [name for name in order if name != "low"] == [f"high{at}" for at in range(100)]
