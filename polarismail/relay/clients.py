# SPDX-License-Identifier: MIT
"""Whom a session speaks to, how long it waits for each answer, and how it says that none came about.

RFC 5321 §4.5.3.2 (time-outs; the values are those of NUMBERS).
"""

from __future__ import annotations

from attrs import frozen
from twisted.internet.error import ConnectBindError, ConnectError, ConnectionRefusedError, TimeoutError

from polarismail.values.errors import PolarisError
from polarismail.values.reply import Reply
from polarismail.wire.smtp_client import Step


@frozen
class RemoteHost:
    """One address of one host of a next hop. `name` is what SNI and certificates are about."""

    name: str
    address: str
    port: int = 25

    def __str__(self) -> str:
        return f"{self.name}[{self.address}]:{self.port}"


@frozen
class ClientSettings:
    """How we speak to next hops."""

    hostname: str = "localhost"  # what EHLO says
    connect_seconds: float = 30.0
    greeting_seconds: float = 60.0
    ehlo_seconds: float = 120.0
    handshake_seconds: float = 30.0
    auth_seconds: float = 120.0
    mail_seconds: float = 300.0
    rcpt_seconds: float = 300.0
    data_seconds: float = 120.0
    block_seconds: float = 180.0
    final_seconds: float = 600.0  # never lower: shorter makes duplicates
    rset_seconds: float = 20.0
    quit_seconds: float = 5.0
    max_recipients: int = 100  # for one transaction; RFC 5321 §4.5.3.1.8 lets a server stop there
    piece_octets: int = 65536  # one in `block_seconds` at least
    ca_path: str | None = None  # trust this instead of the platform's store, for verified TLS

    def seconds_for(self, step: Step) -> float:
        """How long the reply to `step` may take."""
        return float(getattr(self, _SECONDS[step]))


class ConnectFailed(PolarisError):
    """No session came about. `reply` is the remote's last word or ours in its place; it may be 5yz, but unless `permanent`
    is set it speaks of this address now, not of the mail: try another address, then later.

    `tls_broken`: STARTTLS was offered and did not work; where TLS is opportunistic, connect again with `tls="none"`.
    `resumed`: a TLS handshake failed that offered an earlier session, which is forgotten: connect again, all else alike.
    """

    def __init__(self, reply: Reply, permanent: bool = False, tls_broken: bool = False, resumed: bool = False) -> None:
        super().__init__(str(reply))
        self.reply, self.permanent, self.tls_broken, self.resumed = reply, permanent, tls_broken, resumed


_SECONDS = {
    Step.GREETING: "greeting_seconds",
    Step.EHLO: "ehlo_seconds",
    Step.HELO: "ehlo_seconds",
    Step.STARTTLS: "ehlo_seconds",
    Step.AUTH: "auth_seconds",
    Step.RSET: "rset_seconds",
    Step.MAIL: "mail_seconds",
    Step.RCPT: "rcpt_seconds",
    Step.DATA: "data_seconds",
    Step.CONTENT: "final_seconds",
    Step.QUIT: "quit_seconds",
}
_WAITS = {step: f"while waiting for the answer to {step.name}" for step in Step} | {
    Step.GREETING: "while waiting for the greeting",
    Step.CONTENT: "while waiting for the verdict on the message: it may have arrived",
}


def where(step: Step | None) -> str:
    """The end of a sentence that begins with "Lost the connection" or "Timed out"."""
    return _WAITS[step] if step is not None else "while idle"


def local_reply(status_class: int, subject: int, detail: int, text: str) -> Reply:
    """What we say in the place of a server that said nothing fit to be told; always temporary."""
    return Reply(451, (status_class, subject, detail), text)


def connect_reply(problem: BaseException) -> Reply:
    """What a failed connect means, without the reactor's words."""
    if isinstance(problem, ConnectBindError):
        return local_reply(4, 3, 5, f"Cannot send from the configured address: {problem.osError or 'not ours'}")
    if isinstance(problem, TimeoutError):
        return local_reply(4, 4, 1, "Cannot connect: timed out")
    if isinstance(problem, ConnectionRefusedError):
        return local_reply(4, 4, 1, "Cannot connect: connection refused")
    if isinstance(problem, ConnectError):
        return local_reply(4, 4, 1, f"Cannot connect: {problem.osError or type(problem).__name__}")
    return local_reply(4, 4, 1, f"Cannot connect: {type(problem).__name__}")
