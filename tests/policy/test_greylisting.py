# SPDX-License-Identifier: MIT
"""The greylist's judgement as a function of what is known and what time it is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polarismail.policy.greylisting import (
    GreylistSettings,
    Standing,
    is_trusted_client,
    judge,
    triplet_of,
)
from polarismail.policy.verdict import ACCEPT, Defer
from polarismail.store.greylist import ClientRecord, Triplet, TripletRecord
from polarismail.values.address import Mailbox

SETTINGS = GreylistSettings()
DAY = 86400.0
T0 = 1_800_000_000.0


def test_defaults_are_those_of_the_design() -> None:
    assert (SETTINGS.enabled, SETTINGS.delay_seconds, SETTINGS.window_seconds) == (True, 300, 2 * DAY)
    assert (SETTINGS.lifetime_seconds, SETTINGS.client_passes) == (35 * DAY, 5)
    assert (SETTINGS.prefix_v4, SETTINGS.prefix_v6) == (24, 64)


def test_first_contact_waits_the_whole_delay() -> None:
    judgement = judge(None, T0, SETTINGS)
    assert judgement.standing is Standing.FIRST
    assert isinstance(judgement.verdict, Defer)
    assert str(judgement.verdict.reply) == "451 4.7.1 Greylisted, please try again in 300 seconds"
    assert judgement.record == TripletRecord(T0, T0)


@pytest.mark.parametrize(
    ("after", "standing"),
    [
        (0, Standing.EARLY),
        (1, Standing.EARLY),
        (299.9, Standing.EARLY),
        (300, Standing.PASSED),
        (2 * DAY, Standing.PASSED),
        (2 * DAY + 1, Standing.FIRST),
        (-1, Standing.FIRST),  # the clock jumped back
    ],
)
def test_a_retry(after: float, standing: Standing) -> None:
    first = TripletRecord(T0, T0)
    judgement = judge(first, T0 + after, SETTINGS)
    assert judgement.standing is standing
    assert (judgement.verdict == ACCEPT) == (standing is Standing.PASSED)
    if standing is Standing.EARLY:
        assert judgement.record is first


@pytest.mark.parametrize(("left", "text"), [(250.5, "251 seconds"), (1, "1 second"), (0.2, "1 second")])
def test_the_seconds_left_are_told(left: float, text: str) -> None:
    verdict = judge(TripletRecord(T0, T0), T0 + 300 - left, SETTINGS).verdict
    assert isinstance(verdict, Defer) and verdict.reply.text.endswith(f"in {text}")


def test_what_passed_stays_passed_while_it_is_used() -> None:
    passed = TripletRecord(T0, T0 + 300, True, 1)
    later = T0 + 300 + 35 * DAY
    known = judge(passed, later, SETTINGS)
    assert known.standing is Standing.KNOWN and known.verdict == ACCEPT
    assert known.record == TripletRecord(T0, later, True, 2)
    again = judge(passed, later + 1, SETTINGS)
    assert again.standing is Standing.FIRST and again.record == TripletRecord(later + 1, later + 1)
    back = judge(passed, T0 - 1000, SETTINGS)
    assert back.verdict == ACCEPT and back.record.last_seen == passed.last_seen


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.none(),
        st.builds(TripletRecord, st.floats(0, 4e9), st.floats(0, 4e9), st.booleans(), st.integers(0, 9)),
    ),
    st.floats(0, 4e9),
)
def test_nobody_waits_longer_than_the_delay_and_whoever_comes_back_passes(
    record: TripletRecord | None, now: float
) -> None:
    judgement = judge(record, now, SETTINGS)
    if judgement.verdict != ACCEPT:
        assert judge(judgement.record, now + SETTINGS.delay_seconds + 1, SETTINGS).verdict == ACCEPT


def test_networks_make_one_client() -> None:
    def key(address: str) -> Triplet:
        return triplet_of(address, None, Mailbox("joe", "ours.example"), SETTINGS)

    assert key("192.0.2.1") == key("192.0.2.254") == key("::ffff:192.0.2.7")
    assert key("192.0.2.1") != key("192.0.3.1")
    assert key("2001:db8:0:1::1") == key("2001:db8:0:1:ffff::9")
    assert key("2001:db8:0:1::1") != key("2001:db8:0:2::1")
    assert key("192.0.2.1") == Triplet("192.0.2.0/24", "", "joe@ours.example")


def test_addresses_are_folded_and_fit_for_a_database() -> None:
    odd = triplet_of("", Mailbox("A\udc80\0", "B.example"), Mailbox("JOE", "ours.example"), SETTINGS)
    assert odd.forward_path == "joe@ours.example"
    odd.reverse_path.encode("utf-8")
    assert "\0" not in odd.reverse_path


def test_trusted_clients() -> None:
    assert not is_trusted_client(None, T0, SETTINGS)
    assert not is_trusted_client(ClientRecord(4, T0), T0, SETTINGS)
    assert is_trusted_client(ClientRecord(5, T0), T0 + 35 * DAY, SETTINGS)
    assert not is_trusted_client(ClientRecord(5, T0), T0 + 35 * DAY + 1, SETTINGS)
    assert not is_trusted_client(ClientRecord(99, T0), T0, GreylistSettings(client_passes=0))


@pytest.mark.parametrize(
    "wrong", [{"allow_networks": ("nonsense",)}, {"prefix_v4": 33}, {"prefix_v6": 129}, {"prefix_v4": -1}]
)
def test_settings_that_make_no_sense(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GreylistSettings(**wrong)  # type: ignore[arg-type]
