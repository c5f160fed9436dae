# SPDX-License-Identifier: MIT
"""The two servers of a comparison, each started from nothing in a directory of its own and stopped again.

Postfix is Debian's, with its default durability, delivering to Maildirs through `virtual`; polarismail is this tree, with
the shipped durability. Both listen on loopback, take mail for the same mailboxes of the same local domain, and send the rest
to one next hop. With a certificate both offer STARTTLS, and take logins over implicit TLS on the next port.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from attrs import define, field

from benchmarks.dovecot import Dovecot
from polarismail.auth.passwords import PasswordSettings, hash_password
from polarismail.config import load
from polarismail.store import directory_admin
from polarismail.store.database import Database

ROOT = Path(__file__).resolve().parent.parent
DOMAIN = "local.test"
RECIPIENT = f"box@{DOMAIN}"
SENDER = "a@remote.test"
PASSWORD = "correct horse battery staple"


class PeerFailed(Exception):
    """A server did not come up; the text says which and what it printed."""


def wait_for_port(port: int, process: subprocess.Popen[bytes] | None = None, seconds: float = 60) -> None:
    """Until somebody greets on 127.0.0.1:port. Raises PeerFailed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if process is not None and process.poll() is not None:
            raise PeerFailed(f"the server on port {port} ended with {process.returncode}")
        try:
            with socket.create_connection(("127.0.0.1", port), 5) as connection:
                if connection.recv(4)[:3] in (b"220", b"+OK"):
                    return
        except OSError:
            time.sleep(0.02)
    raise PeerFailed(f"nobody greets on port {port}")


@define
class Certificate:
    """What both servers show."""

    chain: Path
    key: Path


@define
class Postfix:
    """Debian's Postfix on a loopback port. Needs root, and the packages postfix and its smtp-source."""

    directory: Path
    port: int = 2525
    name: str = "postfix"
    smtp_port: int = 2526  # where it relays everything that is not local
    boxes: tuple[str, ...] = ("box",)  # local parts with a mailbox
    aliases: dict[str, str] = field(factory=dict)  # local part -> address
    certificate: Certificate | None = None
    logins: Dovecot | None = None
    settings: dict[str, object] = field(factory=dict)  # more of main.cf

    @property
    def new_directories(self) -> list[Path]:
        """The new/ of each mailbox, where delivered mail shows."""
        return [self.directory / "vmail" / box / "new" for box in self.boxes]

    @property
    def new(self) -> Path:
        """That of the first mailbox."""
        return self.new_directories[0]

    @property
    def roots(self) -> list[int]:
        """The processes that all others of it descend from."""
        master = int((self.directory / "queue" / "pid" / "master.pid").read_text())
        return [master, *([self.logins.pid] if self.logins is not None else [])]

    def start(self) -> None:
        """Write a configuration of its own and start it."""
        for name in ("conf", "queue", "data", "vmail"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        os.chmod(self.directory, 0o755)
        shutil.chown(self.directory / "vmail", "nobody", "nogroup")
        shutil.chown(self.directory / "data", "postfix")
        conf = self.directory / "conf"
        (conf / "master.cf").write_text(self._master())
        (conf / "boxes").write_text("".join(f"{box}@{DOMAIN} {box}/\n" for box in self.boxes))
        (conf / "aliases").write_text("".join(f"{name}@{DOMAIN} {to}\n" for name, to in self.aliases.items()))
        settings = {**self._main(), **self._tls(), **self.settings}
        (conf / "main.cf").write_text("".join(f"{key} = {value}\n" for key, value in settings.items()))
        if self.logins is not None:
            self.logins.start()
        done = subprocess.run(["postfix", "-c", conf, "start"], capture_output=True, text=True)
        if done.returncode:
            raise PeerFailed(f"postfix start: {done.stderr}")
        wait_for_port(self.port)

    def stop(self) -> None:
        """Stop every process of it."""
        subprocess.run(["postfix", "-c", self.directory / "conf", "stop"], capture_output=True)
        if self.logins is not None:
            self.logins.stop()
        time.sleep(0.5)

    def _master(self) -> str:
        lines = []
        for line in Path("/etc/postfix/master.cf").read_text().splitlines():
            if line.startswith("smtp ") and " inet " in line:
                line = f"{self.port} inet n - n - - smtpd"
            elif " unix " in line and not line.startswith((" ", "#")):
                fields = line.split()
                fields[4] = "n"  # no chroot: the queue directory is not the system's
                line = "\t".join(fields)
            lines.append(line)
        if self.logins is not None:
            lines.append(f"{self.port + 1} inet n - n - - smtpd -o smtpd_tls_wrappermode=yes")
            lines.append("  -o smtpd_tls_security_level=encrypt -o smtpd_sasl_auth_enable=yes")
            lines.append("  -o smtpd_recipient_restrictions=permit_sasl_authenticated,reject")
        return "\n".join(lines) + "\n"

    def _main(self) -> dict[str, object]:
        nobody = pwd.getpwnam("nobody")
        return {
            "compatibility_level": "3.7",
            "queue_directory": self.directory / "queue",
            "data_directory": self.directory / "data",
            "command_directory": "/usr/sbin",
            "daemon_directory": "/usr/lib/postfix/sbin",
            "mail_owner": "postfix",
            "myhostname": "pf.lab.test",
            "mydestination": "",
            "inet_interfaces": "127.0.0.1",
            "inet_protocols": "ipv4",
            "mynetworks": "127.0.0.0/8",
            "virtual_mailbox_domains": DOMAIN,
            "virtual_mailbox_base": self.directory / "vmail",
            "virtual_mailbox_maps": f"texthash:{self.directory}/conf/boxes",
            "virtual_alias_maps": f"texthash:{self.directory}/conf/aliases" if self.aliases else "",
            "virtual_uid_maps": f"static:{nobody.pw_uid}",
            "virtual_gid_maps": f"static:{nobody.pw_gid}",
            "virtual_minimum_uid": 1,
            "virtual_transport": "virtual",
            "default_transport": f"smtp:[127.0.0.1]:{self.smtp_port}",
            "alias_maps": "",
            "smtpd_recipient_restrictions": "permit_mynetworks,reject",
            "smtpd_client_connection_count_limit": 0,
            "smtpd_client_connection_rate_limit": 0,
            "in_flow_delay": 0,
            "disable_dns_lookups": "yes",
            "default_process_limit": 400,
            "maillog_file": self.directory / "postfix.log",
            "maillog_file_prefixes": self.directory,
        }

    def _tls(self) -> dict[str, object]:
        if self.certificate is None:
            return {}
        found: dict[str, object] = {
            "smtpd_tls_security_level": "may",
            "smtpd_tls_cert_file": self.certificate.chain,
            "smtpd_tls_key_file": self.certificate.key,
        }
        if self.logins is not None:
            found |= {"smtpd_sasl_type": "dovecot", "smtpd_sasl_path": self.logins.socket}
        return found


@define
class Polarismail:
    """This tree's server, through the real twistd."""

    directory: Path
    port: int = 2550
    name: str = "polarismail"
    extra: str = ""  # more TOML
    workers: int | None = None  # None: the key is not written
    smtp_port: int | None = None  # a smarthost on loopback for everything that is not local
    boxes: tuple[str, ...] = ("box",)
    aliases: dict[str, str] = field(factory=dict)
    certificate: Certificate | None = None
    python: str = sys.executable
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def new_directories(self) -> list[Path]:
        """The new/ of each mailbox, where delivered mail shows."""
        return [self.directory / "boxes" / box / "new" for box in self.boxes]

    @property
    def new(self) -> Path:
        """That of the first mailbox."""
        return self.new_directories[0]

    @property
    def pid(self) -> int:
        """Of the process that was started: the server, or the supervisor of its workers."""
        assert self._process is not None
        return self._process.pid

    @property
    def roots(self) -> list[int]:
        """The processes that all others of it descend from."""
        return [self.pid]

    @property
    def config(self) -> Path:
        """Its configuration file."""
        return self.directory / "polarismail.toml"

    def start(self) -> None:
        """Make the accounts where there are none, then start."""
        self.prepare()
        log = open(self.directory / "twistd.log", "ab")
        code = "from twisted.scripts.twistd import run; run()"
        self._process = subprocess.Popen(
            [self.python, "-c", code, "-n", f"--pidfile={self.directory}/pid", "polarismail", "--config", self.config],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
        )
        log.close()
        try:
            wait_for_port(self.port, self._process, 120)
        except PeerFailed as problem:
            raise PeerFailed(f"{problem}\n{(self.directory / 'twistd.log').read_text()[-2000:]}") from problem

    def stop(self) -> None:
        """SIGTERM, and wait."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def prepare(self) -> None:
        """Write the configuration, and the accounts where there are none."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.config.write_text(self._toml())
        if (self.directory / "state" / "polarismail.db").exists():
            return
        (self.directory / "state").mkdir(exist_ok=True)
        config = load(str(self.config))
        hashed = hash_password(PASSWORD, PasswordSettings())
        database = Database(config.database_url, reactor=None, lock_path=config.lock_path, joins=False)
        with database.transaction() as connection:
            directory_admin.add_domain(connection, DOMAIN)
            for box in self.boxes:
                place = str(self.directory / "boxes" / box)
                address = f"{box}@{DOMAIN}"
                directory_admin.add_account(connection, address, hashed, now=time.time(), maildir=place)
            for name, to in self.aliases.items():
                directory_admin.add_alias(connection, f"{name}@{DOMAIN}", [to])
        (self.directory / "boxes").mkdir(exist_ok=True)

    def _toml(self) -> str:
        lines = ['hostname = "pm.lab.test"']
        if self.workers is not None:
            lines.append(f"workers = {self.workers}")
        lines += _listener("mx", self.port, "mx", "none" if self.certificate is None else "starttls")
        if self.certificate is not None:
            lines += _listener("submissions", self.port + 1, "submission", "implicit")
            lines += ["[tls]", f'certificate = "{self.certificate.chain}"', f'key = "{self.certificate.key}"']
        lines += ["[paths]", 'state = "state"', 'spool = "spool"', 'mail = "mail"', 'control_socket = "control"']
        lines += ["[log]", 'file = "events.log"', "[greylisting]", "enabled = false"]
        if self.smtp_port is not None:
            lines += ["[smarthost]", 'host = "127.0.0.1"', f"port = {self.smtp_port}", 'tls = "none"']
        return "\n".join([*lines, self.extra, ""])


def _listener(name: str, port: int, role: str, tls: str) -> list[str]:
    place = [f"port = {port}", 'address = "127.0.0.1"']
    return ["[[listeners]]", f'name = "{name}"', *place, f'role = "{role}"', f'tls = "{tls}"']
