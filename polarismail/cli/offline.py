# SPDX-License-Identifier: MIT
"""The same operations where no server runs: Control over databases that this process opens, and closes at the end.

Writers queue on the same lock as a server's, so that a server that starts meanwhile loses nothing.
"""

from __future__ import annotations

from typing import Any

from polarismail.auth.passwords import Passwords
from polarismail.config import Config
from polarismail.control import Control, do_operation
from polarismail.store.database import Database
from polarismail.store.directory import Directory
from polarismail.store.spool import Spool


class OfflineControl:
    """Made with nothing opened; `call` works between `start` and `stop`."""

    def __init__(self, reactor: Any, config: Config) -> None:
        self._database = Database(config.database_url, reactor=reactor, lock_path=config.lock_path, joins=False)
        self._passwords = Passwords(reactor, config.auth.passwords)
        self._control = Control(
            database=self._database,
            spool=Spool(self._database, config.paths.spool, reactor, config.spool),
            directory=Directory(self._database, reactor, config.directory),
            passwords=self._passwords,
            config=config,
        )

    async def start(self) -> None:
        """Open and migrate the database. Raises Unavailable, ConfigError."""
        await self._database.start()
        self._passwords.start()

    async def stop(self) -> None:
        """Close everything. Idempotent."""
        self._passwords.stop()
        await self._database.stop()

    async def call(self, operation: str, **arguments: Any) -> Any:
        """One operation by name, as over the control socket."""
        return await do_operation(self._control, operation, arguments)
