# SPDX-License-Identifier: MIT
"""polarismail: a mail server for hosting providers and senders, on Twisted."""

__version__ = "0.1.0"
