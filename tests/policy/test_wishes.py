# SPDX-License-Identifier: MIT
"""What is granted to whom."""

from __future__ import annotations

import pytest

from polarismail.policy.wishes import WishSettings, grant
from polarismail.values.envelope import MailOptions
from polarismail.values.reply import BAD_HOLD, NEED_LOGIN_TO_HOLD, SENDER_OK, Reply
from polarismail.wire.smtp_events import Wishes

NOW = 1_800_000_000.0
SETTINGS = WishSettings(max_priority=4, max_hold_seconds=100)


def granted(wishes: Wishes, is_known: bool = True) -> tuple[Reply, MailOptions | None]:
    return grant(wishes, is_known=is_known, now=NOW, settings=SETTINGS)


@pytest.mark.parametrize(
    ("is_known", "wished", "given"),
    [(True, 4, 4), (True, 9, 4), (True, -9, -9), (True, 0, 0), (False, 1, 0), (False, 9, 0), (False, -3, -3)],
)
def test_a_priority_is_lowered_to_what_is_allowed_and_that_is_said(is_known: bool, wished: int, given: int) -> None:
    reply, options = granted(Wishes(priority=wished), is_known)
    assert options == MailOptions(priority=given)
    if wished == given:
        assert reply is SENDER_OK
    else:
        assert (reply.code, reply.status) == (250, (2, 3, 6)) and reply.text.startswith(f"{given} ")


@pytest.mark.parametrize(
    ("wishes", "until"),
    [
        (Wishes(hold_seconds=0), NOW),
        (Wishes(hold_seconds=100), NOW + 100),
        (Wishes(hold_seconds=101), None),
        (Wishes(hold_until=NOW + 99.5), NOW + 99.5),
        (Wishes(hold_until=NOW + 101), None),
        (Wishes(hold_until=NOW - 1), None),
    ],
)
def test_a_release_is_between_now_and_the_bound(wishes: Wishes, until: float | None) -> None:
    reply, options = granted(wishes)
    assert (reply, options) == ((BAD_HOLD, None) if until is None else (SENDER_OK, MailOptions(hold_until=until)))
    assert granted(wishes, is_known=False) == (NEED_LOGIN_TO_HOLD, None)


def test_what_is_not_offered_yet_is_kept_all_the_same() -> None:
    _, options = granted(Wishes(by_seconds=-5, by_trace=True, require_tls=True))
    assert options == MailOptions(deliver_by=NOW - 5, by_trace=True, require_tls=True)


def test_settings_are_within_the_protocol() -> None:
    with pytest.raises(ValueError, match="max_priority: expected -9 to 9"):
        WishSettings(max_priority=10)
    with pytest.raises(ValueError, match="max_hold_seconds: expected 1 to"):
        WishSettings(max_hold_seconds=0)
