# SPDX-License-Identifier: MIT
"""The revisions of the `counters` database, and the environment that runs them."""
