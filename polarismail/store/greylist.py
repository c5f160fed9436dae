# SPDX-License-Identifier: MIT
"""The greylist's tables: what is known of triplets and client networks, read and written in batches.

Plain functions of a connection of the `counters` database, whose commits are remembered and not promised: what a power
cut takes away makes a client wait once more. Every statement uses an index, and every job is short (1000 rows).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attrs import frozen
from sqlalchemy import Connection, bindparam, delete, func, select

from polarismail.store.dialects import upsert
from polarismail.store.schema import greylist, greylist_clients

SLICE = 1000


@frozen
class Triplet:
    """(client network, reverse-path, forward-path), as kept: lower case, "" for the null reverse-path."""

    network: str
    reverse_path: str
    forward_path: str


@frozen
class TripletRecord:
    """What is known of one triplet. Times are seconds since 1970; `passes` counts accepted uses, roughly."""

    first_seen: float
    last_seen: float
    passed: bool = False
    passes: int = 0


@frozen
class ClientRecord:
    """What is known of one client network: how many of its triplets passed, and when it was last seen."""

    passes: int
    last_seen: float


@frozen
class GreylistCounts:
    """How many rows there are."""

    waiting: int
    passed: int
    clients: int


TRIPLET = select(greylist.c.first_seen, greylist.c.last_seen, greylist.c.passed, greylist.c.passes).where(
    greylist.c.network == bindparam("network"),
    greylist.c.reverse_path == bindparam("reverse_path"),
    greylist.c.forward_path == bindparam("forward_path"),
)
CLIENTS = select(greylist_clients).where(greylist_clients.c.network.in_(bindparam("networks", expanding=True)))
OLD_ROWS = (
    select(greylist)
    .where(greylist.c.last_seen > bindparam("after"), greylist.c.last_seen < bindparam("before"))
    .order_by(greylist.c.last_seen)
    .limit(SLICE)
)
_FORGET = delete(greylist).where(
    greylist.c.network == bindparam("of_network"),
    greylist.c.reverse_path == bindparam("of_reverse_path"),
    greylist.c.forward_path == bindparam("of_forward_path"),
)
OLD_CLIENTS = select(greylist_clients.c.network).where(greylist_clients.c.last_seen < bindparam("before")).limit(SLICE)


def read_triplets(connection: Connection, triplets: Iterable[Triplet]) -> dict[Triplet, TripletRecord]:
    """What is known of these triplets; those that are new are not in it."""
    found = {}
    for triplet in triplets:
        row = connection.execute(TRIPLET, _key(triplet)).first()
        if row is not None:
            found[triplet] = TripletRecord(row.first_seen, row.last_seen, bool(row.passed), row.passes)
    return found


def read_clients(connection: Connection, networks: Iterable[str]) -> dict[str, ClientRecord]:
    """What is known of these client networks."""
    wanted = {"networks": sorted(set(networks))}
    return {row.network: ClientRecord(row.passes, row.last_seen) for row in connection.execute(CLIENTS, wanted)}


def write(
    connection: Connection, triplets: Mapping[Triplet, TripletRecord], clients: Mapping[str, ClientRecord]
) -> None:
    """Keep these triplets as they are now; `passes` of a client is what is to be added."""
    if triplets:
        put = upsert(connection, greylist)
        values = ("first_seen", "last_seen", "passed", "passes")
        put = put.on_conflict_do_update(
            index_elements=["network", "reverse_path", "forward_path"],
            set_={name: put.excluded[name] for name in values},
        )
        rows = [
            {**_key(triplet), **{name: getattr(record, name) for name in values}}
            for triplet, record in triplets.items()
        ]
        connection.execute(put, rows)
    if clients:
        add = upsert(connection, greylist_clients)
        add = add.on_conflict_do_update(
            index_elements=["network"],
            set_={
                "passes": greylist_clients.c.passes + add.excluded.passes,
                "last_seen": add.excluded.last_seen,
            },
        )
        added = [
            {"network": network, "passes": record.passes, "last_seen": record.last_seen}
            for network, record in clients.items()
        ]
        connection.execute(add, added)


def expire_triplets(
    connection: Connection, *, waiting_before: float, passed_before: float, after: float
) -> tuple[float | None, int]:
    """Forget, in one slice of those last seen after `after`, what waited and never passed, or passed and was not used.

    Returns where the next slice begins (None: this was the last), and how many rows went.
    """
    bounds = {"after": after, "before": max(waiting_before, passed_before)}
    rows = connection.execute(OLD_ROWS, bounds).all()
    old = [row for row in rows if row.last_seen < (passed_before if row.passed else waiting_before)]
    if old:
        keys = [
            {"of_network": row.network, "of_reverse_path": row.reverse_path, "of_forward_path": row.forward_path}
            for row in old
        ]
        connection.execute(_FORGET, keys)
    return (rows[-1].last_seen if len(rows) == SLICE else None), len(old)


def expire_clients(connection: Connection, before: float) -> int:
    """Forget a slice of the client networks not seen since; returns how many went."""
    networks = list(connection.execute(OLD_CLIENTS, {"before": before}).scalars())
    if networks:
        connection.execute(delete(greylist_clients).where(greylist_clients.c.network.in_(networks)))
    return len(networks)


def count_rows(connection: Connection) -> GreylistCounts:
    """How many rows there are. Looks at each: for people, not for every second."""
    by_state = {
        bool(passed): count
        for passed, count in connection.execute(select(greylist.c.passed, func.count()).group_by(greylist.c.passed))
    }
    clients = connection.execute(select(func.count()).select_from(greylist_clients)).scalar_one()
    return GreylistCounts(by_state.get(False, 0), by_state.get(True, 0), clients)


def _key(triplet: Triplet) -> dict[str, str]:
    return {
        "network": triplet.network,
        "reverse_path": triplet.reverse_path,
        "forward_path": triplet.forward_path,
    }
