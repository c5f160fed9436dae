# SPDX-License-Identifier: MIT
"""What each command means to the engine: its event, or the reply that refuses it, for where the session stands now.

Guarantees: nothing here changes the engine but the count of recipients that were tried and what a BDAT begins, the octets of
which come whatever is answered; what is no command of ours is told apart from what is an attack by another protocol (HOSTILE
F7).

RFC 5321 §4.1.1, RFC 2033 §4, RFC 3030 §2, RFC 3207 §4, RFC 4954 §4.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from polarismail.values import reply as replies
from polarismail.values.reply import Reply
from polarismail.wire.framing import LineProblem
from polarismail.wire.smtp_chunks import parse_bdat
from polarismail.wire.smtp_events import (
    Auth,
    Data,
    Event,
    Help,
    Noop,
    Quit,
    Rcpt,
    Refused,
    Rset,
    StartTls,
    XClient,
    XForward,
)
from polarismail.wire.smtp_grammar import parse_auth, parse_hello, parse_mail, parse_rcpt, parse_vrfy, printable
from polarismail.wire.smtp_states import State
from polarismail.wire.smtp_xclient import Claims, parse_xclient, parse_xforward

if TYPE_CHECKING:
    from polarismail.wire.smtp_server import SmtpServer

_NOT_IMPLEMENTED = frozenset({"EXPN", "TURN", "SEND", "SOML", "SAML", "ETRN", "ATRN", "BURL"})
_OTHER_PROTOCOLS = frozenset({"GET", "POST", "CONNECT", "PUT", "HEAD", "OPTIONS", "DELETE", "PATCH", "TRACE", "PRI"})
_HEADER_FIELD = re.compile(r"(?!MAIL|RCPT)[A-Z][A-Z0-9-]*:")
_FOREIGN = Refused(replies.FOREIGN_PROTOCOL, junk=True, closes=True)
_DATA, _RSET, _NOOP, _QUIT, _STARTTLS = Data(), Rset(), Noop(), Quit(), StartTls()

LINE_PROBLEMS = {
    LineProblem.TOO_LONG: Refused(replies.LINE_TOO_LONG),
    LineProblem.ENDLESS: Refused(replies.LINE_TOO_LONG, closes=True),
    # Whoever takes LF for the end of a line and whoever does not would see different commands: this ends here.
    LineProblem.BARE_LINE_FEED: Refused(replies.BARE_COMMAND, closes=True),
    LineProblem.TLS: _FOREIGN,
}


def refuse_unknown(verb: str) -> Refused:
    """The answer to a verb that is not in PARSE."""
    if verb in _OTHER_PROTOCOLS or _HEADER_FIELD.match(verb):
        return _FOREIGN
    return Refused(replies.NOT_IMPLEMENTED if verb in _NOT_IMPLEMENTED else replies.UNKNOWN_COMMAND, junk=True)


def _parse_mail(server: SmtpServer, argument: str) -> Event | Reply:
    settings = server.settings
    if settings.require_auth and not server.authenticated:
        if server.tls_available and not server.tls_active and not server.auth_mechanisms(False):
            return replies.NEED_TLS
        return replies.NEED_AUTH
    return parse_mail(argument, settings.offers, settings.max_message_octets)


def _parse_rcpt(server: SmtpServer, argument: str) -> Event | Reply:
    mail = server.transaction
    assert mail is not None
    server.tried_recipients += 1
    settings = server.settings
    event = parse_rcpt(argument, settings.offers, mail.smtputf8)
    limit = settings.max_recipients if mail.reverse_path is not None else settings.max_null_path_recipients
    if server.recipients >= limit and type(event) is Rcpt:
        return replies.TOO_MANY_RECIPIENTS
    return event


def refuse_out_of_order(server: SmtpServer, verb: str, argument: str) -> Event | None:
    """The answer to a command that is not legal now."""
    if verb == "BDAT":
        return _parse_bdat(server, argument)  # its octets follow all the same, and are no commands
    if verb == "DATA" and server.tried_recipients and server.state is State.MAIL and not server.settings.lmtp:
        return Refused(replies.NO_VALID_RECIPIENTS)
    return Refused(replies.BAD_SEQUENCE)


def _parse_bdat(server: SmtpServer, argument: str) -> Event | None:
    # Where it is not known how long the chunk is, what follows may be content: it must not be read as commands.
    if "CHUNKING" not in server.settings.offers:
        return Refused(replies.NOT_IMPLEMENTED, junk=True, closes=True)
    found = parse_bdat(argument)
    return Refused(replies.BAD_SYNTAX, closes=True) if found is None else server.begin_chunk(*found)


def _parse_hello(verb: str) -> Callable[[SmtpServer, str], Event | Reply]:
    """LMTP has LHLO, and SMTP the others (RFC 2033 §4.1): two that do not speak the same shall notice."""

    def parse(server: SmtpServer, argument: str) -> Event | Reply:
        if server.settings.lmtp is not (verb == "LHLO"):
            return Refused(replies.UNKNOWN_COMMAND, junk=True)
        return parse_hello(verb, argument)

    return parse


def _parse_starttls(server: SmtpServer, argument: str) -> Event | Reply:
    if argument:
        return replies.BAD_SYNTAX
    if server.tls_active:
        return replies.BAD_SEQUENCE
    return _STARTTLS if server.tls_available else replies.NOT_IMPLEMENTED


def _parse_auth(server: SmtpServer, argument: str) -> Event | Reply:
    if server.authenticated:
        return replies.BAD_SEQUENCE
    mechanisms = server.auth_mechanisms(server.tls_active)
    if not mechanisms:
        if server.tls_available and not server.tls_active and server.auth_mechanisms(True):
            return replies.ENCRYPTION_NEEDED
        return replies.NOT_IMPLEMENTED
    event = parse_auth(argument)
    if isinstance(event, Auth) and event.mechanism not in mechanisms:
        return replies.UNKNOWN_MECHANISM
    return event


def _parse_vrfy(server: SmtpServer, argument: str) -> Event | Reply:
    return parse_vrfy(argument, server.settings.offers)


def _parse_of_front_end(
    parse: Callable[[str], Claims | Reply], event: Callable[[Claims], Event]
) -> Callable[[SmtpServer, str], Event | Reply]:
    """XCLIENT and XFORWARD are for clients that we trust with them, and not offered to others."""

    def parse_claims(server: SmtpServer, argument: str) -> Event | Reply:
        if not server.is_front_end:
            return Refused(replies.NOT_A_FRONT_END, junk=True)
        claims = parse(argument)
        return claims if isinstance(claims, Reply) else event(claims)

    return parse_claims


def _bare(event: Event) -> Callable[[SmtpServer, str], Event | Reply]:
    """A command that takes no argument."""
    return lambda server, argument: replies.BAD_SYNTAX if argument else event


PARSE: dict[str, Callable[[SmtpServer, str], Event | Reply | None]] = {
    "EHLO": _parse_hello("EHLO"),
    "HELO": _parse_hello("HELO"),
    "LHLO": _parse_hello("LHLO"),
    "MAIL": _parse_mail,
    "RCPT": _parse_rcpt,
    "DATA": _bare(_DATA),
    "BDAT": _parse_bdat,
    "RSET": _bare(_RSET),
    "NOOP": lambda server, argument: _NOOP,
    "VRFY": _parse_vrfy,
    "HELP": lambda server, argument: Help(printable(argument)),
    "QUIT": _bare(_QUIT),
    "STARTTLS": _parse_starttls,
    "AUTH": _parse_auth,
    "XCLIENT": _parse_of_front_end(parse_xclient, XClient),
    "XFORWARD": _parse_of_front_end(parse_xforward, XForward),
}
"""By verb; which verb is legal when is smtp_states.LEGAL. None: what follows the command has to come first."""
