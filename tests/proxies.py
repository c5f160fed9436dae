# SPDX-License-Identifier: MIT
"""PROXY headers as proxies write them, for tests of all kinds."""

from __future__ import annotations

import ipaddress
import struct

from polarismail.wire.proxy_protocol import SIGNATURE, crc32c


def render_line(source: str, port: int) -> bytes:
    """Version 1."""
    kind = "TCP6" if ":" in source else "TCP4"
    there = "2001:db8::2" if ":" in source else "198.51.100.2"
    return f"PROXY {kind} {source} {there} {port} 25\r\n".encode()


def block(family: int, inside: bytes, command: int = 0x21) -> bytes:
    """Version 2, well-formed or not."""
    return SIGNATURE + bytes([command, family]) + struct.pack("!H", len(inside)) + inside


def render_block(
    source: str, port: int, extensions: list[tuple[int, bytes]] | None = None, checksum: bool = False
) -> bytes:
    """Version 2 as HAProxy writes it."""
    address = ipaddress.ip_address(source)
    inside = address.packed * 2 + struct.pack("!HH", port, 25)
    for kind, value in extensions or []:
        inside += bytes([kind]) + struct.pack("!H", len(value)) + value
    family = 0x11 if address.version == 4 else 0x21
    if not checksum:
        return block(family, inside)
    whole = block(family, inside + b"\x03\x00\x04\x00\x00\x00\x00")
    return whole[:-4] + struct.pack("!I", crc32c(whole))
