# SPDX-License-Identifier: MIT
"""The targets by name, and the inputs that each begins with: what the dialogues say, which is every command there is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from polarismail.wire.proxy_protocol import SIGNATURE
from tests.dialogues.runner import Dialogue, expand, load, to_octets
from tests.fuzz import client, framing, grammar, proxy, session

DIALOGUES = Path(__file__).resolve().parent.parent / "dialogues" / "smtp"
TARGETS: dict[str, Callable[[bytes], None]] = {
    "grammar": grammar.check,
    "framing": framing.check,
    "client": client.check,
    "proxy": proxy.check,
    "session": session.check,
}
_WORD = re.compile(rb"[A-Za-z0-9@.:+/=<>\"-]{2,24}")
_ENDS = (
    b"\r\n.\r\n",
    b"\r\n",
    b"\n.\n",
    b"\r\n.\n",
    b"\n.\r\n",
    b"\r.\r",
    b"\r\n..",
    b"\xff",
    b"\r\n\xff",
    b"\x16\x03\x01",
)
_OPENING = b"220 hi\r\n\xff250-mx\r\n250 PIPELINING\r\n\xff"
_REPLIES = (
    _OPENING + b"250 ok\r\n250 ok\r\n354 go\r\n\xff250 queued\r\n\xff250 ok\r\n550 5.1.1 no\r\n554 no\r\n",
    _OPENING + b"250 ok\r\n550 5.1.1 no\r\n250 ok\r\n354 go\r\n\xff451 4.3.0 later\r\n\xff250 ok\r\n\xff421 bye\r\n",
    b"220 hi\r\n\xff250 mx\r\n\xff250 ok\r\n\xff250 2.1.5 ok\r\n\xff354 go\r\n\xff250 ok\r\n\xff250 ok\r\n\xff421 bye\r\n",
    b"220-hi\r\n220 there\r\n\xff502 what\r\n\xff250 mx\r\n\xff550 no\r\n\xff250 ok\r\n",
    b"554 5.7.1 nobody here\r\n",
)

_HEADERS = (
    b"PROXY TCP4 192.0.2.1 192.0.2.2 1234 25\r\n",
    b"PROXY TCP6 2001:db8::1 2001:db8::2 1234 25\r\n",
    b"PROXY UNKNOWN anything\r\n",
    SIGNATURE + b"\x21\x11\x00\x0c\xc0\x00\x02\x01\xc0\x00\x02\x02\x04\xd2\x00\x19",
    SIGNATURE + b"\x21\x21\x00\x24" + bytes(15) + b"\x01" + bytes(15) + b"\x02\x04\xd2\x00\x19",
    SIGNATURE + b"\x21\x11\x00\x13\xc0\x00\x02\x01\xc0\x00\x02\x02\x04\xd2\x00\x19\x03\x00\x04\x00\x00\x00\x00",
    SIGNATURE + b"\x21\x11\x00\x11\xc0\x00\x02\x01\xc0\x00\x02\x02\x04\xd2\x00\x19\x04\x00\x02ab",
    SIGNATURE + b"\x20\x00\x00\x03abc",
)


def seeds(name: str) -> list[bytes]:
    """Inputs for one target, each different."""
    dialogues = load(DIALOGUES)
    found: list[bytes] = []
    for dialogue in dialogues:
        turns = client_turns(dialogue)
        if name == "session":
            found += [session.write(dialogue.options, turns, cuts) for cuts in (0, 7)]
        elif name == "framing":
            found += [bytes((kind, 7, 3, 3, 3, 3, 3)) + b"".join(turns) for kind in range(5)]
        elif name == "grammar":
            for line in b"".join(turns).split(b"\r\n"):
                verb, _, argument = line.partition(b" ")
                kind = {b"MAIL": 0, b"RCPT": 1, b"EHLO": 2, b"HELO": 2, b"AUTH": 3}.get(verb.upper())
                if kind is not None and len(argument) < 600:
                    found.append(bytes((kind + 8 * 7,)) + argument)
                    if kind < 2:
                        path = argument.partition(b"<")[2].rpartition(b">")[0]
                        found += [b"\4" + path, b"\5" + path.rpartition(b"@")[2]]
    if name == "client":
        found += [bytes((cuts, count)) + said for said in _REPLIES for cuts in (0, 7) for count in (0, 2)]
    if name == "proxy":
        found += [bytes((cuts,)) + header + b"EHLO x\r\n" for cuts in (0, 7) for header in _HEADERS]
    if name == "framing":
        found += [bytes((4, cuts)) + said.replace(session.TURN, b"") for said in _REPLIES for cuts in (0, 7)]
    if name == "grammar":
        found += [b"\6" + line for line in (b"250-a\n250 b", b"550 5.1.1 no", b"220")]
    return sorted(set(found), key=lambda octets: (len(octets), octets))


def words(name: str) -> list[bytes]:
    """A dictionary: what a mutation should try to put in."""
    found = set(_ENDS)
    for octets in seeds(name):
        if len(octets) < 2000:
            found.update(_WORD.findall(octets))
    return sorted(found)


def client_turns(dialogue: Dialogue) -> list[bytes]:
    """What the client says, each time before it waits."""
    known = {
        "client": "client.example", "sender": "a@remote.test", "recipient": "ann@here.test", **dialogue.variables
    }  # fmt: skip
    turns: list[bytes] = []
    said = b""
    for step in dialogue.steps:
        if step.kind in ("C:", "C+"):
            said += to_octets(expand(step.text, known)) + (b"\r\n" if step.kind == "C:" else b"")
        elif step.kind.startswith("S") and said:
            turns.append(said.replace(session.TURN, b"\xfe"))
            said = b""
    return turns
