# SPDX-License-Identifier: MIT
"""The gate: strangers wait here before they are greeted, at the price of a socket and a line in a table.

A mail server waits for the greeting; much of what sends spam does not, or does not wait at all. So who is not known is held
for some seconds without engine, session, transport or a place in epoll, and looked at once, at the end: octets before our
greeting are an early talker (RFC 5321 §3.1, §4.3.1), an end of file is gone, silence goes on.

Guarantees
    A waiter costs less than 2 KB of memory. The number of waiters is bounded, in all and for each address. Beyond the first
    bound the one who has waited longest goes on early: a flood makes the wait shorter and shuts nobody out. Beyond the
    second the newcomer is told 421, so that one address cannot make the wait shorter for all. At most half of the process's
    descriptors are waiters'.
Never
    More than one timer; a read that takes a client's octets from the engine; an exception that reaches the reactor.
"""

from __future__ import annotations

import resource
import socket
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar
from typing import Protocol as Interface

from attrs import field, frozen
from twisted.logger import Logger

from polarismail.net.accepting import Client, GoOn
from polarismail.values.checks import check_positive
from polarismail.values.events import RecordEvent, no_event
from polarismail.values.network import host_of
from polarismail.values.reply import OUT_OF_STEP, SHUTTING_DOWN, TOO_MANY_CONNECTIONS, Reply

T = TypeVar("T")
_LOOK_SECONDS = 1.0  # how soon stress is noticed
_A_TURN = 100
_EVENTS_A_SECOND = 20
_DRAINED_OCTETS = 65536
_NOW = socket.MSG_DONTWAIT


@frozen
class WaitSettings:
    """How long strangers wait, and how many. Defaults: NUMBERS.md, "Pregreet". Raises ValueError."""

    enabled: bool = True
    wait_seconds: float = 6.0
    stress_wait_seconds: float = 2.0
    max_waiting: int = field(default=3000, validator=check_positive)
    max_waiting_per_address: int = field(default=20, validator=check_positive)  # for IPv6: for each /64


class Keeper(Interface):
    """Who may pass. Both questions are answered at once, without the network or a disk."""

    def passes(self, address: str) -> bool:
        """Whether this client need not wait."""

    def look_into(self, address: str) -> None:
        """It waits now: find out what can be found out meanwhile; `Gate.let_in` may be called."""

    def judge(self, address: str, waited_seconds: float) -> tuple[Reply, str] | None:
        """It was silent so long. None: it may go on; else what it is told, and why, for the log."""


# Client, what to do with it, when it came, and the network that it counts for.
_Waiter = tuple[Client, GoOn, float, str]


class Gate:
    """A `Porch`: see the module and `accepting`. One for all listeners of a process that have it."""

    log = Logger()

    def __init__(
        self,
        reactor: Any,
        keeper: Keeper,
        settings: WaitSettings | None = None,
        *,
        record_event: RecordEvent = no_event,
        is_stressed: Callable[[], bool] = lambda: False,
    ) -> None:
        self.settings = settings or WaitSettings()  # others may be put in their place; who waits, waits by them
        self._reactor, self._keeper = reactor, keeper
        self._record_event, self._is_stressed = record_event, is_stressed
        self._waiting: OrderedDict[socket.socket, _Waiter] = OrderedDict()  # in the order in which they came
        self._by_network: dict[str, list[socket.socket]] = {}
        self._descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        self._timer: Any = None
        self._counts: Counter[str] = Counter()
        self._event_second, self._events = -1, 0

    # -- Porch

    def take(self, accepted: socket.socket, client: Client, go_on: GoOn) -> None:
        """See Porch. A client without an address is one of a UNIX socket."""
        address = client[0] if client else ""
        if not address or not self.settings.enabled or self._ask(True, self._keeper.passes, address):
            go_on(accepted, client)
            return
        network = host_of(address)
        alike = self._by_network.get(network)
        if alike is not None and len(alike) >= self.settings.max_waiting_per_address:
            self._refuse(accepted, client, TOO_MANY_CONNECTIONS, "too_many", "")
            return
        while len(self._waiting) >= min(self.settings.max_waiting, self._descriptors):
            self._counts["hurried"] += 1
            self._end(next(iter(self._waiting)))
        self._waiting[accepted] = (client, go_on, self._reactor.seconds(), network)
        self._by_network.setdefault(network, []).append(accepted)
        self._arm()
        self._ask(None, self._keeper.look_into, address)

    def stop(self) -> None:
        """Tell everybody who waits to come again later."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            accepted, _ = self._waiting.popitem()
            _turn_away(accepted, SHUTTING_DOWN)
        self._by_network.clear()

    # -- for the keeper and for people

    def let_in(self, address: str) -> None:
        """Who waits with this address need not wait any longer."""
        alike = self._by_network.get(host_of(address), ())
        for accepted in [each for each in alike if self._waiting[each][0][0] == address]:
            client, go_on, _, _ = self._waiting[accepted]
            self._forget(accepted)
            self._counts["let_in"] += 1
            go_on(accepted, client)

    def statistics(self) -> dict[str, int]:
        """How many wait now; since the start: what became of those who did."""
        names = ("patient", "hurried", "let_in", "gone", "early_talkers", "listed", "too_many")
        return {"waiting": len(self._waiting), **{name: self._counts[name] for name in names}}

    # -- inside

    def _ask(self, otherwise: T, question: Callable[..., T], *arguments: Any) -> T:
        """The keeper's answer. Whatever is wrong with us is no reason to turn mail away."""
        try:
            return question(*arguments)
        except Exception:
            self.log.failure("the gate could not judge a client: it may pass")
            return otherwise

    def _forget(self, accepted: socket.socket) -> None:
        waiter = self._waiting.pop(accepted, None)
        if waiter is not None:
            alike = self._by_network[waiter[3]]
            alike.remove(accepted)
            if not alike:
                del self._by_network[waiter[3]]

    def _wait_seconds(self) -> float:
        settings = self.settings
        return (
            min(settings.stress_wait_seconds, settings.wait_seconds) if self._is_stressed() else settings.wait_seconds
        )

    def _arm(self) -> None:
        if self._timer is None and self._waiting:
            first = self._waiting[next(iter(self._waiting))]
            left = first[2] + self._wait_seconds() - self._reactor.seconds()
            self._timer = self._reactor.callLater(min(max(left, 0.0), _LOOK_SECONDS), self._look)

    def _look(self) -> None:
        self._timer = None
        now, wait = self._reactor.seconds(), self._wait_seconds()
        for _ in range(_A_TURN):
            if not self._waiting:
                break
            accepted = next(iter(self._waiting))
            # The timer may come a hair before its time.
            if now - self._waiting[accepted][2] < wait - 0.001:
                break
            self._end(accepted)
        self._arm()

    def _end(self, accepted: socket.socket) -> None:
        """Its time is up: what has it done meanwhile?"""
        client, go_on, came, _ = self._waiting[accepted]
        self._forget(accepted)
        try:
            said = accepted.recv(1, socket.MSG_PEEK | _NOW)
        except BlockingIOError:
            said = None
        except OSError:
            said = b""
        if said:
            self._refuse(accepted, client, OUT_OF_STEP, "early_talkers", "talked before the greeting")
        elif said is not None:
            self._counts["gone"] += 1
            accepted.close()
        else:
            self._judge(accepted, client, go_on, self._reactor.seconds() - came)

    def _judge(self, accepted: socket.socket, client: Client, go_on: GoOn, waited: float) -> None:
        refusal = self._ask(None, self._keeper.judge, client[0], waited)
        if refusal is not None:
            self._refuse(accepted, client, refusal[0], "listed", refusal[1])
            return
        self._counts["patient"] += 1
        go_on(accepted, client)

    def _refuse(self, accepted: socket.socket, client: Client, reply: Reply, count: str, why: str) -> None:
        self._counts[count] += 1
        _turn_away(accepted, reply)
        if why and self._may_tell():
            self._record_event("gate-refused", {"client": client[0], "why": why, "reply": str(reply)})

    def _may_tell(self) -> bool:
        # Each costs a line of the log: a flood must not fill a disk. All are counted.
        second = int(self._reactor.seconds())
        if second != self._event_second:
            self._event_second, self._events = second, 0
        self._events += 1
        return self._events <= _EVENTS_A_SECOND


def _turn_away(accepted: socket.socket, reply: Reply) -> None:
    with suppress(OSError):
        accepted.send(reply.octets, _NOW | socket.MSG_NOSIGNAL)
        # close() would answer octets that nobody read with a reset, which takes the reply from the client as well.
        accepted.recv(_DRAINED_OCTETS, _NOW)
    accepted.close()
