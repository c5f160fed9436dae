# SPDX-License-Identifier: MIT
"""A verdict says whether, and with which reply when not; its kind and its reply cannot disagree."""

from __future__ import annotations

from attrs import Attribute, field, frozen

from polarismail.values.reply import Reply


def _check_transient(verdict: object, attribute: Attribute[Reply], reply: Reply) -> None:
    if not reply.is_transient:
        raise ValueError(f"a deferral wants a 4yz reply, not {reply}")


def _check_permanent(verdict: object, attribute: Attribute[Reply], reply: Reply) -> None:
    if not reply.is_permanent:
        raise ValueError(f"a rejection wants a 5yz reply, not {reply}")


@frozen
class Accept:
    """Nothing speaks against it."""


@frozen
class Defer:
    """The same may work later. Raises ValueError for a reply that is not 4yz."""

    reply: Reply = field(validator=_check_transient)


@frozen
class Reject:
    """It will never work. Raises ValueError for a reply that is not 5yz."""

    reply: Reply = field(validator=_check_permanent)


Verdict = Accept | Defer | Reject

ACCEPT = Accept()
