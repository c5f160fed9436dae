# SPDX-License-Identifier: MIT
"""TLS sessions of hosts that we spoke to, so that the next connection begins where the last one ended.

A full handshake costs more CPU than several messages. Only for connections whose certificate nobody looks at: where it is
verified, it is verified each time.

Guarantees: bounded; a session with which a handshake has failed is not offered again (`drop`).
RFC 8446 §2.2 (resumption), RFC 5077 (tickets).
"""

from __future__ import annotations

from typing import Any

from OpenSSL import SSL
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator
from zope.interface import implementer

from polarismail.relay.clients import RemoteHost
from polarismail.store.lru import LruCache

_ENTRIES = 500  # some KB each


class Resumption:
    """One for the process."""

    def __init__(self, entries: int = _ENTRIES) -> None:
        self._sessions: LruCache[RemoteHost, Any] = LruCache(entries)

    def __contains__(self, host: RemoteHost) -> bool:
        return self._sessions.get(host) is not None

    def __len__(self) -> int:
        return len(self._sessions)

    def options(self, host: RemoteHost, options: Any) -> Any:
        """What `startTLS` takes, for a connection that offers what is kept of this host."""
        session = self._sessions.get(host)
        return options if session is None else _Offering(options, session)

    def keep(self, host: RemoteHost, handle: Any) -> None:
        """Keep what this connection has been given; the newest is the best. Call it late: tickets come behind the handshake."""
        session = handle.get_session() if isinstance(handle, SSL.Connection) else None
        if session is not None:
            self._sessions.put(host, session)

    def drop(self, host: RemoteHost) -> None:
        """Offer nothing to this host next time."""
        self._sessions.drop(host)


@implementer(IOpenSSLClientConnectionCreator)
class _Offering:
    def __init__(self, options: Any, session: Any) -> None:
        self._options, self._session = options, session

    def clientConnectionForTLS(self, tlsProtocol: Any) -> SSL.Connection:
        connection: SSL.Connection = self._options.clientConnectionForTLS(tlsProtocol)
        connection.set_session(self._session)
        return connection
