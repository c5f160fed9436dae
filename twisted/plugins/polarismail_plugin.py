# SPDX-License-Identifier: MIT
"""Makes `twistd polarismail` and `twist polarismail` known to Twisted; loads nothing of polarismail by itself."""

from twisted.application.service import ServiceMaker

polarismail = ServiceMaker(
    "polarismail",
    "polarismail.service",
    "polarismail, a mail server: SMTP, submission, POP3 and relay.",
    "polarismail",
)
