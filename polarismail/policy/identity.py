# SPDX-License-Identifier: MIT
"""Who may say that they are whom: the addresses under which an account sends.

Guarantees: an account may use its own address, with any +detail, and every address of ours that leads to it (alias,
catch-all, postmaster), as the directory says; and the null path, which answers and reports need. Nothing else: no foreign
address, nor that of another account, whatever the client claims (HOSTILE A3).
RFC 6409 §6.1 (a submission server may refuse an address that it knows is not the submitter's).
"""

from __future__ import annotations

from polarismail.policy.verdict import ACCEPT, Reject, Verdict
from polarismail.store.interfaces import Account, Resolution
from polarismail.values.reply import NOT_YOUR_ADDRESS

_DENIED = Reject(NOT_YOUR_ADDRESS)


def check_identity(resolution: Resolution, account: Account) -> Verdict:
    """May `account` send as the address that the directory resolved to `resolution`?"""
    for target in resolution.targets:
        if target.account is not None and target.account.id == account.id:
            return ACCEPT
    return _DENIED
