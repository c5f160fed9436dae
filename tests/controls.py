# SPDX-License-Identifier: MIT
"""A Control on real databases for tests, with and without its socket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from polarismail.auth.passwords import Passwords, PasswordSettings
from polarismail.config import Config, ControlSettings, PathSettings
from polarismail.control import Control
from polarismail.control_socket import ControlServer
from polarismail.store.database import Database
from polarismail.store.directory import Directory
from polarismail.store.interfaces import Committed, Submission
from polarismail.store.spool import Spool
from polarismail.values.address import Mailbox
from polarismail.values.envelope import Envelope, Recipient, SessionFacts
from tests.reactor import reactor, run

FAST = PasswordSettings(memory_kib=64, iterations=1)


@contextmanager
def open_control(directory: Path) -> Iterator[Control]:
    """A Control as the command has it where no server runs."""
    config = Config(hostname="mail.here.test", paths=PathSettings(state=str(directory)))
    config = attrs.evolve(config, auth=attrs.evolve(config.auth, passwords=FAST))
    database = Database(config.database_url, reactor=reactor, lock_path=config.lock_path)
    control = Control(
        database=database,
        spool=Spool(database, str(directory / "spool"), reactor, config.spool),
        directory=Directory(database, reactor, config.directory),
        passwords=Passwords(reactor, FAST),
        config=config,
    )
    run(database.start)
    run(control.spool.start)
    run(control.passwords.start)
    try:
        yield control
    finally:
        run(control.passwords.stop)
        run(control.spool.stop)
        run(database.stop)


@contextmanager
def serve(control: Control, path: Path, **settings: Any) -> Iterator[ControlServer]:
    """Its socket at `path`."""
    server = ControlServer(control, str(path), reactor, ControlSettings(**settings))
    run(server.start)
    try:
        yield server
    finally:
        run(server.stop)


def put_in_queue(control: Control, *addresses: str, sender: str = "ann@here.test") -> str:
    """Accept one message for foreign recipients, and leave it for whoever claims it; its queue id."""

    async def put() -> str:
        draft = control.spool.draft()
        draft.write(b"Subject: x\r\n\r\nText\r\n")
        boxes = [Mailbox.parse(address) for address in addresses]
        recipients = tuple(Recipient(box, box, box.domain) for box in boxes)
        facts = SessionFacts("submission", "ESMTPSA", "192.0.2.1", 4242, "client.test", account=sender)
        envelope = Envelope(Mailbox.parse(sender) if sender else None, recipients)
        committed = await control.spool.commit(Submission(draft, envelope, facts, b"Received: x\r\n"))
        assert isinstance(committed, Committed)
        await control.spool.release(committed.recipients)
        return committed.message.queue_id

    return run(put)
