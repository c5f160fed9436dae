# SPDX-License-Identifier: MIT
"""Facing clients: Twisted's transports live here."""
