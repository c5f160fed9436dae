# SPDX-License-Identifier: MIT
"""A real server for end-to-end tests: the twistd process, its files in a directory, its ports on loopback.

In tests whose subject is not how processes start (see tests/conftest.py), processes are forked from one that has imported
everything, see tests/forking.py: the same code in processes of their own, without the second that importing takes.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import poplib
import shutil
import signal
import smtplib
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests import forking

ROOT = Path(__file__).resolve().parent.parent.parent
PASSWORD = "correct horse"
# Cheap hashing: what is tested here is mail, not the cost of argon2.
_FAST_PASSWORDS = "memory_kib = 64\niterations = 1\n"


# State directories with domains and accounts made by the command, for servers that want the same.
_MADE: dict[tuple[tuple[str, ...], tuple[str, ...]], Path] = {}


_GIVEN: set[int] = set()


def free_port() -> int:
    """A TCP port of loopback that nobody has now, and that no other test of this run was given.

    Below the range that the kernel gives to clients, so that no outgoing connection takes it in between; each of
    pytest-xdist's workers has a range of its own.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
    for _ in range(2000):
        port = 20000 + worker * 1500 + int.from_bytes(os.urandom(2), "big") % 1500
        if port in _GIVEN:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _GIVEN.add(port)
        return port
    raise AssertionError("no free port below 32000")


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    """Poll until `condition()` is true, and return it. Fails with `what`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds} s in vain: {what}")


class Helper:
    """A process of `polarismail.testing`: a DNS server or an SMTP sink on loopback."""

    def __init__(self, directory: Path, what: str, data: dict[str, Any] | None = None) -> None:
        self.port = free_port()
        self.data_path = directory / f"{what}-{self.port}.json"
        self.out_path = directory / f"{what}-{self.port}.out"
        self.write(data or {})
        flags = (
            ["--zone", str(self.data_path)]
            if what == "dns"
            else ["--script", str(self.data_path), "--out", str(self.out_path)]
        )
        words = ["-m", "polarismail.testing", what, "--port", str(self.port), *flags]
        reading, writing = os.pipe()
        with open(reading, "rb") as says, open(writing, "wb") as its_output:
            self.process: subprocess.Popen[bytes] | forking.Forked = (
                forking.spawn(words, stdout=its_output, stderr=2)
                if Server.forks
                else subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=its_output)
            )
            its_output.close()
            assert says.readline().startswith(b"ready")

    def write(self, data: dict[str, Any]) -> None:
        """Replace the zone or the script; it is read again before the next query."""
        fresh = self.data_path.with_suffix(".new")
        fresh.write_text(json.dumps(data))
        fresh.rename(self.data_path)

    def received(self) -> list[dict[str, Any]]:
        """What the sink has taken."""
        if not self.out_path.exists():
            return []
        return [json.loads(line) for line in self.out_path.read_text().splitlines()]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


class Server:
    """polarismail in a process of its own, or with `workers` in several. `extra` is TOML that goes below the standard tables.

    POLARISMAIL_TEST_WORKERS=2 runs every end-to-end test against two workers.
    """

    forks = False
    """Whether processes are forked rather than executed; never the server's where a start has options of its own."""

    def __init__(
        self,
        directory: Path,
        *,
        hostname: str = "mail.here.test",
        domains: tuple[str, ...] = ("here.test",),
        accounts: tuple[str, ...] = ("ann@here.test", "bob@here.test"),
        dns_port: int | None = None,
        remote_port: int = 25,
        greylisting: bool = False,
        extra: str = "",
        relay_extra: str = "",
        address: str = "127.0.0.1",
        workers: int = int(os.environ.get("POLARISMAIL_TEST_WORKERS", "1")),
    ) -> None:
        self.workers = workers
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.hostname, self.domains, self.accounts, self.address = hostname, domains, accounts, address
        self.ports = {name: free_port() for name in ("mx", "mx-alt", "submission", "submissions", "pop3", "pop3s")}
        self.config = directory / "polarismail.toml"
        self.process: subprocess.Popen[bytes] | forking.Forked | None = None
        self._settings: dict[str, Any] = dict(  # noqa: C408
            dns_port=dns_port, remote_port=remote_port, greylisting=greylisting, extra=extra, relay_extra=relay_extra
        )
        self._make_certificate()
        self.write_config()
        self._made_accounts = False

    # -- files -------------------------------------------------------------------------------------------------------

    def _make_certificate(self) -> None:
        from polarismail.net.tls import make_self_signed

        self.ca = self.directory / "ca.pem"
        if not self.ca.exists():
            make_self_signed(
                self.hostname, str(self.directory / "cert.pem"), str(self.directory / "key.pem"), ca_path=str(self.ca)
            )

    def write_config(self, **changes: Any) -> None:
        """Write the configuration file; `changes` replace what the constructor was given."""
        settings = self._settings = {**self._settings, **changes}
        roles = {
            "mx": ("mx", "starttls"),
            "mx-alt": ("mx", "starttls"),
            "submission": ("submission", "starttls"),
            "submissions": ("submission", "implicit"),
            "pop3": ("pop3", "starttls"),
            "pop3s": ("pop3", "implicit"),
        }
        text = f'hostname = "{self.hostname}"\nworkers = {self.workers}\n'
        for name, (role, tls) in roles.items():
            text += (
                f'[[listeners]]\nname = "{name}"\nrole = "{role}"\ntls = "{tls}"\n'
                f'address = "{self.address}"\nport = {self.ports[name]}\n'
            )
        text += '[paths]\nstate = "state"\nspool = "state/spool"\nmail = "mail"\ncontrol_socket = "run/control"\n'
        text += '[tls]\ncertificate = "cert.pem"\nkey = "key.pem"\n[log]\nfile = "log/events.log"\n'
        text += f"[auth.passwords]\n{_FAST_PASSWORDS}"
        text += f"[greylisting]\nenabled = {str(settings['greylisting']).lower()}\n"
        if settings["dns_port"]:
            text += f'[dns]\nservers = ["127.0.0.1:{settings["dns_port"]}"]\ntimeout_seconds = 1.0\n'
        text += f"[relay]\nport = {settings['remote_port']}\nallow_private_targets = true\n{settings['relay_extra']}"
        self.config.write_text(text + settings["extra"])

    def make_accounts(self) -> None:
        """Make domains and accounts, once; no server needs to run."""
        if self._made_accounts:
            return
        self._made_accounts = True
        key = (self.domains, self.accounts)
        if key not in _MADE:
            for domain in self.domains:
                self.command("domain", "add", domain)
            for account in self.accounts:
                self.command("account", "add", account, "--password-stdin", input=PASSWORD)
            _MADE[key] = Path(tempfile.mkdtemp(prefix="polarismail-made-")) / "state"
            atexit.register(shutil.rmtree, _MADE[key].parent, ignore_errors=True)
            shutil.copytree(self.directory / "state", _MADE[key])
        else:
            shutil.copytree(_MADE[key], self.directory / "state", dirs_exist_ok=True)

    # -- the process -------------------------------------------------------------------------------------------------

    def start(
        self,
        *,
        clock_offset: float = 0,
        twistd: tuple[str, ...] = (),
        before: tuple[str, ...] = (),
        descriptors: tuple[int, ...] = (),
    ) -> Server:
        """Run `twistd -n polarismail` and wait until it greets; the first start makes domains and accounts."""
        self.make_accounts()
        self.spawn(clock_offset=clock_offset, twistd=twistd, before=before, descriptors=descriptors)
        for name in ("pop3s", "mx"):
            self._wait_for(self.ports[name], greets=name == "mx")
        return self

    def spawn(
        self,
        *,
        clock_offset: float = 0,
        twistd: tuple[str, ...] = (),
        before: tuple[str, ...] = (),
        descriptors: tuple[int, ...] = (),
    ) -> None:
        """Run `twistd -n polarismail`, and do not wait. `before`: a command that executes the rest of its words; `descriptors`:
        what it inherits."""
        words = [
            "-n",
            "--pidfile",
            str(self.directory / "twistd.pid"),
            *twistd,
            "polarismail",
            "--config",
            str(self.config),
        ]
        if clock_offset:
            words += ["--clock-offset", str(clock_offset)]
        words = ["-c", "from twisted.scripts.twistd import run; run()", *words]
        with open(self.directory / "twistd.log", "ab") as log:
            if self.forks and self.workers == 1 and not (twistd or before or descriptors):
                self.process = forking.spawn(words, stdout=log, stderr=log, new_session=True)
                return
            self.process = subprocess.Popen(
                [*before, sys.executable, *words],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=descriptors,
            )

    def _wait_for(self, port: int, greets: bool) -> None:
        def connected() -> bool:
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"twistd ended with {self.process.returncode}:\n{self.twistd_log()[-4000:]}")
            try:
                with socket.create_connection((self.address, port), 10) as connection:
                    return not greets or connection.recv(3) == b"220"
            except OSError:
                return False

        wait_until(connected, f"the server does not answer on port {port}:\n{self.twistd_log()[-4000:]}")

    def twistd_log(self) -> str:
        """What the process printed."""
        path = self.directory / "twistd.log"
        return path.read_text() if path.exists() else ""

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        if self.process is None or self.process.poll() is not None:
            return self.process.returncode if self.process else 0
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(45)

    def kill(self) -> None:
        """SIGKILL, to every process of it."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def signal(self, number: int) -> None:
        """Send a signal to the server."""
        os.kill(self.pid, number)

    # -- people's ways in --------------------------------------------------------------------------------------------

    def command(self, *words: str, input: str = "", check: bool = True) -> str:
        """Run the `polarismail` command; its standard output."""
        words = ("-m", "polarismail.cli.main", "--config", str(self.config), *words)
        with (
            tempfile.TemporaryFile("w+") as given,
            tempfile.TemporaryFile("w+") as out,
            tempfile.TemporaryFile("w+") as err,
        ):
            given.write(input + "\n")
            given.seek(0)
            if self.forks:
                process: subprocess.Popen[bytes] | forking.Forked = forking.spawn(
                    words, stdin=given, stdout=out, stderr=err
                )
            else:
                process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdin=given, stdout=out, stderr=err)
            try:
                status = process.wait(60)
            finally:
                process.kill()
            out.seek(0)
            err.seek(0)
            said, complained = out.read(), err.read()
        assert not check or status == 0, f"{words}: {status}\n{said}\n{complained}"
        return said

    def json(self, *words: str) -> Any:
        """The same with `--json`, parsed."""
        return json.loads(self.command("--json", *words))

    @property
    def tls(self) -> ssl.SSLContext:
        """A client context that trusts this server's certificate."""
        return ssl.create_default_context(cafile=str(self.ca))

    @contextlib.contextmanager
    def smtp(self, port: str = "mx", login: str | None = None, password: str = PASSWORD) -> Iterator[smtplib.SMTP]:
        """A session with one of our ports; over TLS and logged in where `login` is given."""
        if port == "submissions":
            client: smtplib.SMTP = smtplib.SMTP_SSL(
                "localhost", self.ports[port], "client.test", timeout=30, context=self.tls
            )
        else:
            client = smtplib.SMTP("localhost", self.ports[port], "client.test", timeout=30)
        try:
            client.ehlo()
            if login:
                if port != "submissions":
                    client.starttls(context=self.tls)
                client.login(login, password)
            yield client
        finally:
            client.close()

    def messages(self, name: str, password: str = PASSWORD) -> list[bytes]:
        """All messages of an account, read over POP3 with TLS."""
        client = poplib.POP3_SSL("localhost", self.ports["pop3s"], timeout=30, context=self.tls)
        try:
            client.user(name)
            client.pass_(password)
            count = client.stat()[0]
            found = [b"\r\n".join(client.retr(at)[1]) + b"\r\n" for at in range(1, count + 1)]
            client.quit()
            return found
        finally:
            client.close()

    def wait_for_messages(self, name: str, count: int, seconds: float = 30) -> list[bytes]:
        """The account's messages, once there are `count`."""
        return wait_until(
            lambda: found if len(found := self.messages(name)) >= count else None,
            f"{count} messages for {name}; the queue: {self.command('queue', 'list', check=False)}",
            seconds,
        )

    def events(self, event: str | None = None) -> list[dict[str, Any]]:
        """The event log."""
        path = self.directory / "log" / "events.log"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if event is None or row.get("event") == event]
