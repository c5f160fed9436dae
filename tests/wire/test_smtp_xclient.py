# SPDX-License-Identifier: MIT
"""What front ends say: each value is of its kind or the command is refused; nothing raises."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from polarismail.values.reply import BAD_SYNTAX
from polarismail.wire.smtp_xclient import Claims, parse_xclient, parse_xforward


@pytest.mark.parametrize(
    ("argument", "claims"),
    [
        ("ADDR=192.0.2.7", Claims(address="192.0.2.7")),
        ("addr=IPV6:2001:DB8::1 port=2525", Claims(address="2001:db8::1", port=2525)),
        ("ADDR=IPv6:::ffff:192.0.2.7", Claims(address="192.0.2.7")),
        ("NAME=[UNAVAILABLE]  ADDR=[unavailable] PORT=[TEMPUNAVAIL]", Claims(name="", address="unknown", port=0)),
        ("NAME=mail.example.org PROTO=esmtp", Claims(name="mail.example.org", protocol="ESMTP")),
        ("HELO=a+20b+2Bc LOGIN=j+C3+B6e@here.test", Claims(helo="a b+c", login="jöe@here.test")),
        ("ADDR=192.0.2.7 DESTADDR=192.0.2.1 DESTPORT=25", Claims(address="192.0.2.7")),
        ("LOGIN=[UNAVAILABLE]", Claims(login="")),
        ("HELO=[192.0.2.7]", Claims(helo="[192.0.2.7]")),
    ],
)
def test_xclient(argument: str, claims: Claims) -> None:
    assert parse_xclient(argument) == claims


def test_xforward() -> None:
    said = parse_xforward(
        "NAME=spike.example.org ADDR=192.0.2.7 PORT=1025 PROTO=SMTP HELO=spike IDENT=4Xyz SOURCE=remote"
    )
    assert said == Claims("spike.example.org", "192.0.2.7", 1025, "SMTP", "spike", None, "4Xyz", "REMOTE")
    assert str(said) == "spike.example.org[192.0.2.7]:1025 helo=spike proto=SMTP id=4Xyz source=REMOTE"
    assert str(parse_xforward("IDENT=x ADDR=[UNAVAILABLE]")) == "unknown[unknown] id=x"


@pytest.mark.parametrize(
    "argument",
    [
        "",
        " ",
        "ADDR",
        "ADDR=",
        "=x",
        "ADDR=192.0.2.256",
        "ADDR=192.0.2.7.",
        "ADDR=0300.1.2.3",
        "ADDR=2001:db8::1",
        "ADDR=IPV6:192.0.2.7",
        "ADDR=IPV6:fe80::1+25eth0",
        "ADDR=192.0.2.7 ADDR=192.0.2.8",
        "PORT=65536",
        "PORT=-1",
        "PORT=000025",
        "PORT=+D9+A1",
        "PROTO=HTTP",
        "NAME=a+0D+0Ab",
        "NAME=a+20b",
        "HELO=a+00",
        "HELO=a+1",
        "HELO=a=b",
        "HELO=ä",
        "LOGIN=+FF",
        "HELO=" + "x" * 256,
        "HELO=" + "+41" * 256,
        "DESTPORT=x",
        "FOO=bar",
        "IDENT=x",
        "SOURCE=LOCAL",
        "NAME=a FOO=bar",
    ],
)
def test_what_is_refused(argument: str) -> None:
    assert parse_xclient(argument) is BAD_SYNTAX
    if "IDENT" not in argument and "SOURCE" not in argument:
        assert parse_xforward(argument) is BAD_SYNTAX


def test_what_is_said_later_stands_for_what_was_said_before() -> None:
    assert Claims(name="a", port=7).updated(Claims(name="", helo="b")) == Claims(name="", port=7, helo="b")


words = st.sampled_from(("NAME", "ADDR", "PORT", "PROTO", "HELO", "LOGIN", "IDENT", "SOURCE", "DESTADDR", "X"))
values = st.text(max_size=40) | st.sampled_from(("[UNAVAILABLE]", "IPV6:::", "192.0.2.7", "+41", "٢", "+D9+A2"))


@given(
    st.lists(st.tuples(words, values), max_size=5).map(lambda said: " ".join(f"{n}={v}" for n, v in said)) | st.text()
)
@example("PORT=²")
def test_nothing_raises_and_nothing_breaks_a_line(argument: str) -> None:
    for parse in (parse_xclient, parse_xforward):
        said = parse(argument)
        if isinstance(said, Claims):
            assert str(said).isprintable()
            assert len(str(said)) < 3000
