# SPDX-License-Identifier: MIT
"""Who: the one credential checker and realm for SMTP, POP3 and IMAP."""
