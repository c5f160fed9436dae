# SPDX-License-Identifier: MIT
"""Limits of clients and of the networks around them: HOSTILE section 0, A4, A6, E6."""

from __future__ import annotations

from typing import Any

import pytest

from polarismail.net.shares import alone
from polarismail.policy.limits import ClientLimits, LimitedClient, RateLimits

HOUR, DAY = 3600.0, 86400.0


class World:
    def __init__(self, **settings: Any) -> None:
        self.now = 100 * DAY
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.limits = ClientLimits(
            RateLimits(**settings),
            alone(),
            now=lambda: self.now,
            record_event=lambda name, fields: self.events.append((name, fields)),
        )

    def client(self, address: str = "192.0.2.1") -> LimitedClient:
        found = self.limits.client(address)
        assert found is not None
        return found


def test_who_is_trusted_is_not_judged() -> None:
    world = World(connections_per_minute=1, trusted_networks=("127.0.0.0/8", "198.51.100.0/24"))
    assert world.limits.client("127.0.0.1") is world.limits.client("198.51.100.7") is world.limits.client("") is None
    assert [world.limits.may_connect("198.51.100.7") for _ in range(5)] == [""] * 5
    with pytest.raises(ValueError, match="trusted_networks"):
        RateLimits(trusted_networks=("everybody",))


def test_connections_of_a_client_and_of_its_network() -> None:
    world = World(connections_per_minute=2, network_connections_per_minute=3)
    assert [world.limits.may_connect("192.0.2.1") for _ in range(3)] == ["", "", "rate"]
    assert world.limits.may_connect("192.0.2.2") == "rate"  # the fourth of the network
    assert world.limits.may_connect("192.0.3.1") == ""
    assert [world.limits.may_connect(f"2001:db8::{at}") for at in range(3)] == ["", "", "rate"]
    world.now += 130
    assert world.limits.may_connect("192.0.2.1") == ""
    assert [fields["of"] for _, fields in world.events] == ["192.0.2.1", "192.0.2.0/24", "2001:db8::/64"]


def test_transactions_and_recipients() -> None:
    world = World(transactions_per_minute=1, recipients_per_minute=2)
    client = world.client()
    replies = [client.check_mail(), client.check_mail()]
    assert replies[0] is None
    assert str(replies[1]) == "450 4.7.0 Too many messages from your network in a minute, try again later"
    recipients = [client.check_rcpt() for _ in range(3)]
    assert recipients[:2] == [None, None]
    assert str(recipients[2]) == "452 4.7.0 Too many recipients from your network in a minute, try again later"


def test_no_limit_by_default_for_those_who_only_bring_much_mail() -> None:
    client = World().client()
    assert not any(client.check_mail() or client.check_rcpt() for _ in range(5000))


def test_a_network_that_guesses_learns_nothing_more_that_day() -> None:
    world = World(unknown_recipients_per_day=3, network_unknown_recipients_per_day=5)
    client = world.client()
    assert client.check_mail() is None
    for _ in range(3):
        assert client.check_rcpt() is None
        client.guessed()
    assert (
        str(client.check_rcpt()) == "450 4.7.0 Too many unknown recipients from your network in a day, try again later"
    )
    other = world.client("192.0.2.9")
    assert other.check_mail() is other.check_rcpt() is None
    other.guessed()
    other.guessed()
    assert other.check_rcpt() is not None  # the network's fifth
    assert [fields["of"] for _, fields in world.events] == ["192.0.2.1", "192.0.2.0/24"]
    third = world.client("192.0.2.10")
    assert third.check_mail() is None and third.check_rcpt() is not None
    elsewhere = world.client("192.0.3.1")
    assert elsewhere.check_mail() is elsewhere.check_rcpt() is None
    assert third.check_rcpt() is not None
    world.now += 2 * DAY
    assert client.check_mail() is client.check_rcpt() is None


def test_failures_keep_a_client_out_until_they_are_fewer() -> None:
    world = World(failures_per_hour=3)
    for _ in range(3):
        world.client().failed()
    assert world.limits.may_connect("192.0.2.1") == "failures"
    assert world.limits.may_connect("192.0.2.2") == ""
    world.now += 2 * HOUR
    assert world.limits.may_connect("192.0.2.1") == ""


def test_wrong_logins_of_a_network() -> None:
    world = World(login_failures_per_day=2)
    client = world.client()
    for _ in range(2):
        assert client.check_login() is None
        client.login_failed("ann@here.test")
    assert str(client.check_login()) == "454 4.7.0 Too many wrong logins from your network in a day, try again later"
    assert world.client("203.0.113.5").check_login() is None


def test_a_name_is_slowed_from_everywhere_and_never_locked() -> None:
    world = World(slow_login_failures=3)
    delays = [world.client(f"203.0.{at}.5").login_failed("Ann@here.test") for at in range(40)]
    assert delays[:3] == [0.0] * 3 and delays[3:6] == [1.0, 2.0, 4.0] and delays[-1] == 10.0
    assert world.client("198.51.100.1").check_login() is None
    assert world.client("198.51.100.1").login_failed("bob@here.test") == 0.0


def test_the_log_is_told_once_and_not_flooded() -> None:
    world = World(connections_per_minute=1)
    for network in range(50):
        for _ in range(5):
            world.limits.may_connect(f"203.0.{network}.1")
    assert len(world.events) == 10
    assert world.events[0] == (
        "limit-reached",
        {"client": "203.0.0.1", "limit": "connections_per_minute", "of": "203.0.0.1", "allowed": 1},
    )


def test_other_settings_apply_at_once() -> None:
    world = World()
    client = world.client()
    client.guessed()
    world.limits.change_settings(RateLimits(unknown_recipients_per_day=1))
    assert client.check_mail() is None and client.check_rcpt() is not None
