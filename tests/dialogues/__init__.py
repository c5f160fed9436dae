# SPDX-License-Identifier: MIT
"""Conversations as text, and what plays them."""
