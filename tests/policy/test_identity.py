# SPDX-License-Identifier: MIT
"""HOSTILE A3: an account sends under addresses that lead to it, and no others."""

from __future__ import annotations

import pytest

from polarismail.policy.identity import check_identity
from polarismail.policy.verdict import ACCEPT, Reject
from polarismail.store.addresses import FOREIGN, NOBODY
from polarismail.store.interfaces import Account, Resolution, Target
from polarismail.values.address import Mailbox


def account(number: int, name: str) -> Account:
    return Account(number, Mailbox(name, "here.test"), str(number), None, None, "")


ANN, BOB = account(1, "ann"), account(2, "bob")


def leads_to(*accounts: Account) -> Resolution:
    return Resolution(True, tuple(Target(one.address, one) for one in accounts))


@pytest.mark.parametrize("resolution", [leads_to(ANN), leads_to(BOB, ANN)])
def test_what_leads_to_the_account_is_its_own(resolution: Resolution) -> None:
    assert check_identity(resolution, ANN) is ACCEPT


@pytest.mark.parametrize(
    "resolution",
    [FOREIGN, NOBODY, leads_to(BOB), Resolution(True, (Target(Mailbox("ann", "here.test")),))],
)
def test_all_else_is_not(resolution: Resolution) -> None:
    verdict = check_identity(resolution, ANN)
    assert isinstance(verdict, Reject) and str(verdict.reply).startswith("553 5.7.1 ")
