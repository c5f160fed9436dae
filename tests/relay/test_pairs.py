# SPDX-License-Identifier: MIT
"""Who owns a pair: one member, the same for everybody; who goes takes only its own pairs along."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from polarismail.relay.pairs import Ownership, owner_of, pair_of
from polarismail.relay.wrapping import unwrap, wrap
from polarismail.store.interfaces import QueuedMessage, QueuedRecipient
from polarismail.values.address import Mailbox
from polarismail.values.envelope import NO_DSN_REQUEST, NO_OPTIONS, DsnRequest, MailOptions

PAIRS = [pair_of("", f"mx{at}.example.org:25") for at in range(3000)]


@given(st.text(max_size=30), st.frozensets(st.integers(0, 63), min_size=1))
def test_the_owner_is_a_member_and_does_not_depend_on_who_asks(site: str, members: frozenset[int]) -> None:
    owners = set()
    for own in members:
        ownership = Ownership(own)
        ownership.change(1, members)
        owners.add(ownership.owner(pair_of("", site)))
    assert len(owners) == 1 and owners <= members


def test_pairs_are_spread_and_only_those_of_who_goes_move() -> None:
    before = {pair: owner_of(pair, range(4)) for pair in PAIRS}
    assert min(Counter(before.values()).values()) > len(PAIRS) / 4 * 0.8
    after = {pair: owner_of(pair, (0, 1, 3)) for pair in PAIRS}
    assert all(after[pair] == owner for pair, owner in before.items() if owner != 2)


def test_nobody_owns_before_the_members_are_known_and_old_words_change_nothing() -> None:
    ownership = Ownership(2)
    assert ownership.owner("a") is None
    ownership.change(3, {0, 1})
    assert ownership.owner("a") is None  # not among them yet
    ownership.change(5, {2})
    ownership.change(4, {0, 1, 2})
    assert ownership.owner("a") == 2 and ownership.version == 5


OCTETS = st.one_of(st.none(), st.binary(max_size=200))
TEXTS = st.one_of(st.none(), st.text(max_size=10))


@given(st.lists(st.tuples(OCTETS, st.integers(1, 3), TEXTS, st.booleans()), max_size=5), st.integers(0, 3))
def test_what_is_wrapped_comes_out_as_it_was(rows: list[tuple[bytes | None, int, str | None, bool]], hops: int) -> None:
    recipients = []
    for at, (inline, count, orcpt, is_aliased) in enumerate(rows):
        sender = Mailbox("us er", "example.org") if at % 2 else None
        options = MailOptions(at - 9, 2.5, 0.0, by_return=True) if at % 3 else NO_OPTIONS
        message = QueuedMessage(
            f"0000000000{at:03}", sender, 1.5, 99, at or None, "FULL", orcpt, None, True, inline, count, 0, options
        )
        for number in range(count):
            path = Mailbox("ü@x", "xn--bcher-kva.example")
            original = Mailbox("alias", "here.test") if is_aliased else path
            dsn = DsnRequest("NEVER", orcpt) if at % 2 else NO_DSN_REQUEST
            recipients.append(
                QueuedRecipient(message, number, path, original, path.domain, None, 2, 3.25, 4.5, 7, dsn, "451 x", True)
            )
    assert unwrap(wrap(recipients, hops)) == (recipients, hops)
