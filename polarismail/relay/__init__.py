# SPDX-License-Identifier: MIT
"""Onwards: from the spool to the next hop, and back to the sender when there is none."""
