# SPDX-License-Identifier: MIT
"""What SIGHUP may change: a configuration and a certificate read again, taken as a whole or not at all.

Raises ConfigError where what was read cannot be taken; the old stays in force then.
"""

from __future__ import annotations

from collections.abc import Sequence

from attrs import evolve, frozen

from polarismail import config as configuration
from polarismail.config import Config
from polarismail.net.tls import CertificateStore
from polarismail.values.errors import ConfigError

_NEED_RESTART = (
    "hostname",
    "workers",
    "listeners",
    "paths",
    "database",
    "log",
    "control",
    "auth",
    "directory",
    "spool",
    "local",
    "dns",
)
"""Tables and keys that are read at the start alone; of `[pop3]` it is how maildrops are read."""


@frozen
class Fresh:
    """A configuration that may take the running one's place: what needs a restart is as it was, and is named."""

    config: Config
    text: str
    needs_restart: tuple[str, ...]

    def describe(self, path: str, certificate_kept: str) -> dict[str, str]:
        """The fields of the event that says so."""
        fields = {"path": path, "needs_restart": ", ".join(self.needs_restart)}
        if certificate_kept:
            fields["certificate_kept"] = certificate_kept
        return fields


def read_again(running: Config, path: str, text: str | None = None) -> Fresh:
    """Read the file, or take its `text` from who has. Raises ConfigError."""
    if text is None:
        text = configuration.read(path)
    read = configuration.parse(path, text)
    needs_restart = [key for key in _NEED_RESTART if getattr(read, key) != getattr(running, key)]
    config = evolve(
        read,
        pop3=evolve(read.pop3, maildrop=running.pop3.maildrop, door=running.pop3.door),
        **{key: getattr(running, key) for key in _NEED_RESTART},
    )
    if config.pop3 != read.pop3:
        needs_restart.append("pop3")
    return Fresh(config, text, tuple(needs_restart))


def renew_certificate(
    certificates: CertificateStore | None, fresh: Config, running: Config, pem: Sequence[str] | None = None
) -> str:
    """Returns why the old one is kept: only root may read the same files, and root is gone. Raises ConfigError where they
    are bad, or others than before cannot be read. `pem`: what somebody else has read from them."""
    if certificates is None:
        return ""
    try:
        if pem is not None:
            octets = pem[0].encode("ascii"), pem[1].encode("ascii")
            certificates.replace(fresh.tls.certificate, fresh.tls.key, octets)
        else:
            certificates.reload(fresh.tls.certificate, fresh.tls.key)
    except ConfigError as problem:
        if not isinstance(problem.__cause__, PermissionError) or fresh.tls != running.tls:
            raise
        return f"{problem}; a renewed one is served after a restart, or once the server's user may read it"
    return ""
