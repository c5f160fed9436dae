# SPDX-License-Identifier: MIT
"""The configuration file becomes one frozen Config, or a ConfigError naming each fault: file, key, what was expected.

Every key has a default; `etc/polarismail.toml` explains each, and a test keeps the two equal. Tables that belong to
one room are read straight into that room's settings class. Relative paths start at the directory of the file.
"""

from __future__ import annotations

import os
import socket
import tomllib
from typing import Annotated, Literal

from attrs import Factory, evolve, field, frozen

from polarismail.auth.logins import LoginCacheSettings
from polarismail.auth.passwords import PasswordSettings
from polarismail.config_reader import FilePath, Flat, Reading, Without, read_table
from polarismail.headroom import MemorySettings
from polarismail.net.contracts import TransportSettings
from polarismail.net.limits import ConnectionLimits
from polarismail.net.listeners import NO_PORT, Listener
from polarismail.net.proxying import ProxySettings
from polarismail.net.resolver import ResolverSettings
from polarismail.net.stress import StressSettings
from polarismail.policy.gate import GateSettings
from polarismail.policy.greylisting import GreylistSettings
from polarismail.policy.limits import RateLimits
from polarismail.relay.local import LocalSettings
from polarismail.relay.routing import Smarthost
from polarismail.relay.settings import RelaySettings
from polarismail.serve.maildrop_door import DoorSettings
from polarismail.serve.pop3_session import Pop3SessionSettings
from polarismail.serve.reception import ReceptionSettings
from polarismail.serve.smtp_context import SessionSettings
from polarismail.store.directory import DirectorySettings
from polarismail.store.maildrop import MaildropSettings
from polarismail.store.space import SpaceSettings
from polarismail.store.spool import SpoolSettings
from polarismail.values.address import parse_domain, to_ascii
from polarismail.values.errors import BadAddress, ConfigError
from polarismail.wire.pop3_server import Pop3Settings as Pop3EngineSettings
from polarismail.wire.smtp_states import ServerSettings

# Each listener's role says these, and what is offered follows from what is there.
_OF_LISTENERS = Without("hostname", "require_auth", "lmtp", "offers", "max_hold_seconds")
# `[smarthost]`, `[smarthosts."domain"]` and `[local]` say these, and the server knows its own names.
_OF_RELAY = Without(
    "client.hostname",
    "client.max_recipients",
    "routing.smarthost",
    "routing.domains",
    "routing.own_names",
    "routing.own_endpoints",
    "local_batch",
    "large_octets",
)

MAX_WORKERS = 64
DEFAULT_PATH = "/etc/polarismail/polarismail.toml"


@frozen
class PathSettings:
    """`[paths]`: where things are kept."""

    state: FilePath = "/var/lib/polarismail"
    spool: FilePath = "/var/lib/polarismail/spool"
    mail: FilePath = "/var/mail/polarismail"
    control_socket: FilePath = "/run/polarismail/control"


@frozen
class DatabaseSettings:
    """`[database]`: SQLAlchemy URLs; "" is an SQLite file in `paths.state`."""

    url: str = field(default="", repr=False)  # it may hold a password
    counters_url: str = field(default="", repr=False)


@frozen
class TlsSettings:
    """`[tls]`: the certificate that every listener shows."""

    certificate: FilePath = "/etc/polarismail/tls/fullchain.pem"
    key: FilePath = "/etc/polarismail/tls/privkey.pem"


@frozen
class LogSettings:
    """`[log]`: the event log."""

    file: FilePath = "/var/log/polarismail/polarismail.log"
    format: Literal["json", "text"] = "json"


@frozen
class ControlSettings:
    """`[control]`: the socket that the `polarismail` command talks to."""

    group_access: bool = False


def _default_listeners() -> tuple[Listener, ...]:
    return (
        Listener("mx", 25, "mx"),
        Listener("mx-alt", 26, "mx"),
        Listener("submission", 587, "submission"),
        Listener("submissions", 465, "submission", "implicit"),
        Listener("pop3", 110, "pop3"),
        Listener("pop3s", 995, "pop3", "implicit"),
    )


@frozen
class AuthSettings:
    """`[auth]`: logins."""

    passwords: PasswordSettings = field(factory=PasswordSettings)
    logins: LoginCacheSettings = field(factory=LoginCacheSettings)


@frozen
class Pop3Settings:
    """`[pop3]`: sessions, their lines, and how maildrops are read; one flat table."""

    session: Pop3SessionSettings = field(factory=Pop3SessionSettings)
    engine: Pop3EngineSettings = field(factory=Pop3EngineSettings)
    maildrop: MaildropSettings = field(factory=MaildropSettings)
    door: DoorSettings = field(factory=DoorSettings)


@frozen
class Config:
    """Everything the service is told, frozen; each attribute is a key or a table of the file."""

    hostname: str = ""  # "": the machine's own name, put in by load()
    workers: int | Literal["auto"] = 1  # processes; "auto": one for each core
    listeners: tuple[Listener, ...] = Factory(_default_listeners)
    paths: PathSettings = PathSettings()
    database: DatabaseSettings = DatabaseSettings()
    tls: TlsSettings = TlsSettings()
    log: LogSettings = LogSettings()
    control: ControlSettings = ControlSettings()
    smtp: Annotated[ServerSettings, _OF_LISTENERS] = field(factory=ServerSettings)
    session: SessionSettings = field(factory=SessionSettings)
    reception: Annotated[ReceptionSettings, Flat("wishes")] = field(factory=ReceptionSettings)
    connections: ConnectionLimits = field(factory=ConnectionLimits)
    limits: RateLimits = field(factory=RateLimits)
    stress: Annotated[StressSettings, Flat("hurry")] = field(factory=StressSettings)
    memory: MemorySettings = field(factory=MemorySettings)
    proxy: ProxySettings = field(factory=ProxySettings)
    transport: TransportSettings = field(factory=TransportSettings)
    gate: Annotated[GateSettings, Flat("wait", "dns", "known")] = field(factory=GateSettings)
    greylisting: GreylistSettings = field(factory=GreylistSettings)
    auth: AuthSettings = field(factory=AuthSettings)
    directory: DirectorySettings = field(factory=DirectorySettings)
    spool: SpoolSettings = field(factory=SpoolSettings)
    space: SpaceSettings = field(factory=SpaceSettings)
    local: LocalSettings = field(factory=LocalSettings)
    pop3: Annotated[Pop3Settings, Flat("session", "engine", "maildrop", "door")] = field(factory=Pop3Settings)
    dns: ResolverSettings = field(factory=ResolverSettings)
    relay: Annotated[RelaySettings, _OF_RELAY, Flat("routing")] = field(factory=RelaySettings)
    smarthost: Smarthost | None = None
    smarthosts: dict[str, Smarthost | None] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        if self.hostname:
            try:
                parse_domain(self.hostname)
            except BadAddress as problem:
                raise ValueError(f'hostname: expected a domain name, found "{self.hostname}": {problem}') from problem
        if self.workers != "auto" and not 1 <= self.workers <= MAX_WORKERS:
            raise ValueError(f'workers: expected 1 to {MAX_WORKERS}, or "auto", found {self.workers}')
        for domain in self.smarthosts:
            try:
                folded = to_ascii(parse_domain(domain))
            except BadAddress as problem:
                raise ValueError(f'smarthosts: expected domain names, found "{domain}": {problem}') from problem
            if folded != domain:
                raise ValueError(f'smarthosts: expected "{folded}", found "{domain}"')
        names = [listener.name for listener in self.listeners]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f'listeners: expected different names, found "{name}" twice')
        places = [(listener.address, listener.port) for listener in self.listeners if listener.port]
        for address, port in places:
            if places.count((address, port)) > 1:
                what, which = ("ports", port) if port != NO_PORT else ("addresses", f'"{address}"')
                raise ValueError(f"listeners: expected different {what}, found {which} twice")
        if any(listener.tls != "none" for listener in self.listeners) and not (self.tls.certificate and self.tls.key):
            raise ValueError('tls: expected "certificate" and "key", because a listener has tls')

    @property
    def worker_count(self) -> int:
        """How many processes serve."""
        if self.workers == "auto":
            return min(MAX_WORKERS, len(os.sched_getaffinity(0)))
        return self.workers

    @property
    def database_url(self) -> str:
        """The SQLAlchemy URL of the main database."""
        return self.database.url or f"sqlite:///{os.path.join(self.paths.state, 'polarismail.db')}"

    @property
    def counters_url(self) -> str:
        """The SQLAlchemy URL of greylist and counters."""
        return self.database.counters_url or f"sqlite:///{os.path.join(self.paths.state, 'counters.db')}"

    @property
    def lock_path(self) -> str:
        """The file whose lock the writers of the main database queue on."""
        return os.path.join(self.paths.state, "polarismail.lock")


def read(path: str) -> str:
    """The text of the file. Raises ConfigError."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except OSError as problem:
        raise ConfigError(f"{path}: cannot be read: {problem.strerror}") from problem
    except UnicodeDecodeError as problem:
        raise ConfigError(f"{path}: expected TOML: {problem}") from problem


def parse(path: str, text: str) -> Config:
    """The Config that the text of the file at `path` stands for. Raises ConfigError, whose text has one line for each fault;
    the file's name is on every line."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise ConfigError(f"{path}: expected TOML: {problem}") from problem
    reading = Reading(os.path.dirname(os.path.abspath(path)))
    config: Config = read_table(Config, table, reading)
    if reading.problems:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in reading.problems))
    if "_" in config.hostname or not config.hostname.isascii():
        # Domains of others may; the name of a client or server may not (RFC 5321 §4.1.2, RFC 6531 §3.7.1).
        raise ConfigError(f'{path}: hostname: expected letters, digits and hyphens, found "{config.hostname}"')
    routing = evolve(config.relay.routing, smarthost=config.smarthost, domains=config.smarthosts)
    return evolve(config, hostname=config.hostname or _own_name(), relay=evolve(config.relay, routing=routing))


def load(path: str) -> Config:
    """Read and parse the file. Raises ConfigError as `parse` does."""
    return parse(path, read(path))


def _own_name() -> str:
    name = os.uname().nodename
    return (name if "." in name else socket.getfqdn()).lower() or "localhost"
