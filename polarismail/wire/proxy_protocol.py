# SPDX-License-Identifier: MIT
"""The header of the PROXY protocol, versions 1 and 2: who the client is that a proxy in front of us speaks for.

`ProxyParser` is told what has come, in any slices, and says how many of the octets belong to the header: what stands behind
it is the client's, TLS or SMTP, and no octet of it is touched.

Guarantees: never raises; holds at most one header (107 octets of version 1, 16 and `MAX_BLOCK_OCTETS` of version 2); the
result is the same in whatever slices it came. What is not exactly a header is a Fault at its first wrong octet.
The specification is HAProxy's doc/proxy-protocol.txt; UDP, which carries no mail, is refused.
"""

from __future__ import annotations

import ipaddress
import struct

from attrs import frozen

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
MAX_LINE_OCTETS = 107
MAX_BLOCK_OCTETS = 4096
"""Of version 2 behind its first 16 octets. Proxies send some hundred; a client's certificate fits as well."""
MAX_HEADER_OCTETS = 16 + MAX_BLOCK_OCTETS
_LINE_START = b"PROXY "
_LOCAL, _PROXY = 0x20, 0x21  # version 2 is the upper half
_UNSPECIFIED, _TCP4, _TCP6, _UNIX = 0x00, 0x11, 0x21, 0x31
_ADDRESS_OCTETS = {_TCP4: 12, _TCP6: 36, _UNIX: 216}
_CRC32C = 0x03


@frozen
class ProxiedClient:
    """The client for whom the proxy speaks. An IPv4 address in IPv6's clothes (::ffff:192.0.2.1) is given as IPv4."""

    address: str
    port: int


@frozen
class OwnClient:
    """The proxy speaks for itself (LOCAL: a health check) or does not know for whom (UNKNOWN): the socket's own address
    stands."""


@frozen
class Fault:
    """No header, or a wrong one. The reason is for people, and quotes nothing."""

    reason: str


Result = ProxiedClient | OwnClient | Fault
_OWN = OwnClient()


class ProxyParser:
    """One header. `result` is None until it is complete or wrong."""

    __slots__ = ("_held", "result")

    def __init__(self) -> None:
        self._held = b""
        self.result: Result | None = None

    def receive(self, octets: bytes) -> int:
        """Take what belongs to the header; how many octets that were. All of them, unless the header ends before."""
        if self.result is not None:
            return 0
        before = len(self._held)
        held = self._held + octets
        end = _find_end(held)
        if end is None:
            self._held = held
            return len(octets)
        if isinstance(end, Fault):
            self.result = end
        else:
            header = held[:end]
            self.result = _parse_line(header) if header.startswith(_LINE_START) else _parse_block(header)
        self._held = b""
        return len(octets) if isinstance(end, Fault) else end - before


def _find_end(held: bytes) -> int | Fault | None:
    """Where the header ends, once it is all there."""
    if held.startswith(_LINE_START):
        return _find_line_end(held)
    if held.startswith(SIGNATURE):
        return _find_block_end(held)
    if _LINE_START.startswith(held) or SIGNATURE.startswith(held):
        return None
    return Fault("expected a PROXY header, found something else")


def _find_line_end(held: bytes) -> int | Fault | None:
    at = held.find(b"\n", 0, MAX_LINE_OCTETS)
    if at >= 0:
        return at + 1 if held[at - 1 : at] == b"\r" else Fault("version 1: a line feed without a carriage return")
    return Fault(f"version 1: more than {MAX_LINE_OCTETS} octets") if len(held) >= MAX_LINE_OCTETS else None


def _find_block_end(held: bytes) -> int | Fault | None:
    if len(held) > 12 and held[12] not in (_LOCAL, _PROXY):
        return Fault("version 2: a version or command that does not exist")
    if len(held) > 13 and held[12] == _PROXY and held[13] != _UNSPECIFIED and held[13] not in _ADDRESS_OCTETS:
        return Fault("version 2: an address family or transport that carries no mail")
    if len(held) < 16:
        return None
    length = int.from_bytes(held[14:16], "big")
    if length > MAX_BLOCK_OCTETS:
        return Fault(f"version 2: more than {MAX_BLOCK_OCTETS} octets behind the first 16")
    if held[12] == _PROXY and length < _ADDRESS_OCTETS.get(held[13], 0):
        return Fault("version 2: too short for its addresses")
    return 16 + length if len(held) >= 16 + length else None


# -- version 1 -------------------------------------------------------------------------------------------------------------


def _parse_line(header: bytes) -> Result:
    words = header[len(_LINE_START) : -2].split(b" ")
    if words[0] == b"UNKNOWN":
        return _OWN  # whatever else stands there, says the specification
    if words[0] not in (b"TCP4", b"TCP6"):
        return Fault("version 1: expected TCP4, TCP6 or UNKNOWN")
    if len(words) != 5:
        return Fault("version 1: expected two addresses and two ports")
    kind = ipaddress.IPv4Address if words[0] == b"TCP4" else ipaddress.IPv6Address
    try:
        source, _ = (_parse_address(kind, word) for word in words[1:3])
        port, _ = (_parse_port(word) for word in words[3:])
    except ValueError:
        return Fault("version 1: an address or a port that is none")
    return ProxiedClient(source, port)


def _parse_address(kind: type[ipaddress.IPv4Address | ipaddress.IPv6Address], word: bytes) -> str:
    if b"%" in word:
        raise ValueError("a zone means something on one machine only")
    return _render(kind(word.decode("ascii")))


def _parse_port(word: bytes) -> int:
    if not word.isdigit() or len(word) > 5 or (word[:1] == b"0" and len(word) > 1) or int(word) > 65535:
        raise ValueError("a port is 0 to 65535, without leading zeros")
    return int(word)


# -- version 2 -------------------------------------------------------------------------------------------------------------


def _parse_block(header: bytes) -> Result:
    if header[12] == _LOCAL or header[13] == _UNSPECIFIED:
        return _OWN  # and the rest is to be thrown away, says the specification
    family, start = header[13], 16 + _ADDRESS_OCTETS[header[13]]
    fault = _check_extensions(header, start)
    if fault is not None:
        return fault
    if family == _UNIX:
        return _OWN  # somebody on the proxy's own machine
    size = 4 if family == _TCP4 else 16
    source = ipaddress.ip_address(header[16 : 16 + size])
    (port,) = struct.unpack_from("!H", header, 16 + 2 * size)
    return ProxiedClient(_render(source), port)


def _check_extensions(header: bytes, at: int) -> Fault | None:
    """What stands behind the addresses: type, length, value. Nothing of it is used but a checksum."""
    checked = False
    while at < len(header):
        if len(header) - at < 3:
            return Fault("version 2: an extension that is cut off")
        kind, length = header[at], int.from_bytes(header[at + 1 : at + 3], "big")
        start, at = at + 3, at + 3 + length
        if at > len(header):
            return Fault("version 2: an extension that is cut off")
        if kind == _CRC32C:
            if checked or length != 4:
                return Fault("version 2: a checksum of the wrong form")
            checked = True
            if crc32c(header[:start] + b"\x00\x00\x00\x00" + header[at:]) != int.from_bytes(header[start:at], "big"):
                return Fault("version 2: the checksum is wrong")
    return None


def _render(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


# -- CRC32C (Castagnoli) ---------------------------------------------------------------------------------------------------


def _make_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_TABLE = _make_table()


def crc32c(octets: bytes) -> int:
    """The checksum of RFC 3720 §12.1, as a number."""
    value, table = 0xFFFFFFFF, _TABLE
    for octet in octets:
        value = value >> 8 ^ table[(value ^ octet) & 0xFF]
    return value ^ 0xFFFFFFFF
