# SPDX-License-Identifier: MIT
"""The rarer parameters of MAIL, and what may be offered."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polarismail.net.listeners import Listener
from polarismail.values import reply as replies
from polarismail.values.reply import Reply
from polarismail.wire.smtp_events import Mail, Vrfy, Wishes
from polarismail.wire.smtp_grammar import parse_mail, parse_vrfy
from polarismail.wire.smtp_parameters import DEFAULT_OFFERS, OFFERABLE, parse_moment, render_moment

ALL = frozenset({"MT-PRIORITY", "FUTURERELEASE", "DELIVERBY", "REQUIRETLS"})


@pytest.mark.parametrize(
    ("parameters", "wishes"),
    [
        ("MT-PRIORITY=-9", Wishes(priority=-9)),
        ("mt-priority=0", Wishes(priority=0)),
        ("HOLDFOR=0", Wishes(hold_seconds=0)),
        ("HOLDFOR=999999999", Wishes(hold_seconds=999999999)),
        ("HOLDUNTIL=1970-01-01T00:01:00Z", Wishes(hold_until=60.0)),
        ("HOLDUNTIL=1970-01-01t02:00:30.5+02:00", Wishes(hold_until=30.5)),
        ("HOLDUNTIL=1969-12-31T22:30:59-01:30", Wishes(hold_until=59.0)),
        ("HOLDUNTIL=2016-12-31T23:59:60Z", Wishes(hold_until=1483228799.0)),
        ("BY=120;R", Wishes(by_seconds=120, by_return=True)),
        ("by=-5;nt", Wishes(by_seconds=-5, by_trace=True)),
        ("BY=+0;N", Wishes(by_seconds=0)),
        ("REQUIRETLS MT-PRIORITY=3 HOLDFOR=5", Wishes(priority=3, hold_seconds=5, require_tls=True)),
    ],
)
def test_wishes(parameters: str, wishes: Wishes) -> None:
    assert parse_mail(f"FROM:<> {parameters}", ALL) == Mail(None, wishes=wishes)
    assert parse_mail(f"FROM:<> {parameters}") == replies.UNKNOWN_PARAMETER


@pytest.mark.parametrize(
    "parameters",
    [
        "MT-PRIORITY",
        "MT-PRIORITY=10",
        "MT-PRIORITY=+1",
        "MT-PRIORITY=-0",
        "MT-PRIORITY=٣",
        "HOLDFOR",
        "HOLDFOR=-1",
        "HOLDFOR=1000000000",
        "HOLDFOR=1 HOLDUNTIL=2030-01-01T00:00:00Z",
        "HOLDUNTIL=2030-01-01T00:00:00",
        "HOLDUNTIL=2030-02-29T00:00:00Z",
        "HOLDUNTIL=2030-01-01T24:00:00Z",
        "HOLDUNTIL=2030-01-01T00:00:00+24:00",
        "HOLDUNTIL=2030-01-01T00:00:00+01:60",
        "HOLDUNTIL=0000-01-01T00:00:00Z",
        "BY=120",
        "BY=120;X",
        "BY=0;R",
        "BY=-1;RT",
        "BY=1000000000;N",
        "REQUIRETLS=yes",
    ],
)
def test_wishes_refused(parameters: str) -> None:
    assert parse_mail(f"FROM:<> {parameters}", ALL) == replies.BAD_SYNTAX


@given(st.integers(-30610224000, 253402300799))  # from the year 1000: strftime pads no shorter one
@settings(deadline=None)
def test_moments_go_round(when: int) -> None:
    assert parse_moment(render_moment(when)) == when


@given(st.text(max_size=40) | st.from_regex(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", fullmatch=True))
@settings(deadline=None)
def test_no_moment_raises(text: str) -> None:
    assert isinstance(parse_moment(text), float | None)


@given(st.text(max_size=60))
@settings(deadline=None)
def test_no_parameter_raises(text: str) -> None:
    for name in ("MT-PRIORITY", "HOLDFOR", "HOLDUNTIL", "BY", "REQUIRETLS"):
        assert isinstance(parse_mail(f"FROM:<> {name}={text}", ALL), Mail | Reply)


def test_vrfy_takes_the_parameter_where_it_is_offered() -> None:
    assert parse_vrfy("jo smtputf8", {"SMTPUTF8"}) == Vrfy("jo")
    assert parse_vrfy("jo SMTPUTF8") == Vrfy("jo SMTPUTF8")
    assert parse_vrfy("", {"SMTPUTF8"}) == replies.BAD_SYNTAX


def test_offers_are_chosen_from_what_can_be_honoured() -> None:
    assert Listener("a", 1, "mx").extensions == set(DEFAULT_OFFERS["mx"])
    assert {"FUTURERELEASE", "MT-PRIORITY"} <= Listener("a", 1, "submission").extensions
    assert Listener("a", 1, "mx", offers=()).extensions == set()
    assert Listener("a", 1, "mx", offers=OFFERABLE).extensions == set(OFFERABLE)
    for wrong, why in (
        ("DSNX", 'found "DSNX"$'),
        ("SIZE", r"which is offered wherever"),
        ("REQUIRETLS", "which is not honoured yet"),
        ("DELIVERBY", "which is not honoured yet"),
    ):
        with pytest.raises(ValueError, match=f"offers: expected some of PIPELINING, CHUNKING, DSN, .*{why}"):
            Listener("a", 1, "mx", offers=("DSN", wrong))
    with pytest.raises(ValueError, match="POP3 has not"):
        Listener("a", 1, "pop3", offers=("DSN",))
