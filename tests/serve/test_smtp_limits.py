# SPDX-License-Identifier: MIT
"""Limits of a client's network in a session: what is refused, when, and who is not asked (HOSTILE A4, A6, E6)."""

from __future__ import annotations

import socket
from typing import Any

from polarismail.policy.limits import RateLimits
from tests.serve.smtp_world import SmtpWorld

GOOD, BAD = "AUTH PLAIN AGFubgBzZWNyZXQ=", "AUTH PLAIN AGFubgB3cm9uZw=="


def limits(**settings: Any) -> RateLimits:
    return RateLimits(trusted_networks=(), **settings)


def test_who_guessed_too_much_learns_nothing_more_in_this_session_or_the_next() -> None:
    with SmtpWorld(rates=limits(unknown_recipients_per_day=3)) as world:
        with world.client() as client:
            assert client.say("MAIL FROM:<a@b.test>") == 250
            assert [client.say("RCPT TO:<unknown@here.test>") for _ in range(4)] == [550] * 3 + [450]
            assert client.say("RCPT TO:<bob@here.test>") == 450
        with world.client() as client:
            assert client.say("MAIL FROM:<a@b.test>") == 250
            assert client.say("RCPT TO:<bob@here.test>") == client.say("RCPT TO:<unknown@here.test>") == 450
            assert client.lines == ["4.7.0 Too many unknown recipients from your network in a day, try again later"]
        with world.client() as client:
            assert client.say(GOOD) == 235
            client.begin()
            client.send(b".\r\n")
            assert client.reply() == 250
        assert [fields["limit"] for name, fields in world.events if name == "limit-reached"] == [
            "unknown_recipients_per_day"
        ]
        world.now += 2 * 86400
        with world.client() as client:
            client.begin()


def test_wrong_logins_end_before_the_password_is_looked_at() -> None:
    with SmtpWorld(rates=limits(login_failures_per_day=2, slow_login_failures=0)) as world:
        with world.client() as client:
            assert [client.say(BAD), client.say(BAD), client.say(BAD), client.say(GOOD)] == [535, 535, 454, 454]
        assert world.logins == []
        with world.client() as client:
            client.begin()  # mail is another matter


def test_too_many_connections_in_a_minute() -> None:
    with SmtpWorld(rates=limits(connections_per_minute=2)) as world:
        for _ in range(2):
            with world.client() as client:
                assert client.say("QUIT") == 221
        with socket.create_connection(("127.0.0.1", world.port), 10) as raw:
            assert raw.makefile("rb").read().startswith(b"421 4.7.0 ")
        world.wait_until_empty()
        assert world.counter.refused == {"rate": 1}
        world.now += 130
        with world.client():
            pass


def test_failures_of_all_sessions_keep_a_client_out() -> None:
    with SmtpWorld(rates=limits(failures_per_hour=4)) as world:
        for _ in range(2):
            with world.client() as client:
                assert client.say("BOGUS") == client.say("BOGUS") == 500
        with socket.create_connection(("127.0.0.1", world.port), 10) as raw:
            assert raw.makefile("rb").read().startswith(b"421 4.7.0 ")
        assert world.counter.refused == {"failures": 1}


def test_messages_and_recipients_in_a_minute() -> None:
    with SmtpWorld(rates=limits(transactions_per_minute=1, recipients_per_minute=1)) as world, world.client() as client:
        assert client.say("MAIL FROM:<a@b.test>") == 250
        assert client.say("RCPT TO:<bob@here.test>") == 250
        assert client.say("RCPT TO:<ann@here.test>") == 452
        assert client.say("RSET") == 250
        assert client.say("MAIL FROM:<a@b.test>") == 450
        assert client.say(GOOD) == 235
        client.begin()
