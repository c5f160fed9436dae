# SPDX-License-Identifier: MIT
"""An AUTH exchange, the same for every protocol: responses in, challenges out, and at the end a login or a refusal.

Who mixes it in says how its protocol refuses, and judges the credentials. RFC 4422 §3; RFC 4954 §4 and RFC 5034 §4.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from twisted.internet.defer import Deferred

from polarismail.net.transport import Connection
from polarismail.wire import sasl


class SaslExchange(ABC):
    """One at a time; `_exchange` is None while there is none."""

    _connection: Connection
    _engine: Any  # with `challenge`
    _exchange: sasl.Mechanism | None = None

    @abstractmethod
    def _cancelled(self) -> Deferred[None] | None:
        """Answer the client that has given up."""

    @abstractmethod
    def _malformed(self, reason: str) -> Deferred[None] | None:
        """Answer what breaks the mechanism's grammar."""

    @abstractmethod
    def _log_in(self, name: str, password: bytes, authzid: str) -> Deferred[None] | None:
        """Judge what came out, and answer."""

    def _do_auth(self, event: Any) -> Deferred[None] | None:
        self._exchange = sasl.MECHANISMS[event.mechanism]()
        return self._step(event.initial)

    def _do_auth_response(self, event: Any) -> Deferred[None] | None:
        if event.octets is None:
            self._exchange = None
            return self._cancelled()
        return self._step(event.octets)

    def _step(self, response: bytes | None) -> Deferred[None] | None:
        assert self._exchange is not None
        outcome = self._exchange.step(response)
        if isinstance(outcome, sasl.Challenge):
            self._connection.send(self._engine.challenge(outcome.octets))
            return None
        self._exchange = None
        if isinstance(outcome, sasl.Malformed):
            return self._malformed(outcome.reason)
        return self._log_in(outcome.authcid, outcome.password.encode(), outcome.authzid)
