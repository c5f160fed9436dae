# SPDX-License-Identifier: MIT
"""Faults of every kind against the real server, and whether each 250 was kept: DURABILITY, "How it is proven"."""
