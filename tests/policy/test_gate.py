# SPDX-License-Identifier: MIT
"""The gate's judgement: what lists say is summed up, and silence is never held against a client."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polarismail.net.dnsbl import Hit, Listing
from polarismail.net.gate import WaitSettings
from polarismail.policy.gate import GateSettings, earns_a_pass, is_vouched_for, refusal, score

HITS = st.lists(st.builds(Hit, st.sampled_from(["bl.test", "other.test", "wl.test"]), st.integers(-10, 10)))


@given(HITS, st.integers(1, 20))
def test_refused_is_who_reaches_the_threshold_and_the_lists_against_it_are_named(
    hits: list[Hit], threshold: int
) -> None:
    reply = refusal("192.0.2.1", hits, GateSettings(threshold=threshold))
    assert (reply is not None) == (sum(hit.weight for hit in hits) >= threshold)
    if reply is not None:
        assert reply.code == 554 and reply.status == (5, 7, 1)
        assert "192.0.2.1" in reply.text
        named = reply.text.partition(" is listed by ")[2].split(", ")
        assert named and set(named) == {hit.name for hit in hits if hit.weight > 0}


@given(HITS, st.booleans())
def test_nobody_is_both_refused_and_vouched_for(hits: list[Hit], complete: bool) -> None:
    vouched = is_vouched_for(Listing(tuple(hits), complete))
    assert not (vouched and refusal("192.0.2.1", hits, GateSettings()) is not None)
    assert vouched == (complete and score(hits) < 0)


def test_who_is_on_no_list_is_never_refused() -> None:
    assert refusal("192.0.2.1", (), GateSettings()) is None


def test_a_setting_makes_it_try_again() -> None:
    reply = refusal("2001:db8::1", [Hit("bl.test", 1)], GateSettings(listed="defer"))
    assert str(reply) == "421 4.7.1 Client 2001:db8::1 is listed by bl.test"


def test_a_wait_that_a_crowd_cut_short_earns_nothing() -> None:
    settings = GateSettings(wait=WaitSettings(wait_seconds=6.0, stress_wait_seconds=2.0))
    assert earns_a_pass(6.0, settings) and earns_a_pass(2.0, settings)
    assert not earns_a_pass(1.0, settings)


def test_settings_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match="threshold: expected 1 or more"):
        GateSettings(threshold=0)
    with pytest.raises(ValueError, match=r"allow_networks: .*expected e\.g\. 192\.0\.2\.0/24"):
        GateSettings(allow_networks=("everybody",))
