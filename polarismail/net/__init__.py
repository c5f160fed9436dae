# SPDX-License-Identifier: MIT
"""Sockets: what every side that talks needs."""
