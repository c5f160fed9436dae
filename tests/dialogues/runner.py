# SPDX-License-Identifier: MIT
"""Plays a conversation written as text against a peer: a pure engine, or a live TCP port.

A file is a header of `key: value` lines, a line `---`, and steps. `#` begins a comment line; blank lines are nothing.

    C: text          the client says this line (CRLF is added); consecutive C lines are sent in one piece
    C+ text          the same without CRLF
    C/               what follows is sent in a piece of its own
    S: text          the server's next line; `*` stands for anything
    S~ 250 A !B      the server's next whole reply: its code, a line that begins with A, none that begins with B
    S-               the server says nothing now
    S!               the server closes
    T:               TLS begins (the server has just agreed)
    M: text          the content of the last accepted message, octet for octet (only where the peer shows it)

In texts `\\r \\n \\t \\0 \\xHH \\\\` are octets, `{x*80}` is x 80 times, and `$name` is a variable of the header's
`set: name value` lines, or of the caller, who overrides them (`$$` is a dollar).

Header keys that the runner knows: `set`, `live: no` (not for a live port), `sliced: no` (the outcome depends on what comes
in one piece). All others are the peer's.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from attrs import field, frozen

_STEP = re.compile(r"(C:|C\+|C/|S:|S~|S-|S!|T:|M:)(?: (.*))?")
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|.)")
_REPEAT = re.compile(r"\{([^{}]+)\*(\d+)\}")
_VARIABLE = re.compile(r"\$(\$|[a-z_]+)")
_LETTERS = {"r": "\r", "n": "\n", "t": "\t", "0": "\0", "\\": "\\"}


class Peer(Protocol):
    """The server's end, wherever it is."""

    def send(self, octets: bytes) -> None: ...

    def read_line(self) -> bytes | None:
        """The next line without its CRLF; None when the server has closed. Fails when nothing comes."""

    def is_quiet(self) -> bool:
        """Nothing more has come, and the connection is open."""

    def start_tls(self) -> None: ...

    def last_message(self) -> bytes | None:
        """The content of the last accepted message; None where it cannot be seen."""


@frozen
class Step:
    """One step of a dialogue, with its line for messages."""

    kind: str
    text: str
    line: int


@frozen
class Dialogue:
    """A parsed file. `options`: header keys but `set`; repeated ones are joined by newlines."""

    name: str
    options: Mapping[str, str]
    variables: Mapping[str, str]
    steps: tuple[Step, ...] = field(repr=False)

    @property
    def live(self) -> bool:
        """It may be played against a live port."""
        return self.options.get("live", "yes") == "yes"

    @property
    def sliced(self) -> bool:
        """Its outcome does not depend on how octets are cut."""
        return self.options.get("sliced", "yes") == "yes"


def parse_dialogue(text: str, name: str = "") -> Dialogue:
    """Read a dialogue. Raises ValueError with the line that is wrong."""
    options: dict[str, str] = {}
    variables: dict[str, str] = {}
    steps: list[Step] = []
    header = True
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if header and line.strip() == "---":
            header = False
        elif header:
            key, colon, value = line.partition(":")
            if not colon:
                raise ValueError(f"{name}:{number}: expected `key: value` or `---`")
            key, value = key.strip(), value.strip()
            if key == "set":
                variable, _, value = value.partition(" ")
                variables[variable] = value.strip()
            else:
                options[key] = f"{options[key]}\n{value}" if key in options else value
        else:
            found = _STEP.fullmatch(line.rstrip("\n"))
            if found is None:
                raise ValueError(f"{name}:{number}: no step: {line!r}")
            steps.append(Step(found[1], found[2] or "", number))
    if header or not steps:
        raise ValueError(f"{name}: no `---`, or nothing behind it")
    return Dialogue(name, options, variables, tuple(steps))


def load(folder: Path) -> list[Dialogue]:
    """All dialogues of a folder, by name."""
    return [parse_dialogue(path.read_text("utf-8"), path.stem) for path in sorted(folder.glob("*.dlg"))]


def play(dialogue: Dialogue, peer: Peer, variables: Mapping[str, str] | None = None, slice_octets: int = 0) -> None:
    """Go through all steps. `slice_octets`: cut what is sent into pieces of so many octets. Raises AssertionError."""
    known = {**dialogue.variables, **(variables or {})}
    waiting = b""
    for step in dialogue.steps:
        where = f"{dialogue.name}:{step.line}"
        text = expand(step.text, known)
        if step.kind in ("C:", "C+"):
            waiting += to_octets(text) + (b"\r\n" if step.kind == "C:" else b"")
            continue
        size = slice_octets or max(1, len(waiting))
        for at in range(0, len(waiting), size):
            peer.send(waiting[at : at + size])
        waiting = b""
        if step.kind == "S:":
            line = peer.read_line()
            assert line is not None, f"{where}: closed instead of {text!r}"
            assert pattern(text).fullmatch(line), f"{where}: expected {text!r}, got {line!r}"
        elif step.kind == "S~":
            check_reply(peer, text.split(), where)
        elif step.kind == "S-":
            assert peer.is_quiet(), f"{where}: something came"
        elif step.kind == "S!":
            line = peer.read_line()
            assert line is None, f"{where}: expected the end, got {line!r}"
        elif step.kind == "T:":
            peer.start_tls()
        elif step.kind == "M:":
            message = peer.last_message()
            assert message is None or message == to_octets(text), f"{where}: got {message!r}"
    assert not waiting, f"{dialogue.name}: ends with what the client says"


def check_reply(peer: Peer, words: list[str], where: str) -> None:
    """Read one reply of one or more lines, and judge it by `words`: code, keywords that must or (`!`) must not be there."""
    code = words[0].encode()
    lines: list[bytes] = []
    while True:
        line = peer.read_line()
        assert line is not None, f"{where}: closed in a reply, after {lines}"
        assert line[:3] == code, f"{where}: expected {words[0]}, got {line!r}"
        lines.append(line[4:])
        if line[3:4] != b"-":
            break
    for word in words[1:]:
        wanted = word.lstrip("!").encode()
        there = any(line.split(b" ")[0] == wanted for line in lines)
        assert there is not word.startswith("!"), f"{where}: {word} in {lines}"


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Put variables in, then repetitions."""
    text = _VARIABLE.sub(lambda found: "$" if found[1] == "$" else variables[found[1]], text)
    return _REPEAT.sub(lambda found: found[1] * int(found[2]), text)


def to_octets(text: str) -> bytes:
    """Escapes become octets; everything else is UTF-8."""

    def octet(found: re.Match[str]) -> str:
        code = found[1]
        return (
            chr(0xDC00 + int(code[1:], 16))
            if code[0] == "x" and int(code[1:], 16) > 127
            else (chr(int(code[1:], 16)) if code[0] == "x" else _LETTERS[code])
        )

    # Octets over 127 travel as lone surrogates, the way `surrogateescape` writes them.
    return _ESCAPE.sub(octet, text).encode("utf-8", "surrogateescape")


def pattern(text: str) -> re.Pattern[bytes]:
    """What a line must look like: `*` is anything."""
    return re.compile(b".*".join(re.escape(to_octets(part)) for part in text.split("*")), re.DOTALL)


class LivePeer:
    """A TCP port. `tls`: a context for STARTTLS, or for the whole connection with `implicit`."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        implicit: bool = False,
        timeout_seconds: float = 10.0,
        quiet_seconds: float = 0.3,
        source: tuple[str, int] | None = None,
        server_name: str = "localhost",
    ) -> None:
        self._tls, self._server_name = tls, server_name
        self._timeout, self._quiet = timeout_seconds, quiet_seconds
        self._socket = socket.create_connection((host, port), timeout_seconds, source)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""
        if implicit:
            self.start_tls()

    def send(self, octets: bytes) -> None:
        try:
            self._socket.sendall(octets)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server may have closed already; the next step says whether it may

    def read_line(self) -> bytes | None:
        while b"\r\n" not in self._buffer:
            octets = self._receive()
            if not octets:
                assert not self._buffer, f"closed within a line: {self._buffer!r}"
                return None
            self._buffer += octets
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        return line

    def is_quiet(self) -> bool:
        self._socket.settimeout(self._quiet)
        try:
            octets = self._receive()
        except TimeoutError:
            return not self._buffer
        finally:
            self._socket.settimeout(self._timeout)
        self._buffer += octets
        return False

    def start_tls(self) -> None:
        assert self._tls is not None, "a context is needed"
        assert not self._buffer, f"in clear, behind the reply to STARTTLS: {self._buffer!r}"
        self._socket = self._tls.wrap_socket(self._socket, server_hostname=self._server_name)

    def last_message(self) -> bytes | None:
        return None

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def __enter__(self) -> LivePeer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(65536)
        except (ConnectionResetError, ssl.SSLEOFError):
            return b""
