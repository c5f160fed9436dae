# SPDX-License-Identifier: MIT
"""Descriptors: the soft limit is raised as far as it goes, and says how many sessions there can be. In children."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("limits", "wanted", "found"),
    [
        ((256, 4096), "1000", "1000 1512"),
        ((256, 1024), "10000", "876 1024"),
        ((120, 120), "10000", "63 120"),
        ((120, 120), "10000, 5000", "31 120"),
        ((256, 4096), "1000, 500", "1000 2012"),
        ((4096, 4096), "10000, 500", "3141 4096"),
        ((4096, 4096), "100", "100 4096"),
    ],
)
def test_as_many_as_the_hard_limit_allows(limits: tuple[int, int], wanted: str, found: str) -> None:
    program = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, {limits})
from polarismail.net.descriptors import make_room_for
print(make_room_for({wanted}), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == found
