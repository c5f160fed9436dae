# SPDX-License-Identifier: MIT
"""Has this client proved that it tries again? Pure judgement of one greylist triplet at one moment.

Guarantees: no clock is read and nothing is kept here; a clock that jumped back never makes a client wait longer than
the delay.
The classic triplet: the first contact is deferred, a retry after `delay_seconds` and within `window_seconds` passes,
what passed stays passed for `lifetime_seconds` after its last use, and a client network that passed `client_passes`
times is not asked any more.
RFC 6647 (greylisting); RFC 5321 §4.2.1 (4yz: the client is encouraged to try again).
"""

from __future__ import annotations

import enum
import math

from attrs import Attribute, evolve, field, frozen

from polarismail.policy.verdict import ACCEPT, Defer, Verdict
from polarismail.store.greylist import ClientRecord, Triplet, TripletRecord
from polarismail.values.address import Mailbox
from polarismail.values.checks import check_networks
from polarismail.values.envelope import ReversePath
from polarismail.values.network import client_network
from polarismail.values.reply import GREYLISTED, Reply


def _check_prefix(settings: object, attribute: Attribute[int], prefix: int) -> None:
    longest = 32 if attribute.name == "prefix_v4" else 128
    if not 0 <= prefix <= longest:
        raise ValueError(f"{attribute.name}: expected 0 to {longest}, found {prefix}")


@frozen
class GreylistSettings:
    """Defaults of NUMBERS.md. Raises ValueError for an `allow_networks` entry that is no network."""

    enabled: bool = True
    delay_seconds: float = 300.0
    window_seconds: float = 2 * 86400.0
    lifetime_seconds: float = 35 * 86400.0
    client_passes: int = 5  # triplets of one network that passed; 0: never allow a network by itself
    prefix_v4: int = field(default=24, validator=_check_prefix)
    prefix_v6: int = field(default=64, validator=_check_prefix)
    allow_networks: tuple[str, ...] = field(default=(), validator=check_networks)  # never greylisted
    cache_entries: int = 50_000  # passed triplets in memory, and as many client networks
    refresh_seconds: float = 3600.0  # how stale the last use of a passed triplet may be on disk
    expiry_interval_seconds: float = 3600.0
    flush_seconds: float = 0.1


class Standing(enum.Enum):
    """Why a triplet was judged as it was; the values are names in statistics."""

    FIRST = "first"
    EARLY = "early"
    PASSED = "passed"
    KNOWN = "known"


@frozen
class Judgement:
    """A verdict on one triplet, and the record to keep from now on (the same one where nothing changed)."""

    verdict: Verdict
    standing: Standing
    record: TripletRecord


def triplet_of(
    client_address: str, reverse_path: ReversePath, forward_path: Mailbox, settings: GreylistSettings
) -> Triplet:
    """The key of one recipient of a transaction. Never raises, whatever a peer made the addresses of."""
    network = client_network(client_address, settings.prefix_v4, settings.prefix_v6)
    return Triplet(network, _folded(reverse_path), _folded(forward_path))


def _folded(mailbox: Mailbox | None) -> str:
    text = str(mailbox).lower() if mailbox is not None else ""
    # A database takes no lone surrogate and no NUL.
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8").replace("\0", "?")


def judge(record: TripletRecord | None, now: float, settings: GreylistSettings) -> Judgement:
    """One use of a triplet at `now`: the verdict, and what to remember."""
    if record is not None:
        if record.passed and now - record.last_seen <= settings.lifetime_seconds:
            # A clock that jumped back leaves `last_seen` ahead: it is never moved back, and ends by itself.
            seen = evolve(record, last_seen=max(now, record.last_seen), passes=record.passes + 1)
            return Judgement(ACCEPT, Standing.KNOWN, seen)
        waited = now - record.first_seen
        if not record.passed and 0 <= waited <= settings.window_seconds:
            if waited < settings.delay_seconds:
                return Judgement(_wait(settings.delay_seconds - waited), Standing.EARLY, record)
            passed = TripletRecord(record.first_seen, now, True, record.passes + 1)
            return Judgement(ACCEPT, Standing.PASSED, passed)
    return Judgement(_wait(settings.delay_seconds), Standing.FIRST, TripletRecord(now, now))


def is_trusted_client(record: ClientRecord | None, now: float, settings: GreylistSettings) -> bool:
    """True for a client network that has passed often enough, and lately enough, to be asked no more."""
    return (
        record is not None
        and 0 < settings.client_passes <= record.passes
        and now - record.last_seen <= settings.lifetime_seconds
    )


def _wait(seconds: float) -> Defer:
    left = max(1, math.ceil(seconds))
    text = f"Greylisted, please try again in {left} second{'s' if left > 1 else ''}"
    return Defer(Reply(GREYLISTED.code, GREYLISTED.status, text))
