# SPDX-License-Identifier: MIT
"""A server under attack on loopback, with honest clients beside the attackers: see `__main__`."""
