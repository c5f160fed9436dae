# SPDX-License-Identifier: MIT
"""The server's side of SASL mechanisms, step by step: responses in; a challenge, credentials or a defect out.

Guarantees: nothing here judges a password; nothing that a client sends raises; every text that comes out is valid UTF-8
without NUL, within 255 octets for names and 1,024 for a password.

RFC 4422; RFC 4616 (PLAIN); LOGIN as draft-murchison-sasl-login describes it, for the clients that know nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from attrs import field, frozen

MAX_NAME_OCTETS = 255
MAX_PASSWORD_OCTETS = 1024


@frozen
class Challenge:
    """Send this; the client's response is the argument of the next step."""

    octets: bytes


@frozen
class Credentials:
    """Who proves (`authcid`), with what, and who they want to act as (`authzid`, "" for themselves). Not yet verified."""

    authcid: str
    authzid: str
    password: str = field(repr=False)


@frozen
class Malformed:
    """The exchange breaks the mechanism's grammar; `reason` may be shown to the client."""

    reason: str


Outcome = Challenge | Credentials | Malformed


class Mechanism(Protocol):
    """One exchange. It is over with the first outcome that is no Challenge."""

    def step(self, response: bytes | None) -> Outcome:
        """Go on with the client's response; the first is its initial response, or None where it sent none."""


class Plain:
    """PLAIN (RFC 4616): `[authzid] NUL authcid NUL password`, in one message."""

    def step(self, response: bytes | None) -> Outcome:
        if response is None:
            return Challenge(b"")
        parts = response.split(b"\0")
        if len(parts) != 3:
            return Malformed("PLAIN wants an authorisation identity, a name and a password")
        authzid, authcid, password = parts
        return _check_credentials(authcid, authzid, password)


class Login:
    """LOGIN: the name, then the password."""

    def __init__(self) -> None:
        self._name: bytes | None = None
        self._asked = False

    def step(self, response: bytes | None) -> Outcome:
        # Outlook and others send an empty initial response where they mean none.
        if not self._asked and not response:
            self._asked = True
            return Challenge(b"Username:")
        if self._name is None:
            self._asked, self._name = True, response or b""
            return Challenge(b"Password:")
        return _check_credentials(self._name, b"", response or b"")


def _check_credentials(authcid: bytes, authzid: bytes, password: bytes) -> Outcome:
    if not authcid or not password:
        return Malformed("Name and password must not be empty")
    if max(len(authcid), len(authzid)) > MAX_NAME_OCTETS or len(password) > MAX_PASSWORD_OCTETS:
        return Malformed("Name or password is too long")
    if b"\0" in authcid + authzid + password:
        return Malformed("NUL in name or password")
    try:
        return Credentials(authcid.decode(), authzid.decode(), password.decode())
    except UnicodeDecodeError:
        return Malformed("Name and password are UTF-8")


MECHANISMS: dict[str, Callable[[], Mechanism]] = {"PLAIN": Plain, "LOGIN": Login}
"""By name, best first: the order in which they are offered."""


def no_mechanisms(tls_active: bool) -> tuple[str, ...]:
    """What AUTH offers where nobody can log in any more."""
    return ()
