# SPDX-License-Identifier: MIT
"""What the sessions of one listener share, whatever the protocol: frozen, so that a reload is another value from then on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import field, frozen

from polarismail.net.listeners import Listener
from polarismail.policy.limits import ClientLimits
from polarismail.values.events import RecordEvent


@frozen
class ListenerContext:
    """A protocol's own adds its settings, and what it always says."""

    hostname: str
    listener: Listener
    portal: Any  # twisted.cred.portal.Portal
    reactor: Any
    tls_options: Callable[[], Any]  # the server's current TLS options, or None where TLS is not to be had
    record_event: RecordEvent
    limits: ClientLimits | None = field(default=None, kw_only=True)
