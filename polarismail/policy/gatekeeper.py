# SPDX-License-Identifier: MIT
"""Who keeps the gate: puts together what networks, memory and DNS lists say of a client.

Guarantees: both questions of the gate (`passes`, `judge`) are answered from memory; what others must be asked for comes
while the client waits, or behind the back of one that is known already, and then counts for its next visit.
`forget` takes a pass away, on every worker (see store/known_clients).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from polarismail.net.dnsbl import DnsLists, Listing
from polarismail.policy.gate import GateSettings, earns_a_pass, is_vouched_for, refusal
from polarismail.store.known_clients import KnownClients
from polarismail.values.network import NetworkList, host_of
from polarismail.values.reply import Reply


class Gatekeeper:
    """The `Keeper` of a Gate. `let_in(address)` is to be the gate's, and is called once somebody need not wait any more."""

    def __init__(
        self, known: KnownClients, lists: DnsLists, settings: GateSettings, *, now: Callable[[], float]
    ) -> None:
        self.known, self.lists = known, lists
        self.let_in: Callable[[str], None] = lambda address: None
        self._now, self._when_found = now, self._found  # bound once, not for each who waits
        self._counts: Counter[str] = Counter()
        lists.when_known = self._listed
        self._obey(settings)

    def reconfigure(self, settings: GateSettings) -> None:
        """Judge by other settings from now on."""
        if settings.dns != self._settings.dns:
            self.lists.reconfigure(settings.dns)
        self.known.settings = settings.known
        self._obey(settings)

    def _obey(self, settings: GateSettings) -> None:
        self._settings = settings
        self._allowed = NetworkList(settings.allow_networks)

    def passes(self, address: str) -> bool:
        """See Keeper."""
        if address in self._allowed:
            self._counts["allowed_network"] += 1
            return True
        return self.known.is_known(host_of(address), self._now()) and self._may_stay_known(address)

    def look_into(self, address: str) -> None:
        """See Keeper."""
        self.known.find(host_of(address), self._now(), self._when_found, address)
        listing = self.lists.ask(address)
        if is_vouched_for(listing):
            self._vouched(address)

    def judge(self, address: str, waited_seconds: float) -> tuple[Reply, str] | None:
        """See Keeper. Who is let through is known from now on."""
        reply = refusal(address, self.lists.look(address).hits, self._settings)
        if reply is not None:
            return reply, "listed"
        if earns_a_pass(waited_seconds, self._settings):
            self.known.remember(host_of(address), self._now())
        return None

    def forget(self, address: str) -> None:
        """This client has done what good clients do not: it waits the next time."""
        network = host_of(address)
        if self.known.is_known(network, self._now()):
            self._counts["forgotten"] += 1
            self.known.forget(network)

    def statistics(self) -> dict[str, Any]:
        """Counts since the start."""
        names = ("allowed_network", "known", "vouched_for", "forgotten")
        return {
            **{name: self._counts[name] for name in names},
            **self.known.statistics(),
            **self.lists.statistics(),
        }

    def _found(self, address: str) -> None:
        if self._may_stay_known(address):
            self.let_in(address)

    def _may_stay_known(self, address: str) -> bool:
        # What is asked now counts for the next time.
        if refusal(address, self.lists.ask(address).hits, self._settings) is not None:
            self.forget(address)
            return False
        self._counts["known"] += 1
        return True

    def _listed(self, address: str, listing: Listing) -> None:
        if refusal(address, listing.hits, self._settings) is not None:
            self.forget(address)
        elif is_vouched_for(listing):
            self._vouched(address)

    def _vouched(self, address: str) -> None:
        self._counts["vouched_for"] += 1
        self.known.remember(host_of(address), self._now())
        self.let_in(address)
