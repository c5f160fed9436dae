# SPDX-License-Identifier: MIT
"""The relay rule: the matrix HOSTILE A1, and what a login changes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polarismail.policy.relaying import check_recipient, expand_recipient
from polarismail.policy.verdict import ACCEPT, Reject, Verdict
from polarismail.store.interfaces import Account, Resolution, Target
from polarismail.values.address import Mailbox, parse_path
from polarismail.values.envelope import LOCAL, DsnRequest
from polarismail.values.errors import BadAddress
from polarismail.values.reply import RELAY_DENIED, UNKNOWN_RECIPIENT

JOE = Account(7, Mailbox("user", "local.example"), "accounts/000/7", None, None, "")
DENIED, UNKNOWN = Reject(RELAY_DENIED), Reject(UNKNOWN_RECIPIENT)


def resolve(mailbox: Mailbox) -> Resolution:
    """A directory with one domain, one account, and Postmaster."""
    if mailbox.domain == "" or (mailbox.local.lower(), mailbox.domain) == ("user", "local.example"):
        return Resolution(True, (Target(JOE.address, JOE),))
    return Resolution(mailbox.domain == "local.example")


def judge(path: str, account: Account | None = None, relay_network: bool = False) -> Verdict:
    mailbox = parse_path(path)
    assert mailbox is not None
    return check_recipient(resolve(mailbox), mailbox, account=account, relay_network=relay_network)


@pytest.mark.parametrize(
    ("path", "stranger", "logged_in"),
    [
        ("user@local.example", ACCEPT, ACCEPT),
        ("USER@LOCAL.EXAMPLE", ACCEPT, ACCEPT),
        ("nobody@local.example", UNKNOWN, UNKNOWN),
        ("user@remote.example", DENIED, ACCEPT),
        # Routing in the local part routes nothing: these are names that nobody has.
        ("user%remote.example@local.example", UNKNOWN, UNKNOWN),
        ('"user@remote.example"@local.example', UNKNOWN, UNKNOWN),
        ('"user%remote.example"@local.example', UNKNOWN, UNKNOWN),
        ("remote.example!user@local.example", UNKNOWN, UNKNOWN),
        ('"user@local.example"@remote.example', DENIED, ACCEPT),
        ("user%local.example@remote.example", DENIED, ACCEPT),
        ("local.example!user@remote.example", DENIED, ACCEPT),
        # A source route is dropped, and the final address is judged.
        ("@local.example:user@remote.example", DENIED, ACCEPT),
        ("@local.example,@local.example:user@remote.example", DENIED, ACCEPT),
        ("@remote.example:user@local.example", ACCEPT, ACCEPT),
        ("user@[127.0.0.1]", DENIED, ACCEPT),
        ("user@[192.0.2.25]", DENIED, ACCEPT),
        ("user@[IPv6:::1]", DENIED, ACCEPT),
        ("user@sub.local.example", DENIED, ACCEPT),
        ("user@notlocal.example", DENIED, ACCEPT),
    ],
)
def test_the_matrix(path: str, stranger: Verdict, logged_in: Verdict) -> None:
    assert judge(path) == stranger
    assert judge(path, JOE) == logged_in
    assert judge(path, None, relay_network=True) == logged_in


@pytest.mark.parametrize(
    "path",
    [
        "user@remote.example@local.example",
        "user@local.example@remote.example",
        "user@local.example.",
        "user@remote.example.",
        "@local.example:@remote.example:user@x.example",
        "@a,@b:c@d;e",
        "user@remote.example>;",
        '""@local.example',
        "user@127.0.0.1",
        "user @remote.example",
        "=?utf-8?q?a=40b?= @x.example",
        "user\0@local.example",
        "user",
        "@",
    ],
)
def test_what_is_no_address_never_reaches_the_rule(path: str) -> None:
    with pytest.raises(BadAddress):
        parse_path(path)


def test_the_bare_postmaster() -> None:
    bare = Mailbox("Postmaster", "")
    assert check_recipient(resolve(bare), bare, account=None) == ACCEPT
    assert check_recipient(Resolution(False), bare, account=None) == DENIED
    assert check_recipient(Resolution(False), bare, account=JOE) == UNKNOWN


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet='ab@%!".:[],\\<>;1+ \0\r\n\u00fc', max_size=40))
def test_a_stranger_reaches_nothing_but_our_mailboxes(text: str) -> None:
    for path in (text, f"{text}@remote.example", f"user@{text}", f"{text}@local.example"):
        try:
            mailbox = parse_path(path)
        except BadAddress:
            continue
        if mailbox is not None:
            resolution = resolve(mailbox)
            verdict = check_recipient(resolution, mailbox, account=None)
            if verdict == ACCEPT:
                assert all(r.next_hop == LOCAL for r in expand_recipient(resolution, mailbox))


def test_recipients_of_what_was_accepted() -> None:
    dsn = DsnRequest("FAILURE", "rfc822;x")
    foreign = Mailbox("x", "b\u00fccher.example")
    (one,) = expand_recipient(Resolution(False), foreign, dsn)
    assert (one.forward_path, one.original, one.next_hop) == (foreign, foreign, "xn--bcher-kva.example")
    assert (one.account_id, one.dsn) == (None, dsn)
    alias = Mailbox("team", "local.example")
    here, there = expand_recipient(
        Resolution(True, (Target(JOE.address, JOE), Target(Mailbox("y", "z.example")))), alias
    )
    assert (here.forward_path, here.original, here.next_hop, here.account_id) == (JOE.address, alias, LOCAL, 7)
    assert (there.forward_path, there.original, there.next_hop) == (Mailbox("y", "z.example"), alias, "z.example")
    (literal,) = expand_recipient(Resolution(False), Mailbox("x", "[192.0.2.1]"))
    assert literal.next_hop == "[192.0.2.1]"
