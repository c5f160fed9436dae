# SPDX-License-Identifier: MIT
"""The PROXY header: what a proxy says is understood in any slicing, and what is wrong is wrong in each."""

from __future__ import annotations

import ipaddress
import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polarismail.wire.proxy_protocol import (
    MAX_BLOCK_OCTETS,
    MAX_HEADER_OCTETS,
    SIGNATURE,
    Fault,
    OwnClient,
    ProxiedClient,
    ProxyParser,
    Result,
    crc32c,
)
from tests.proxies import block, render_block, render_line

BEHIND = b"EHLO client.test\r\n"
V4_BLOCK = bytes([192, 0, 2, 1, 198, 51, 100, 2]) + struct.pack("!HH", 5000, 25)


def feed(octets: bytes, cuts: list[int]) -> tuple[Result | None, int]:
    """The result, and how many octets were taken, when it comes in these slices."""
    parser, taken = ProxyParser(), 0
    edges = sorted({0, len(octets), *(cut % (len(octets) + 1) for cut in cuts)})
    for start, end in itertools.pairwise(edges):
        got = parser.receive(octets[start:end])
        assert 0 <= got <= end - start
        taken += got
        if parser.result is not None:
            break
        assert got == end - start, "what certainly belongs to the header must be taken, or a reader would spin"
    return parser.result, taken


def each_octet(octets: bytes) -> tuple[Result | None, int]:
    return feed(octets, list(range(len(octets))))


addresses = st.one_of(st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).map(str))
ports = st.integers(0, 65535)
cuts = st.lists(st.integers(0, 6000), max_size=12)
# Any type but that of the checksum, which is put in by the renderer.
extensions = st.lists(st.tuples(st.sampled_from([1, 2, 4, 5, 0x20, 0x30, 0xE0]), st.binary(max_size=60)), max_size=4)


def plain(source: str) -> str:
    parsed = ipaddress.ip_address(source)
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)


@given(addresses, ports, cuts)
def test_version_1_in_any_slicing(source: str, port: int, cuts: list[int]) -> None:
    header = render_line(source, port)
    assert feed(header + BEHIND, cuts) == (ProxiedClient(plain(source), port), len(header))


@given(addresses, ports, extensions, st.booleans(), cuts)
def test_version_2_in_any_slicing(
    source: str, port: int, extensions: list[tuple[int, bytes]], checksum: bool, cuts: list[int]
) -> None:
    header = render_block(source, port, extensions, checksum)
    assert feed(header + BEHIND, cuts) == (ProxiedClient(plain(source), port), len(header))


@given(st.one_of(st.binary(max_size=300), st.binary(max_size=200).map(lambda b: SIGNATURE + b"\x21" + b)), cuts)
def test_anything_gives_the_same_in_any_slicing_and_raises_nothing(octets: bytes, cuts: list[int]) -> None:
    whole, taken = feed(octets, [])
    sliced, taken_sliced = feed(octets, cuts)
    assert whole == sliced
    if not isinstance(whole, Fault):
        assert taken == taken_sliced


@given(addresses, ports, st.integers(0, 400), st.integers(1, 255))
def test_a_checksum_finds_a_wrong_octet_of_the_addresses(source: str, port: int, at: int, change: int) -> None:
    header = bytearray(render_block(source, port, [(5, b"id")], checksum=True))
    header[16 + at % (36 if ":" in source else 12)] ^= change
    assert feed(bytes(header), []) == (Fault("version 2: the checksum is wrong"), len(header))


def test_checksum_of_the_rfc() -> None:
    """RFC 3720 §12.1, with the octets of its examples."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(bytes([0xFF]) * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


@pytest.mark.parametrize(
    "header",
    [
        b"PROXY UNKNOWN\r\n",
        b"PROXY UNKNOWN ffff:f...f:ffff whatever 65535\r\n",
        block(0x00, b"", command=0x20),
        block(0x11, V4_BLOCK, command=0x20),  # LOCAL: the family is ignored
        block(0x77, b"anything", command=0x20),
        block(0x00, b"anything"),
        block(0x31, b"/run/a".ljust(108, b"\0") + b"/run/b".ljust(108, b"\0")),
    ],
)
def test_a_proxy_that_speaks_for_itself_keeps_the_address(header: bytes) -> None:
    for result, taken in (feed(header + BEHIND, []), each_octet(header + BEHIND)):
        assert (result, taken) == (OwnClient(), len(header))


def test_the_longest_line_of_version_1() -> None:
    longest = b"PROXY UNKNOWN " + b"f" * (107 - 16) + b"\r\n"
    assert len(longest) == 107
    assert feed(longest, []) == (OwnClient(), 107)


LONG = b"\x04" + struct.pack("!H", MAX_BLOCK_OCTETS - 12 - 3) + bytes(MAX_BLOCK_OCTETS - 12 - 3)


def test_the_longest_block_of_version_2() -> None:
    assert feed(block(0x11, V4_BLOCK + LONG), []) == (ProxiedClient("192.0.2.1", 5000), MAX_HEADER_OCTETS)


@pytest.mark.parametrize(
    ("octets", "reason"),
    [
        (b"EHLO client.test\r\n", "found something else"),
        (b"\x16\x03\x01\x02\x00", "found something else"),
        (b"proxy TCP4 192.0.2.1 192.0.2.2 1 2\r\n", "found something else"),
        (b"PROXYTCP4", "found something else"),
        (SIGNATURE[:-1] + b"\x00", "found something else"),
        (b"PROXY UNKNOWN " + b"x" * 200, "more than 107"),
        (b"PROXY UNKNOWN " + b"f" * (108 - 16) + b"\r\n", "more than 107"),
        (b"PROXY UNKNOWN\n", "line feed"),
        (b"PROXY \r\n", "expected TCP4"),
        (b"PROXY UDP4 192.0.2.1 192.0.2.2 1 2\r\n", "expected TCP4"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 1\r\n", "two addresses"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2 3\r\n", "two addresses"),
        (b"PROXY TCP4  192.0.2.1 192.0.2.2 1 2\r\n", "two addresses"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2 \r\n", "two addresses"),
        (b"PROXY TCP4 192.0.2.01 192.0.2.2 1 2\r\n", "that is none"),
        (b"PROXY TCP4 192.0.2.256 192.0.2.2 1 2\r\n", "that is none"),
        (b"PROXY TCP4 192.0.2.1 here 1 2\r\n", "that is none"),
        (b"PROXY TCP4 2001:db8::1 2001:db8::2 1 2\r\n", "that is none"),
        (b"PROXY TCP6 192.0.2.1 192.0.2.2 1 2\r\n", "that is none"),
        (b"PROXY TCP6 fe80::1%eth0 fe80::2 1 2\r\n", "that is none"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 65536 2\r\n", "that is none"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 01 2\r\n", "that is none"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 -1 2\r\n", "that is none"),
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 \xb2\r\n", "that is none"),
        (b"PROXY TCP4 \xff 192.0.2.2 1 2\r\n", "that is none"),
        (block(0x11, V4_BLOCK, command=0x11), "version or command"),
        (block(0x11, V4_BLOCK, command=0x22), "version or command"),
        (block(0x12, V4_BLOCK), "carries no mail"),
        (block(0x01, V4_BLOCK), "carries no mail"),
        (block(0x41, V4_BLOCK), "carries no mail"),
        (block(0x11, V4_BLOCK[:-1]), "too short"),
        (block(0x21, V4_BLOCK), "too short"),
        (block(0x31, V4_BLOCK), "too short"),
        (block(0x11, V4_BLOCK + b"\x04\x00"), "cut off"),
        (block(0x11, V4_BLOCK + b"\x04\x00\x05abcd"), "cut off"),
        (block(0x11, V4_BLOCK + b"\x03\x00\x03abc"), "wrong form"),
        (block(0x11, V4_BLOCK + b"\x03\x00\x04abcd"), "checksum is wrong"),
        (block(0x11, V4_BLOCK + LONG + b"\x04\x00\x00"), "more than 4096"),
        (SIGNATURE + b"\x21\x11\xff\xff", "more than 4096"),
        (SIGNATURE + b"\x20\x00\xff\xff", "more than 4096"),
    ],
)
def test_what_is_wrong_is_a_fault(octets: bytes, reason: str) -> None:
    for result, _ in (feed(octets, []), each_octet(octets)):
        assert isinstance(result, Fault)
        assert reason in result.reason


@pytest.mark.parametrize("header", [render_line("192.0.2.1", 5000), block(0x11, V4_BLOCK + b"\x04\x00\x01x")])
def test_what_is_cut_short_waits(header: bytes) -> None:
    for end in range(len(header)):
        assert feed(header[:end], []) == (None, end)
