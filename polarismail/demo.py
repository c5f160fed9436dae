# SPDX-License-Identifier: MIT
"""`make run`: a complete server for trying out, on loopback high ports, with all its files in one directory that is used again.

The first start writes a configuration, a certificate, one domain and two accounts with random passwords; each later one
keeps what is there and makes what is missing. Then this process becomes `twistd -n polarismail`.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shlex
import sys
import time
from typing import Any

from polarismail.auth.passwords import hash_password
from polarismail.config import Config, load
from polarismail.net.tls import make_self_signed
from polarismail.store import directory_admin
from polarismail.store.database import Database

HOST = "127.0.0.1"
PORTS = {"mx": 2025, "mx-alt": 2026, "submission": 2587, "submissions": 2465, "pop3": 2110, "pop3s": 2995}
DOMAIN = "example.test"
HOSTNAME = f"mail.{DOMAIN}"
ACCOUNTS = (f"alice@{DOMAIN}", f"bob@{DOMAIN}")

_ROLES = {
    "mx": ("mx", "starttls"),
    "mx-alt": ("mx", "starttls"),
    "submission": ("submission", "starttls"),
    "submissions": ("submission", "implicit"),
    "pop3": ("pop3", "starttls"),
    "pop3s": ("pop3", "implicit"),
}
_CONFIGURATION = f"""\
# Written by `make run`; edit it as you like, it is kept. etc/polarismail.toml explains every key.
hostname = "{HOSTNAME}"

[paths]
state = "state"
spool = "state/spool"
mail = "mail"
control_socket = "run/control"

[tls]
certificate = "certificate.pem"
key = "key.pem"

[log]
file = "log/polarismail.log"

[greylisting]
# Every client of a server on loopback is this machine; without this line strangers wait five minutes.
allow_networks = ["127.0.0.0/8", "::1/128"]
"""


def main(arguments: list[str] | None = None) -> None:
    """Make what is missing, say what to do next, and become the server. Does not return."""
    parser = argparse.ArgumentParser(prog="python -m polarismail.demo", description=__doc__)
    parser.add_argument("--directory", default="var", help="where everything is kept (default: var)")
    parser.add_argument("--port-offset", type=int, default=0, help="added to each port, at the first start")
    parser.add_argument("--prepare-only", action="store_true", help="do not start the server")
    options = parser.parse_args(arguments)
    demo = prepare(os.path.abspath(options.directory), options.port_offset)
    print(instructions(options.directory, demo), flush=True)
    if not options.prepare_only:
        start = "from twisted.scripts.twistd import run; run()"
        configuration = os.path.join(options.directory, "polarismail.toml")
        words = ["-n", "--pidfile=", "polarismail", "--config", configuration]
        os.execv(sys.executable, [sys.executable, "-c", start, *words])


def prepare(directory: str, port_offset: int = 0) -> dict[str, Any]:
    """Make what is missing in `directory`; returns what `demo.json` there says. Raises OSError, PolarisError."""
    for name in ("", "state", "mail", "log", "run"):
        os.makedirs(os.path.join(directory, name), mode=0o700, exist_ok=True)
    inside = {name: os.path.join(directory, name) for name in ("certificate.pem", "key.pem", "ca.pem", "demo.json")}
    demo = _read_or_make_demo(inside["demo.json"], inside["ca.pem"], port_offset)
    configuration = os.path.join(directory, "polarismail.toml")
    if not os.path.exists(configuration):
        _write(configuration, _CONFIGURATION + _listeners(demo["ports"]), 0o644)
    if not all(os.path.exists(inside[name]) for name in ("certificate.pem", "key.pem", "ca.pem")):
        make_self_signed(HOSTNAME, inside["certificate.pem"], inside["key.pem"], ca_path=inside["ca.pem"])
    _make_accounts(load(configuration), demo["accounts"])
    return demo


def instructions(directory: str, demo: dict[str, Any]) -> str:
    """What to do next, for people: every line can be copied into a shell in this directory."""
    python = os.path.relpath(sys.executable)
    command = os.path.join(os.path.dirname(python), "polarismail")
    if not os.path.exists(command):  # run from a source tree that nobody has installed
        command = f"{python} -m polarismail.cli.main"
    alice, bob = demo["accounts"]
    configuration = os.path.join(directory, "polarismail.toml")
    send = (
        f"printf 'Subject: First mail\\n\\nIt works.\\n' | {command} -c {shlex.quote(configuration)}"
        f" send --from {alice['address']} --to {bob['address']} --password {alice['password']}"
    )
    code = (
        f"import poplib, ssl; m = poplib.POP3_SSL('{demo['host']}', {demo['ports']['pop3s']},"
        f" context=ssl.create_default_context(cafile='{os.path.relpath(demo['ca'])}'));"
        f" m.user('{bob['address']}'); m.pass_('{bob['password']}');"
        " [print(b'\\n'.join(m.retr(n + 1)[1]).decode('utf-8', 'replace'), end='\\n\\n') for n in range(m.stat()[0])];"
        " m.quit()"
    )
    read = f'{python} -c "{code}"'
    ports = ", ".join(f"{name} {number}" for name, number in demo["ports"].items())
    accounts = "\n".join(f"  {each['address']:24} password {each['password']}" for each in demo["accounts"])
    return (
        f"polarismail on {demo['host']}: {ports}\n{accounts}\n"
        f"  the same in {os.path.join(directory, 'demo.json')}; certificates to trust in {os.path.relpath(demo['ca'])}\n\n"
        f"Send a message:\n  {send}\n\nRead it:\n  {read}\n\n"
        "Ctrl-C stops the server.\n"
    )


def _read_or_make_demo(path: str, ca: str, port_offset: int) -> dict[str, Any]:
    if os.path.exists(path):
        with open(path) as file:
            known: dict[str, Any] = json.load(file)
        return known
    demo = {
        "host": HOST,
        "ports": {name: number + port_offset for name, number in PORTS.items()},
        "accounts": [{"address": address, "password": secrets.token_hex(8)} for address in ACCOUNTS],
        "ca": ca,
    }
    _write(path, json.dumps(demo, indent=2) + "\n", 0o600)
    return demo


def _listeners(ports: dict[str, int]) -> str:
    return "".join(
        f'\n[[listeners]]\nname = "{name}"\nrole = "{role}"\ntls = "{tls}"\naddress = "{HOST}"\nport = {ports[name]}\n'
        for name, (role, tls) in _ROLES.items()
    )


def _make_accounts(config: Config, accounts: list[dict[str, str]]) -> None:
    database = Database(config.database_url, reactor=None, lock_path=config.lock_path, joins=False)
    with database.transaction() as connection:
        if DOMAIN not in {row.name for row in directory_admin.list_domains(connection)}:
            directory_admin.add_domain(connection, DOMAIN)
        there = {str(account.address) for account in directory_admin.list_accounts(connection, DOMAIN)}
        for account in accounts:
            if account["address"] not in there:
                hashed = hash_password(account["password"], config.auth.passwords)
                directory_admin.add_account(connection, account["address"], hashed, now=time.time())


def _write(path: str, text: str, mode: int) -> None:
    # As a whole or not at all: what exists is never written again, so that a half file would stay.
    draft = f"{path}.new"
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode), "w") as file:
        file.write(text)
    os.replace(draft, path)


if __name__ == "__main__":
    main()
