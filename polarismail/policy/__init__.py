# SPDX-License-Identifier: MIT
"""Whether: verdicts; no reactor, no disk."""
