# SPDX-License-Identifier: MIT
"""The command: one file a noun."""
