# SPDX-License-Identifier: MIT
"""Every exception that polarismail raises by design, drawn as one tree.

    PolarisError
    |-- BadAddress          octets that are no RFC 5321 address
    |-- BadReply            a peer's reply that breaks RFC 5321 §4.2
    |-- ConfigError         the configuration file: file, key, what was expected
    |-- Unavailable         a part of ours cannot answer now: always "try again", never "no"
    |   |-- SpoolUnhealthy  the spool met an I/O error: accept nothing, deliver nothing
    |   |   `-- SpoolFull   no room on the disk: accept nothing, go on delivering
    |   `-- LookupFailed    DNS gave no answer (SERVFAIL, time-out): a deferral, never a bounce
    |-- NoSuchName          DNS says that the name does not exist (NXDOMAIN)
    |-- ControlError        an operator asked for what cannot be done; `str()` is for people
    `-- AccountError        a change of domains, accounts or aliases that the directory refuses

Exceptions mean that *we* or our configuration are at fault, except BadAddress and BadReply, which a parser raises
to its direct caller and which never leave the engine that called it.
"""


class PolarisError(Exception):
    """The root: nothing raises it directly."""


class BadAddress(PolarisError, ValueError):
    """The text is no RFC 5321 mailbox; `str()` says which rule it breaks."""


class BadReply(PolarisError, ValueError):
    """A peer's reply cannot be read (RFC 5321 §4.2)."""


class ConfigError(PolarisError):
    """The configuration is wrong; `str()` names the file, the key, and what was expected."""


class Unavailable(PolarisError):
    """A database, resolver or file cannot answer now. Clients are told 4yz or SYS/TEMP, never "unknown"."""


class TooManyTargets(Unavailable):
    """An alias leads to more addresses than any may: clients are told 4yz, and only an operator can change it."""


class SpoolUnhealthy(Unavailable):
    """The spool cannot keep a promise (DURABILITY rule 1 and 4)."""


class SpoolFull(SpoolUnhealthy):
    """There is no room on the disk (452 4.3.1): nothing is accepted, while outcomes are still recorded."""


class LookupFailed(Unavailable):
    """DNS gave no answer that could be used: SERVFAIL, REFUSED, time-out, nonsense. Says nothing about the name."""


class NoSuchName(PolarisError):
    """DNS says, with authority, that the name does not exist (NXDOMAIN)."""


class ControlError(PolarisError):
    """What the operator asked cannot be done; the text says why and what to do."""


class AccountError(ControlError):
    """A domain, account or alias cannot be changed as asked."""
