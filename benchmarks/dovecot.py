# SPDX-License-Identifier: MIT
"""Dovecot as what Postfix asks about logins: its auth service alone, on a UNIX socket, over a table of argon2id hashes.

The table is a dict, not a passwd-file, because that one is never cached and is looked up in the one auth process. Passwords
are verified in worker processes, one for each core: of the default of thirty, each hashing in 19 MiB of its own, all would
be in one another's way. With `cache` the table's answers are remembered, which spares no hashing.
"""

from __future__ import annotations

import json
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
auth_cache_verify_password_with_worker = yes
auth_worker_max_count = {cores}
default_vsz_limit = 1G
default_client_limit = 4000
passdb {{
  driver = dict
  args = {directory}/lookup.conf
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


_LOOKUP = """
uri = file:{directory}/users
default_pass_scheme = ARGON2ID
key passdb {{
  key = passdb/%u
  format = json
}}
passdb_objects = passdb
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
            cores=os.cpu_count(),
        )
        (self.directory / "dovecot.conf").write_text(text)
        (self.directory / "lookup.conf").write_text(_LOOKUP.format(directory=self.directory))
        rows = (f"shared/passdb/{user}\n{json.dumps({'password': hashed})}\n" for user, hashed in self.users.items())
        (self.directory / "users").write_text("".join(rows))
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
