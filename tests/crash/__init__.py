# SPDX-License-Identifier: MIT
"""Faults of every kind against the real server, and whether each 250 was kept: DURABILITY, "How it is proven"."""

import os

# `make crash` runs the long version of every test here, `make test` the short one.
IS_LONG = os.environ.get("POLARISMAIL_CRASH") == "long"
