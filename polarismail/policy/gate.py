# SPDX-License-Identifier: MIT
"""Whether a client may talk to us at all: pure judgement of what DNS lists say, and of how patiently it has waited.

Guarantees: no clock is read and nothing is kept here. Only lists that name the client refuse it, never one that is silent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from attrs import field, frozen

from polarismail.net.dnsbl import DnsListSettings, Hit, Listing
from polarismail.net.gate import WaitSettings
from polarismail.store.known_clients import KnownSettings
from polarismail.values.checks import check_networks
from polarismail.values.reply import Reply


def _check_threshold(_: object, __: object, threshold: int) -> None:
    if threshold < 1:
        raise ValueError(f"threshold: expected 1 or more, found {threshold}: who is on no list has 0")


@frozen
class GateSettings:
    """`[gate]`, one flat table. Raises ValueError."""

    wait: WaitSettings = field(factory=WaitSettings)
    dns: DnsListSettings = field(factory=DnsListSettings)
    known: KnownSettings = field(factory=KnownSettings)
    allow_networks: tuple[str, ...] = field(default=("127.0.0.0/8", "::1/128"), validator=check_networks)
    threshold: int = field(default=1, validator=_check_threshold)
    listed: Literal["refuse", "defer"] = "refuse"


def score(hits: Iterable[Hit]) -> int:
    """What all lists together say: against the client above 0, for it below."""
    return sum(hit.weight for hit in hits)


def refusal(address: str, hits: Iterable[Hit], settings: GateSettings) -> Reply | None:
    """What a client is told that lists speak against; None where they do not, or not enough. Names those that do."""
    hits = tuple(hits)
    if score(hits) < settings.threshold:
        return None
    names = ", ".join(dict.fromkeys(hit.name for hit in hits if hit.weight > 0))
    code, kind = (421, 4) if settings.listed == "defer" else (554, 5)
    return Reply(code, (kind, 7, 1), f"Client {address} is listed by {names}")


def is_vouched_for(listing: Listing) -> bool:
    """Whether lists speak for the client, so that it need not wait: all of them have answered."""
    return listing.complete and score(listing.hits) < 0


def earns_a_pass(waited_seconds: float, settings: GateSettings) -> bool:
    """Whether such a wait, in silence, is remembered: one that a crowd at the gate has cut short is not."""
    return waited_seconds >= min(settings.wait.wait_seconds, settings.wait.stress_wait_seconds) - 0.01
