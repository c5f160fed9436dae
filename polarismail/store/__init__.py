# SPDX-License-Identifier: MIT
"""Where mail rests: the only writers of disk and database."""
