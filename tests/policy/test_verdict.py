# SPDX-License-Identifier: MIT
"""A verdict's kind and its reply agree."""

from __future__ import annotations

import pytest

from polarismail.policy.verdict import ACCEPT, Accept, Defer, Reject
from polarismail.values.reply import GREYLISTED, OK, RELAY_DENIED


def test_kinds_and_replies() -> None:
    assert Accept() == ACCEPT
    assert Defer(GREYLISTED).reply is GREYLISTED
    assert Reject(RELAY_DENIED).reply is RELAY_DENIED
    for kind, reply in ((Defer, RELAY_DENIED), (Defer, OK), (Reject, GREYLISTED), (Reject, OK)):
        with pytest.raises(ValueError):
            kind(reply)
