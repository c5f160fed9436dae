# SPDX-License-Identifier: MIT
"""One server whose state, spool and maildirs are on one file system, the ways to break it, and a look at what is left."""

from __future__ import annotations

import re
import socket
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attrs import fields_dict

from polarismail.auth.passwords import PasswordSettings, hash_password
from polarismail.config import Config, load
from polarismail.store import directory_admin
from polarismail.store.database import Database
from polarismail.store.maildir import FileName, locate
from tests.crash.history import Copy, History, Places
from tests.crash.lives import Life, Lives
from tests.crash.load import ACCOUNTS, DOMAIN, PASSWORD
from tests.e2e.server import free_port

DAY = 86400.0
_FINAL_RECIPIENT = re.compile(rb"^Final-Recipient: *rfc822; *(\S+)", re.IGNORECASE)
_ACTION = re.compile(rb"^Action: *(\w+)", re.IGNORECASE)


class World:
    """A server on `path`, with its accounts made. Its log is beside, where no power is cut."""

    def __init__(
        self,
        path: Path,
        beside: Path,
        lives: Lives,
        *,
        dns_port: int,
        remote_port: int,
        workers: int = 1,
        extra: str = "",
        relay: str = "",
        schedule: str = "",
    ) -> None:
        self.path, self.lives, self.log = path, lives, beside / "twistd.log"
        self.events, self.config = beside / "events.log", beside / "polarismail.toml"
        self.ports = {"mx": free_port(), "submission": free_port()}
        self.clock_offset = 0.0
        self.life: Life | None = None
        text = self._configuration(beside, dns_port, remote_port, workers) + relay
        causes = ("greylisted", "busy", "connect", "blocked", "dns", "other")
        text += "[relay.schedule]\n" + (schedule or "".join(f"{cause}_seconds = 2.0\n" for cause in causes))
        self.config.write_text(text + extra)
        for folder in ("state", "state/spool", "mail"):
            (path / folder).mkdir(exist_ok=True)
        self._maildirs = self._make_accounts()

    def _configuration(self, beside: Path, dns_port: int, remote_port: int, workers: int) -> str:
        text = 'hostname = "mail.here.test"\n'
        if workers != 1:
            if "workers" not in fields_dict(Config):
                raise ValueError("this version of polarismail knows no workers")
            text += f"workers = {workers}\n"
        for name, port in self.ports.items():
            text += (
                f'[[listeners]]\nname = "{name}"\nrole = "{name}"\ntls = "none"\naddress = "127.0.0.1"\nport = {port}\n'
                f'plaintext_auth = "always"\n'
            )
        text += f'[paths]\nstate = "{self.path}/state"\nspool = "{self.path}/state/spool"\nmail = "{self.path}/mail"\n'
        text += f'control_socket = "{beside}/control"\n[log]\nfile = "{self.events}"\n'
        text += "[auth.passwords]\nmemory_kib = 64\niterations = 1\n[greylisting]\nenabled = false\n"
        text += f'[dns]\nservers = ["127.0.0.1:{dns_port}"]\n[transport]\ndrain_seconds = 5.0\n'
        # These disks are small, and it is what happens when they are full that is looked at.
        text += "[space]\nmin_free_part = 0.0\nmin_free_messages = 0.0\nmin_free_inodes_part = 0.0\n"
        text += f"[relay]\nport = {remote_port}\nallow_private_targets = true\nmerge_seconds = 0.2\n"
        return text + "retry_record_seconds = 0.5\n"

    def _make_accounts(self) -> dict[str, Path]:
        config = load(str(self.config))
        database = Database(config.database_url, reactor=None, lock_path=config.lock_path, joins=False)
        with database.transaction() as connection:
            directory_admin.add_domain(connection, DOMAIN)
            hashed = hash_password(PASSWORD, PasswordSettings(memory_kib=64, iterations=1))
            for address in ACCOUNTS:
                directory_admin.add_account(connection, address, hashed, now=time.time())
            rows = directory_admin.list_accounts(connection, DOMAIN)
        self._database = Path(config.paths.state) / "polarismail.db"
        return {str(row.address): Path(locate(config.paths.mail, row.maildir)) for row in rows}

    # -- life --------------------------------------------------------------------------------------------------------

    def begin(self, **options: Any) -> Life:
        """Start the server; does not wait until it greets."""
        assert self.life is None
        self.life = self.lives.begin(self.config, self.log, clock_offset=self.clock_offset, **options)
        return self.life

    def kill(self) -> int:
        """SIGKILL to all its processes; the exit status that it had come to, or -9."""
        life, self.life = self.life, None
        assert life is not None
        life.kill()
        return life.wait()

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        life, self.life = self.life, None
        assert life is not None
        return life.terminate()

    def wait_for_greeting(self, seconds: float = 30.0) -> None:
        """Until it answers at the MX port. Raises AssertionError with what it printed."""
        self.wait_until(self.greets, "a greeting", seconds, every=0.005)

    def greets(self) -> bool:
        """Whether it answers at the MX port now. Raises AssertionError where the server has ended."""
        status = self.life.ended() if self.life is not None else None
        assert status is None, f"the server ended with status {status}:\n{self.printed()}"
        try:
            with socket.create_connection(("127.0.0.1", self.ports["mx"]), 10) as connection:
                connection.settimeout(10)
                return connection.recv(3) == b"220"
        except OSError:
            return False

    def wait_until(self, condition: Callable[[], Any], what: str, seconds: float = 30.0, every: float = 0.02) -> Any:
        """Poll until `condition()` is true, and return it. Raises AssertionError with what the server printed."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found = condition()
            if found:
                return found
            time.sleep(every)
        raise AssertionError(f"waited {seconds} s in vain for {what}; queued: {self.queue()[:10]}\n{self.printed()}")

    def printed(self) -> str:
        """The end of what it printed, and of its event log."""
        ends = [path.read_text(errors="replace")[-3000:] for path in (self.log, self.events) if path.exists()]
        return "\n--\n".join(ends)

    # -- a look at what is there -------------------------------------------------------------------------------------

    def queue(self) -> list[tuple[int, str]]:
        """(message's number in the database, recipient) of what waits; the server may be running."""
        connection = sqlite3.connect(f"file:{self._database}?mode=ro", uri=True, timeout=10)
        try:
            return connection.execute("SELECT message_id, forward_path FROM recipients WHERE state < 10").fetchall()
        finally:
            connection.close()

    def due_times(self) -> list[float]:
        """When those that wait will be tried, by the server's clock."""
        connection = sqlite3.connect(f"file:{self._database}?mode=ro", uri=True, timeout=10)
        try:
            return [
                float(each[0]) for each in connection.execute("SELECT next_attempt FROM recipients WHERE state < 10")
            ]
        finally:
            connection.close()

    def count_messages(self) -> int:
        """Messages in the spool."""
        connection = sqlite3.connect(f"file:{self._database}?mode=ro", uri=True, timeout=10)
        try:
            return int(connection.execute("SELECT count(*) FROM messages").fetchone()[0])
        finally:
            connection.close()

    def read_some(self, luck: Callable[[], float]) -> None:
        """A mail reader comes by: some of what is new moves to cur/."""
        for maildir in self._maildirs.values():
            if luck() < 0.3 and (maildir / "new").is_dir():
                for file in list((maildir / "new").iterdir())[:5]:
                    file.rename(maildir / "cur" / f"{file.name}:2,S")

    def orphans(self) -> list[str]:
        """Contents in the spool that no message refers to: only while nothing runs and nothing is queued.

        What was set aside because its sync failed is kept for people to look at, and not counted.
        """
        spool = self.path / "state" / "spool"
        return [str(path) for path in spool.rglob("*") if path.is_file() and path.suffix != ".broken"]

    def look(self, history: History) -> Places:
        """All places where mail can be; the server is stopped."""
        from polarismail.values.envelope import render_queue_id

        places = Places(remote=history.taken)
        for recipient, maildir in self._maildirs.items():
            for part in ("new", "cur"):
                for file in (maildir / part).iterdir() if (maildir / part).is_dir() else ():
                    self._look_at(file, recipient, history, places)
        places.queued = {(render_queue_id(number), recipient) for number, recipient in self.queue()}
        return places

    def _look_at(self, file: Path, recipient: str, history: History, places: Places) -> None:
        octets = file.read_bytes()
        size = FileName.parse(file.name).disk_octets
        wire = octets.replace(b"\n", b"\r\n")
        if octets.startswith(b"Return-Path: <>\n") and b"\nContent-Type: multipart/report" in octets[:4000]:
            self._look_at_report(octets, history, places)
            return
        number, problem = history.compare(wire)
        if not problem and size != len(octets):
            problem = f"its name says {size} octets, it has {len(octets)}"
        places.maildirs.append(Copy(number, recipient, problem))

    def _look_at_report(self, octets: bytes, history: History, places: Places) -> None:
        at = octets.find(b"\nX-Crash: ")
        number = int(octets[at + 10 : at + 30].split(b"\n")[0]) if at >= 0 else 0
        recipient = ""
        for line in octets.split(b"\n"):
            if found := _FINAL_RECIPIENT.match(line):
                recipient = found[1].decode()
            elif (found := _ACTION.match(line)) and found[1].lower() == b"failed":
                places.reports[number, recipient] += 1
            elif found:
                places.delays += 1
