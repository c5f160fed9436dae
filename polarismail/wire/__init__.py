# SPDX-License-Identifier: MIT
"""How it is spoken: octets to events and back, without I/O."""
