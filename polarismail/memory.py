# SPDX-License-Identifier: MIT
"""How often the garbage collector looks, for a server with many short-lived objects and many that stay.

By default it looks at all that is young after 700 new objects (a dozen connections), and at everything that lives each time
a quarter as much has come; with a new connection for each message that is 40 us a message. What was made while starting never
goes, so it is not looked at any more; and the young are looked at a fourteenth as often.

Guarantees: cycles that are dead still go; what they can hold back is bounded by the 10,000 objects that may come between
two looks (some 500 connections that are gone).
"""

from __future__ import annotations

import gc

_YOUNG, _MIDDLE, _OLD = 10_000, 20, 20


def settle() -> None:
    """Call once everything has started: what lives now is taken for permanent. Harmless when called again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _MIDDLE, _OLD)
