# SPDX-License-Identifier: MIT
"""What mail is: frozen values that are born valid, without I/O, Twisted or `os`."""
