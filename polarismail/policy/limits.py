# SPDX-License-Identifier: MIT
"""How much a client, and the network around it, may ask for in a time: connections, transactions, recipients, errors,
guesses at recipients and at passwords.

Guarantees: who guesses too much learns nothing more, right guesses included; a login name is slowed down and never locked,
so that nobody can lock out somebody else; what is refused costs no look-up and no hashing; memory never grows.
Never: a clock of its own (`now` is given); a judgement of trusted networks. Whoever has logged in is not asked here.
HOSTILE section 0, A4, A6, E6.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from attrs import field, frozen

from polarismail.net.shares import RATES, Shares
from polarismail.values.checks import check_networks
from polarismail.values.events import RecordEvent
from polarismail.values.network import LOCAL_CLIENT, NetworkList, host_of, network_of
from polarismail.values.reply import Reply

_UNITS = {60: "minute", 3600: "hour", 86400: "day"}
_LONGEST_DELAY_SECONDS = 10.0
_EVENTS_A_SECOND = 10
_REFUSES_WHAT_IS_BEYOND = ("connections", "transactions", "recipients")
"""Of the other kinds it is the next guess that is refused, before it is one."""
_JUDGED_SECONDS = 1.0


@frozen
class RateLimits:
    """`[limits]`: of a client (IPv6: a /64), and as `network_` of the /24 (IPv6: /48) around it; 0: none. Raises ValueError."""

    trusted_networks: tuple[str, ...] = field(default=("127.0.0.0/8", "::1/128"), validator=check_networks)
    connections_per_minute: int = 0
    network_connections_per_minute: int = 0
    transactions_per_minute: int = 0
    network_transactions_per_minute: int = 0
    recipients_per_minute: int = 0
    network_recipients_per_minute: int = 0
    failures_per_hour: int = 1000  # 5yz replies of any kind; then it is not connected to
    network_failures_per_hour: int = 5000
    unknown_recipients_per_day: int = 35  # as Stalwart
    network_unknown_recipients_per_day: int = 350
    login_failures_per_day: int = 100  # as Stalwart
    network_login_failures_per_day: int = 1000
    slow_login_failures: int = 10  # of one name in a day; from then on each answer to a wrong password waits longer


_KEYS = {
    "connections": "connections_per_minute",
    "transactions": "transactions_per_minute",
    "recipients": "recipients_per_minute",
    "failures": "failures_per_hour",
    "unknown": "unknown_recipients_per_day",
    "logins": "login_failures_per_day",
}


def _reply(code: int, what: str, kind: str) -> Reply:
    unit = _UNITS[RATES[f"{kind}.host"]]
    return Reply(code, (4, 7, 0), f"Too many {what} from your network in a {unit}, try again later")


_TOO_MANY_TRANSACTIONS = _reply(450, "messages", "transactions")
_TOO_MANY_RECIPIENTS = _reply(452, "recipients", "recipients")
_TOO_MANY_UNKNOWN = _reply(450, "unknown recipients", "unknown")
_TOO_MANY_LOGINS = _reply(454, "wrong logins", "logins")


class ClientLimits:
    """Judges all clients of a server. `now` is monotonic and the same for all workers."""

    def __init__(
        self,
        settings: RateLimits,
        shares: Shares,
        *,
        now: Callable[[], float],
        record_event: RecordEvent,
    ) -> None:
        self._rates = {name: shares.rate(name) for name in RATES}
        self._now, self._record_event = now, record_event
        self._told_second, self._told = 0, 0
        self.change_settings(settings)

    def change_settings(self, settings: RateLimits) -> None:
        """Other limits, from now on."""
        self.settings = settings
        self.trusted = NetworkList(settings.trusted_networks)
        self._trusts = lru_cache(4096)(self.trusted.__contains__)
        limits = {kind: (getattr(settings, key), getattr(settings, f"network_{key}")) for kind, key in _KEYS.items()}
        self._judged = {
            kind: tuple((self._rates[f"{kind}.{scope}"], pair[at]) for at, scope in enumerate(("host", "network")))
            for kind, pair in limits.items()
        }
        self.limits_transactions, self.limits_recipients = any(limits["transactions"]), any(limits["recipients"])
        self.limits_failures = any(limits["failures"])

    def client(self, address: str) -> LimitedClient | None:
        """The judge of one client; None for one that is trusted, or has no address."""
        if address in ("", LOCAL_CLIENT) or self._trusts(address):
            return None
        return LimitedClient(self, host_of(address), network_of(address))

    def may_connect(self, address: str) -> str:
        """Count a connection. Returns "" or what is used up: rate, failures."""
        client = self.client(address)
        if client is None:
            return ""
        if self.add(client, "connections"):
            return "rate"
        return "failures" if self.limits_failures and self.is_over(client, "failures") else ""

    def add(self, client: LimitedClient, kind: str) -> bool:
        """Count one, for the client and its network; whether there are too many now."""
        now, is_over = self._now(), False
        for (rate, limit), name in zip(self._judged[kind], (client.host, client.network), strict=True):
            if not limit:
                rate.note(name, now)
                continue
            number = rate.add(name, now)
            if number == limit + (kind in _REFUSES_WHAT_IS_BEYOND):
                self._tell(client, kind, name, limit)
            is_over = is_over or number > limit
        return is_over

    def is_over(self, client: LimitedClient, kind: str) -> bool:
        """Whether the client's limit or its network's is used up."""
        (host, of_host), (network, of_network) = self._judged[kind]
        now = self._now()
        return (of_host > 0 and host.reaches(of_host, client.host, now)) or (
            of_network > 0 and network.reaches(of_network, client.network, now)
        )

    def may_guess(self, client: LimitedClient) -> bool:
        """Whether it may name recipients. Judged anew each second: a kept session brings thousands of messages in it."""
        now = self._now()
        if now - client.judged >= _JUDGED_SECONDS:
            client.judged, client.guesses = now, self.is_over(client, "unknown")
        return not client.guesses

    def slow(self, name: str) -> float:
        """Count a wrong password for a login name; seconds that the answer should wait."""
        number, limit = self._rates["logins.name"].add(name.lower(), self._now()), self.settings.slow_login_failures
        if not 0 < limit < number:
            return 0.0
        return min(_LONGEST_DELAY_SECONDS, 0.5 * 2.0 ** min(number - limit, 10))

    def _tell(self, client: LimitedClient, kind: str, name: str, limit: int) -> None:
        """The log learns of it once for each time, and is not flooded."""
        second = int(self._now())
        if second != self._told_second:
            self._told_second, self._told = second, 0
        self._told += 1
        if self._told <= _EVENTS_A_SECOND:
            self._record_event(
                "limit-reached", {"client": client.host, "limit": _KEYS[kind], "of": name, "allowed": limit}
            )


class LimitedClient:
    """One client, for the length of a session."""

    __slots__ = ("_limits", "guesses", "host", "judged", "network")

    def __init__(self, limits: ClientLimits, host: str, network: str) -> None:
        self._limits, self.host, self.network = limits, host, network
        self.guesses = False
        self.judged = float("-inf")

    def check_mail(self) -> Reply | None:
        """A stranger begins a transaction: a refusal, or None. Whether it may name recipients is judged along with it."""
        limits = self._limits
        limits.may_guess(self)
        if limits.limits_transactions and limits.add(self, "transactions"):
            return _TOO_MANY_TRANSACTIONS
        return None

    def check_rcpt(self) -> Reply | None:
        """A stranger names a recipient, which nobody has looked for yet: a refusal, or None."""
        if self.guesses:
            return _TOO_MANY_UNKNOWN
        if self._limits.limits_recipients and self._limits.add(self, "recipients"):
            return _TOO_MANY_RECIPIENTS
        return None

    def guessed(self) -> None:
        """It named a recipient that does not exist."""
        self._limits.add(self, "unknown")
        self.guesses = self._limits.is_over(self, "unknown")

    def failed(self) -> None:
        """It was told 5yz."""
        if self._limits.limits_failures:
            self._limits.add(self, "failures")

    def check_login(self) -> Reply | None:
        """Before a password is verified: a refusal, or None."""
        return _TOO_MANY_LOGINS if self._limits.is_over(self, "logins") else None

    def login_failed(self, name: str) -> float:
        """A wrong name or password: seconds that the answer should wait."""
        self._limits.add(self, "logins")
        return self._limits.slow(name)
