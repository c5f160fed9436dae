# SPDX-License-Identifier: MIT
"""Dovecot as what Postfix asks about logins: its auth service alone, on a UNIX socket, over a file of argon2id hashes.

With `cache`, answers of the file are remembered and passwords are verified in worker processes; without, Dovecot verifies
them in its one auth process. Both are what its manual offers; neither spares the hashing of a login that was seen before.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from attrs import define

_CONFIGURATION = """
base_dir = {directory}/run
state_dir = {directory}/state
log_path = {directory}/dovecot.log
protocols =
ssl = no
auth_mechanisms = plain
auth_cache_size = {cache_size}
auth_cache_verify_password_with_worker = {with_worker}
default_vsz_limit = 1G
default_client_limit = 4000
passdb {{
  driver = passwd-file
  args = scheme=ARGON2ID username_format=%u {directory}/users
}}
userdb {{
  driver = static
  args = uid=nobody gid=nogroup home=/nonexistent
}}
service auth {{
  unix_listener {directory}/socket {{
    mode = 0666
  }}
}}
"""


@define
class Dovecot:
    """Debian's dovecot-core; needs root."""

    directory: Path
    users: dict[str, str]  # address -> hash in PHC form
    cache: bool = True

    @property
    def socket(self) -> Path:
        """Where Postfix asks."""
        return self.directory / "socket"

    @property
    def pid(self) -> int:
        """Of its master process."""
        return int((self.directory / "run" / "master.pid").read_text())

    def start(self) -> None:
        """Write a configuration of its own, start, and wait for the socket. Raises OSError, CalledProcessError."""
        for name in ("run", "state"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        os.chmod(self.directory, 0o755)
        text = _CONFIGURATION.format(
            directory=self.directory,
            cache_size="10M" if self.cache else "0",
            with_worker="yes" if self.cache else "no",
        )
        (self.directory / "dovecot.conf").write_text(text)
        (self.directory / "users").write_text("".join(f"{user}:{hashed}\n" for user, hashed in self.users.items()))
        # No pipe: what becomes the daemon would keep it open.
        with open(self.directory / "started.log", "wb") as log:
            subprocess.run(["dovecot", "-c", self.directory / "dovecot.conf"], check=True, stdout=log, stderr=log)
        for _ in range(100):
            if self.socket.exists():
                return
            time.sleep(0.05)
        raise OSError(f"{self.socket} does not come up: {(self.directory / 'dovecot.log').read_text()[-1000:]}")

    def stop(self) -> None:
        """Stop every process of it."""
        subprocess.run(["dovecot", "-c", self.directory / "dovecot.conf", "stop"], stderr=subprocess.DEVNULL)
