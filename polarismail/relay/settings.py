# SPDX-License-Identifier: MIT
"""What an operator may choose of the relay, with the defaults of NUMBERS.md."""

from __future__ import annotations

from attrs import field, frozen

from polarismail.relay.clients import ClientSettings
from polarismail.relay.routing import RoutingSettings
from polarismail.relay.schedule import ScheduleSettings


@frozen
class RelaySettings:
    """Limits of the relay; routes, waits and time-outs are in the settings of their own parts."""

    routing: RoutingSettings = field(factory=RoutingSettings)
    schedule: ScheduleSettings = field(factory=ScheduleSettings)
    client: ClientSettings = field(factory=ClientSettings)

    max_recipients_in_memory: int = 10_000
    """Recipients that are claimed at once; what is beyond waits in the database."""
    max_octets_in_memory: int = 67_108_864
    """Content of fresh mail that is kept at hand; what is beyond is read from the spool."""
    claim_at_once: int = 500

    connections: int = 200
    connections_per_site: int = 10
    first_connections_per_site: int = 2
    """So many to a site that has not answered yet; each transaction that it answers allows one more."""
    messages_per_connection: int = 100
    recipients_per_transaction: int = 100
    idle_seconds: float = 5.0
    """So long a connection waits for more mail to the same site."""
    bad_host_seconds: float = 120.0
    broken_tls_seconds: float = 3_600.0
    """So long a host whose STARTTLS does not work is spoken to in plain text, where TLS is opportunistic."""

    local_batch: int = 200
    local_batches: int = 4
    gather_seconds: float = 0.1
    """Under load so long from one batch of local deliveries to the next."""
    large_octets: int = 65_536
    """Local mail above this is delivered message by message, apart from the batches."""

    merge_seconds: float = 10.0
    """So long a failure waits for the other recipients of its message, to share one DSN."""
    retry_record_seconds: float = 5.0
    look_seconds: float = 60.0
    """The database is asked for due mail at least so often, should the clock have jumped."""
    stop_seconds: float = 20.0
