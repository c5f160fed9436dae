# SPDX-License-Identifier: MIT
"""Header fields beyond ASCII are found wherever they stand, however the content is cut; a body beyond ASCII is none."""

from __future__ import annotations

import pytest

from polarismail.message.fields import FieldScan

PLAIN = b"From: a\r\nSubject: x\r\n\r\n"
MIXED = b'Subject: x\r\nContent-Type: multipart/mixed;\r\n\tboundary="b 1"\r\n\r\n--no\xc3\xb6\r\n--b 1\r\n'
CONTENTS = [
    (b"Subject: gr\xc3\xbcn\r\n\r\nx\r\n", True),
    (PLAIN + b"gr\xc3\xbcn\r\n-- \r\nJ\xc3\xb6rg\r\n--x\r\nJ\xc3\xb6rg: x\r\n", False),
    (MIXED + b"Content-Disposition: attachment; filename=\xc3\xa9\r\n\r\nx\r\n--b 1--\r\n", True),
    (MIXED + b"Content-Type: text/plain\r\n\r\n\xc3\xa9\r\n--b 1--\r\n", False),
    (MIXED + b"\r\n\xc3\xa9\r\n--b 1\r\nX: \xc3\xa9\r\n", True),
    (MIXED + b"Content-Type: message/rfc822\r\n\r\nSubject: \xc3\xa9\r\n\r\nx\r\n--b 1--\r\n", True),
    (MIXED + b"Content-Type: message/rfc822\r\n\r\nSubject: e\r\n\r\n\xc3\xa9\r\n--b 1--\r\n", False),
    (b"", False),
]


@pytest.mark.parametrize(("content", "found"), CONTENTS)
@pytest.mark.parametrize("octets", [1, 2, 7, 10_000])
def test_fields_beyond_ascii(content: bytes, found: bool, octets: int) -> None:
    scan = FieldScan()
    assert any(scan.receive(content[at : at + octets]) for at in range(0, len(content), octets)) is found


def test_boundaries_and_lines_are_bounded() -> None:
    scan = FieldScan()
    for number in range(10_000):
        assert not scan.receive(b"Content-Type: multipart/mixed; boundary=%d%s" % (number, b"x" * 5000 + b"\r\n"))
    assert len(scan._boundaries) <= 50 and len(scan._line) < 2100
