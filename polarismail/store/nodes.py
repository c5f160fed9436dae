# SPDX-License-Identifier: MIT
"""Which processes share the spool, and which of them are dead, so that what they owned can be taken over.

On SQLite (one machine) a process holds a file lock for as long as it lives: any incarnation without one is dead. On
PostgreSQL it renews a lease by the database's clock; a process that slept past its lease finds its row gone and joins
again under a new incarnation, and what it still held is refused by its epoch.
"""

from __future__ import annotations

import os
import socket
import time

from sqlalchemy import Connection, delete, insert, or_, select, update

from polarismail.store import schema
from polarismail.store.dialects import database_clock, has_clock
from polarismail.store.lock import LivenessLock, is_alive

LEASE_SECONDS = 30.0


class Nodes:
    """This process among those that share one database. Used by one thread at a time."""

    def __init__(self, lock_path: str | None, lease_seconds: float = LEASE_SECONDS) -> None:
        self.incarnation = 0
        self._lock_path, self._lease_seconds = lock_path, lease_seconds
        self._locks: list[LivenessLock] = []

    def join(self, connection: Connection) -> int:
        """Count a new incarnation up, durably with this transaction, and be alive under it from now on."""
        nodes = schema.nodes
        values = {"hostname": socket.gethostname(), "pid": os.getpid(), "started": time.time()}
        if has_clock(connection):
            statement = insert(nodes).values(**values, lease_until=database_clock() + self._lease_seconds)
        else:
            statement = insert(nodes).values(**values)
        key = connection.execute(statement).inserted_primary_key
        assert key is not None
        self.incarnation = int(key[0])
        if not has_clock(connection):
            self._locks.append(LivenessLock(self._path(self.incarnation)))
        return self.incarnation

    def renew(self, connection: Connection) -> bool:
        """Keep the lease. False where it had run out and others may have taken over: then `incarnation` is a new one."""
        if not has_clock(connection):
            return True
        nodes = schema.nodes
        renewed = connection.execute(
            update(nodes)
            .where(nodes.c.incarnation == self.incarnation, nodes.c.ended.is_(False))
            .values(lease_until=database_clock() + self._lease_seconds)
        )
        if renewed.rowcount == 1:
            return True
        self.join(connection)
        return False

    def living(self, connection: Connection) -> set[int]:
        """Incarnations that are alive, ours among them."""
        nodes = schema.nodes
        query = select(nodes.c.incarnation).where(nodes.c.ended.is_(False))
        if has_clock(connection):
            return set(connection.execute(query.where(nodes.c.lease_until >= database_clock())).scalars())
        return {
            number
            for number in connection.execute(query).scalars()
            if number == self.incarnation or is_alive(self._path(number))
        }

    def release_dead(self, connection: Connection, *, thorough: bool = False) -> bool:
        """Give what the dead owned back to everybody. `thorough` looks for owners that are not even in the table.

        Returns whether somebody was found dead; their epochs have gone up, so that nothing they say counts any more.
        """
        nodes, recipients = schema.nodes, schema.recipients
        if has_clock(connection):
            # The row goes first: a sleeper that wakes now finds it gone, and never both renews and is taken over.
            gone = or_(nodes.c.ended, nodes.c.lease_until < database_clock())
        else:
            gone = nodes.c.incarnation.not_in(self.living(connection))
        dead = list(connection.execute(delete(nodes).where(gone).returning(nodes.c.incarnation)).scalars())
        if not dead and not thorough:
            return False
        living = select(nodes.c.incarnation)
        connection.execute(
            update(recipients)
            .where(recipients.c.owner != 0, recipients.c.owner.not_in(living))
            .values(owner=0, epoch=recipients.c.epoch + 1, lease_until=0.0)
        )
        return bool(dead)

    def leave(self, connection: Connection) -> None:
        """Say that this process has ended: the next one to look takes over at once."""
        self.declare_dead(connection, self.incarnation)

    def declare_dead(self, connection: Connection, incarnation: int) -> None:
        """Who has waited for its end knows that this one is dead, though its lease has not run out."""
        nodes = schema.nodes
        connection.execute(update(nodes).where(nodes.c.incarnation == incarnation).values(ended=True))

    def close(self) -> None:
        """Let go of the file locks."""
        while self._locks:
            self._locks.pop().close()

    def _path(self, incarnation: int) -> str:
        return f"{self._lock_path}.node{incarnation}"
