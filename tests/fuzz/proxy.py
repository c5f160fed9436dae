# SPDX-License-Identifier: MIT
"""The PROXY header: one octet of cuts, then what a proxy sends, header and client's octets alike.

What must hold: slices do not matter, neither for what is found nor for where the header ends; nothing behind it is touched; a
client that is found has an address that ipaddress knows; memory is bounded by one header.
"""

from __future__ import annotations

import ipaddress

from polarismail.wire.proxy_protocol import MAX_HEADER_OCTETS, Fault, ProxiedClient, ProxyParser, Result
from tests.fuzz.slicing import Choices, cut


def check(octets: bytes) -> None:
    """Raises where a promise is broken."""
    choices = Choices(octets)
    cuts = choices.octet()
    stream = choices.rest()
    whole = _parse([stream])
    for pieces in (cut(stream, cuts), cut(stream, 0)):
        result, taken = _parse(pieces)
        assert result == whole[0], "what is found depends on the slices"
        assert isinstance(result, Fault) or taken == whole[1], "where the header ends depends on the slices"
    result, taken = whole
    assert taken <= MAX_HEADER_OCTETS or isinstance(result, Fault)
    if isinstance(result, ProxiedClient):
        assert str(ipaddress.ip_address(result.address)) == result.address and 0 <= result.port <= 65535
        assert _parse([stream[:taken]]) == whole, "octets behind the header had a say"


def _parse(pieces: list[bytes]) -> tuple[Result | None, int]:
    """What was found, and how many octets were the header's."""
    parser, taken = ProxyParser(), 0
    for piece in pieces:
        if parser.result is not None:
            assert parser.receive(piece) == 0
            continue
        used = parser.receive(piece)
        assert 0 <= used <= len(piece) and (parser.result is not None or used == len(piece))
        assert parser.result is not None or len(parser._held) <= MAX_HEADER_OCTETS
        taken += used
    return parser.result, taken
