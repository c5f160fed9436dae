# SPDX-License-Identifier: MIT
"""One file a revision, in order; never edited once released."""
