# SPDX-License-Identifier: MIT
"""The revisions of the `main` database, and the environment that runs them."""
