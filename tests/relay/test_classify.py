# SPDX-License-Identifier: MIT
"""Replies as real systems write them, and the cause that we see in each."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polarismail.relay.classify import Cause, classify, is_failure
from polarismail.values.reply import Reply, parse_rendered

SAID = [
    ("451 4.7.1 Greylisted, please try again later", Cause.GREYLISTED),
    (
        "450 4.2.0 <a@b.example>: Recipient address rejected: Greylisted, see http://postgrey.schweikert.ch",
        Cause.GREYLISTED,
    ),
    ("451 4.7.1 Greylisting in action, please come back later", Cause.GREYLISTED),
    ("451 Greylisted, please try again in 300 seconds", Cause.GREYLISTED),
    ("450 4.7.1 Client host rejected: cannot find your hostname", Cause.GREYLISTED),
    ("451 4.2.1 mailbox temporarily disabled", Cause.BUSY),
    ("452 4.2.2 The email account that you tried to reach is over quota", Cause.BUSY),
    ("450 mailbox busy", Cause.BUSY),
    ("450 4.2.1 The user you are trying to contact is receiving mail too quickly. Please resend later", Cause.BUSY),
    ("421 4.7.0 [TSS04] Messages from 192.0.2.1 temporarily deferred due to unexpected volume", Cause.BLOCKED),
    ("421 4.7.28 Our system has detected an unusual rate of unsolicited mail", Cause.BLOCKED),
    ("451 4.7.650 The mail server [192.0.2.1] has been temporarily rate limited due to IP reputation", Cause.BLOCKED),
    ("450 4.7.25 Client host rejected", Cause.BLOCKED),
    ("421 4.3.2 Service shutting down", Cause.CONNECT),
    ("421 4.4.2 Connection timed out", Cause.CONNECT),
    ("451 4.4.1 Connection refused", Cause.CONNECT),
    ("451 4.4.3 Name service failed", Cause.DNS),
    ("452 4.5.3 Too many recipients", Cause.CROWDED),
    ("552 Too many recipients", Cause.CROWDED),
    ("451 4.3.0 Temporary lookup failure", Cause.OTHER),
    ("452 4.3.1 Insufficient system storage", Cause.OTHER),
    ("451 oops", Cause.OTHER),
]


@pytest.mark.parametrize(("said", "cause"), SAID)
def test_causes(said: str, cause: Cause) -> None:
    assert classify(parse_rendered(said)) is cause


@given(st.integers(400, 599), st.text(max_size=2000))
def test_every_reply_has_a_cause(code: int, text: str) -> None:
    assert classify(Reply(code, None, text)) in Cause


@pytest.mark.parametrize(
    ("said", "explicit", "final"),
    [
        ("550 5.1.1 no such user", False, True),
        ("550 5.1.1 no such user", True, True),
        ("451 4.7.1 later", False, False),
        ("250 2.0.0 ok", False, False),
        ("552 5.5.3 Too many recipients", False, False),
        ("552 5.3.4 Message too big", False, True),
        ("535 5.7.8 bad credentials", True, False),
        ("530 5.7.0 log in first", True, False),
        ("530 5.7.0 log in first", False, True),
    ],
)
def test_what_is_final(said: str, explicit: bool, final: bool) -> None:
    assert is_failure(parse_rendered(said), explicit_route=explicit) is final
