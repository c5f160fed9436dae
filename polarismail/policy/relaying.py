# SPDX-License-Identifier: MIT
"""Who may send where: the one relay rule, taken on the parsed address that is also stored.

Guarantees: the decision depends on whether the client has logged in (or its network may relay), and on what the parsed
address means here; on nothing that the client claims (HELO, reverse-path), and on no text that is parsed a second time.
What is not accepted by name is refused. The local part is opaque: `%`, `!` and a quoted `@` in it route nothing, so
`user%remote@ours` is just a local name that nobody has (HOSTILE A1). Source routes were dropped by the parser
(RFC 5321 §C), and the final address is judged.
RFC 5321 §3.6.2 (relaying is by agreement), §3.4 and §7.4 (550 for the unknown).
"""

from __future__ import annotations

from polarismail.policy.verdict import ACCEPT, Reject, Verdict
from polarismail.store.interfaces import Account, Resolution
from polarismail.values.address import Mailbox
from polarismail.values.envelope import EXPANSION, LOCAL, NO_DSN_REQUEST, DsnRequest, Recipient
from polarismail.values.reply import RELAY_DENIED, UNKNOWN_RECIPIENT

_UNKNOWN = Reject(UNKNOWN_RECIPIENT)
_DENIED = Reject(RELAY_DENIED)


def check_recipient(
    resolution: Resolution, forward_path: Mailbox, *, account: Account | None, relay_network: bool = False
) -> Verdict:
    """May this session send to `forward_path`, which the directory resolved to `resolution`?

    `account` is who has logged in; `relay_network` is true where the listener lets the client's network relay without.
    An address of ours is for everybody, and one of ours that does not exist is for nobody, logged in or not. Foreign
    ones, address literals among them, are for those who may relay.
    """
    if resolution.ours:
        return ACCEPT if resolution.targets else _UNKNOWN
    if account is None and not relay_network:
        return _DENIED
    # The bare Postmaster has no domain to relay to; a directory that does not know it is empty (RFC 5321 §4.5.1).
    return ACCEPT if forward_path.domain else _UNKNOWN


def expand_recipient(
    resolution: Resolution, forward_path: Mailbox, dsn: DsnRequest = NO_DSN_REQUEST
) -> tuple[Recipient, ...]:
    """The recipients to store for a forward-path that `check_recipient` accepted: one for each target.

    A foreign address is one recipient whose next hop is its own domain. An alias with one target passes on what its sender
    asked. Where there are several, success is what is told of the alias itself: each target keeps the rest of NOTIFY, and one
    more recipient, EXPANSION, is what the sender hears of (RFC 3461 §5.2.7.2, §5.2.7.3).
    """
    if not resolution.ours:
        return (Recipient(forward_path, forward_path, forward_path.domain_ascii, None, dsn),)
    itself: tuple[Recipient, ...] = ()
    if dsn is not NO_DSN_REQUEST and len(resolution.targets) > 1 and dsn.notify and dsn.wants("SUCCESS"):
        itself = (Recipient(forward_path, forward_path, EXPANSION, None, dsn),)
        dsn = DsnRequest(_without_success(dsn.notify), dsn.orcpt)
    return itself + tuple(
        Recipient(target.mailbox, forward_path, target.mailbox.domain_ascii, None, dsn)
        if target.account is None
        else Recipient(target.mailbox, forward_path, LOCAL, target.account.id, dsn)
        for target in resolution.targets
    )


def _without_success(notify: str) -> str:
    # Who wanted to hear of success alone wants to hear of nothing else.
    return ",".join(word for word in notify.split(",") if word.upper() != "SUCCESS") or "NEVER"
