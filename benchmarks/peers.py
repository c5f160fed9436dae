# SPDX-License-Identifier: MIT
"""The two servers of a comparison, each started from nothing in a directory of its own and stopped again.

Postfix is Debian's, with its default durability, delivering to a Maildir through `virtual`; polarismail is this tree, one
process, with the shipped durability. Both listen on loopback and take mail for the same local domain.
"""

from __future__ import annotations

import json
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

ROOT = Path(__file__).resolve().parent.parent
DOMAIN = "local.test"
RECIPIENT = f"box@{DOMAIN}"


class PeerFailed(Exception):
    """A server did not come up; the text says which and what it printed."""


def wait_for_port(port: int, process: subprocess.Popen[bytes] | None = None, seconds: float = 30) -> None:
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
            time.sleep(0.05)
    raise PeerFailed(f"nobody greets on port {port}")


@define
class Postfix:
    """Debian's Postfix on a loopback port. Needs root, and the packages postfix and its smtp-source."""

    directory: Path
    port: int = 2525
    name: str = "postfix"
    smtp_port: int = 2526  # where it relays everything that is not local

    @property
    def new(self) -> Path:
        """The Maildir's new/, where delivered mail shows."""
        return self.directory / "vmail" / "box" / "new"

    def start(self) -> None:
        """Write a configuration of its own and start it."""
        for name in ("conf", "queue", "data", "vmail"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        os.chmod(self.directory, 0o755)
        shutil.chown(self.directory / "vmail", "nobody", "nogroup")
        shutil.chown(self.directory / "data", "postfix")
        conf = self.directory / "conf"
        master = Path("/etc/postfix/master.cf").read_text().splitlines()
        lines = []
        for line in master:
            if line.startswith("smtp ") and " inet " in line:
                line = f"{self.port} inet n - n - - smtpd"
            elif " unix " in line and not line.startswith((" ", "#")):
                fields = line.split()
                fields[4] = "n"  # no chroot: the queue directory is not the system's
                line = "\t".join(fields)
            lines.append(line)
        (conf / "master.cf").write_text("\n".join(lines) + "\n")
        nobody = pwd.getpwnam("nobody")
        settings = {
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
            "virtual_mailbox_maps": "static:box/",
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
        (conf / "main.cf").write_text("".join(f"{key} = {value}\n" for key, value in settings.items()))
        done = subprocess.run(["postfix", "-c", conf, "start"], capture_output=True, text=True)
        if done.returncode:
            raise PeerFailed(f"postfix start: {done.stderr}")
        wait_for_port(self.port)

    def stop(self) -> None:
        """Stop every process of it."""
        subprocess.run(["postfix", "-c", self.directory / "conf", "stop"], capture_output=True)
        time.sleep(0.5)


@define
class Polarismail:
    """This tree's server, through the real twistd, in one process."""

    directory: Path
    port: int = 2550
    name: str = "polarismail"
    extra: str = ""  # more TOML
    python: str = sys.executable
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def new(self) -> Path:
        """The Maildir's new/, where delivered mail shows."""
        return self.directory / "box" / "new"

    @property
    def pid(self) -> int:
        """Of the running server."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Make the account where there is none, then start."""
        self.directory.mkdir(parents=True, exist_ok=True)
        config = self.directory / "polarismail.toml"
        config.write_text(
            f"""
hostname = "pm.lab.test"
[[listeners]]
name = "mx"
port = {self.port}
address = "127.0.0.1"
role = "mx"
tls = "none"
[paths]
state = "state"
spool = "spool"
mail = "mail"
control_socket = "control"
[log]
file = "events.log"
[greylisting]
enabled = false
{self.extra}
"""
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if not (self.directory / "state" / "polarismail.db").exists():
            for words in (
                ("domain", "add", DOMAIN),
                ("account", "add", RECIPIENT, "--maildir", str(self.directory / "box"), "--password-stdin"),
            ):
                done = subprocess.run(
                    [self.python, "-m", "polarismail.cli.main", "--config", config, *words],
                    input=b"secret\n",
                    capture_output=True,
                    env=environment,
                )
                if done.returncode:
                    raise PeerFailed(f"polarismail {' '.join(words)}: {done.stderr.decode()}")
        log = open(self.directory / "twistd.log", "ab")
        self._process = subprocess.Popen(
            [
                self.python,
                "-c",
                "from twisted.scripts.twistd import run; run()",
                "-n",
                f"--pidfile={self.directory}/pid",
                "polarismail",
                "--config",
                config,
            ],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            wait_for_port(self.port, self._process)
        except PeerFailed as problem:
            raise PeerFailed(f"{problem}\n{(self.directory / 'twistd.log').read_text()[-2000:]}") from problem

    def stop(self) -> None:
        """SIGTERM, and wait."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(40)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def cpu_seconds(pid: int) -> float:
    """CPU that a process has used, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def write_results(path: Path, results: object) -> None:
    """The figures as JSON, for programs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
