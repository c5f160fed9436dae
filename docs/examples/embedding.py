# SPDX-License-Identifier: MIT
"""An ESMTP server in a program of yours: your portal, your users, and mail that goes wherever you want it."""

import sys

from twisted.cred.checkers import InMemoryUsernamePasswordDatabaseDontUse
from twisted.cred.portal import IRealm, Portal
from twisted.internet import reactor
from twisted.internet.defer import succeed
from twisted.mail.interfaces import IMessageDelivery, IMessageSMTP
from twisted.mail.smtp import SMTPBadRcpt
from zope.interface import implementer

from polarismail.net.listeners import Listener
from polarismail.serve.smtp import ESMTPFactory


@implementer(IMessageSMTP)
class Print:
    """One message. What `eomReceived` answers decides the reply."""

    def __init__(self, recipient):
        self.recipient, self.lines = recipient, []

    def lineReceived(self, line):
        self.lines.append(line)

    def eomReceived(self):
        print(f"for {self.recipient}: {len(self.lines)} lines", flush=True)
        return succeed(None)  # your promise, now: keep the message before this fires

    def connectionLost(self):
        self.lines = []


@implementer(IMessageDelivery)
class Delivery:
    """What one login may do."""

    def receivedHeader(self, helo, origin, recipients):
        return b"Received: by my.program"

    def validateFrom(self, helo, origin):
        return origin

    def validateTo(self, user):
        if not str(user).endswith("@example.org"):
            raise SMTPBadRcpt(user)
        return lambda: Print(user)


@implementer(IRealm)
class Realm:
    """Avatars for those who have logged in."""

    def requestAvatar(self, avatar_id, mind, *interfaces):
        return IMessageDelivery, Delivery(), lambda: None


portal = Portal(Realm(), [InMemoryUsernamePasswordDatabaseDontUse(ann=b"secret")])
# On loopback, without TLS: elsewhere give `tls_options`, and leave plaintext_auth at "never".
listener = Listener("mine", 0, "submission", tls="none", plaintext_auth="always")
factory = ESMTPFactory(portal, listener=listener, hostname="my.program")
port = reactor.listenTCP(int(sys.argv[1]), factory, interface="127.0.0.1")
print(f"listening on {port.getHost().port}", flush=True)
reactor.run()
