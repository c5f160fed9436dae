# SPDX-License-Identifier: MIT
"""What is inside: octets in, offsets out; what was received is never re-serialised."""
