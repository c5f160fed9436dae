# SPDX-License-Identifier: MIT
"""What a server has before it serves, in one value: bound sockets, the certificate, and its place among the workers.

`prepare` makes it while the process may still be root: sockets are bound, the certificate is read, missing directories are
made. A supervisor hands it on: its descriptors are inherited by each worker, the rest crosses the worker's channel as the
first line of it, so that a worker needs no right that was dropped, and starts with the very configuration that was checked.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from attrs import evolve, field, frozen

from polarismail.config import Config, parse
from polarismail.net import binding
from polarismail.net.activation import InheritedSockets
from polarismail.net.tls import CertificateStore
from polarismail.privileges import make_directory
from polarismail.store.migrations import rehearse
from polarismail.values.errors import ConfigError

T = TypeVar("T")
_IMPORTED_LATE = (
    "argon2.low_level",
    "idna",
    "polarismail.serve.smtp",
    "sqlalchemy.dialects.sqlite.pysqlite",
    "twisted.protocols.tls",
)
_PATIENCE_SECONDS = 5.0
MAX_PACKET_OCTETS = 8 * 1024 * 1024


@frozen
class Prepared:
    """Bound sockets by listener, and the certificate where a listener has TLS. `files` are those of UNIX sockets; a worker
    has none."""

    bound: dict[str, list[socket.socket]]
    certificates: CertificateStore | None
    files: binding.SocketFiles = field(factory=binding.SocketFiles)

    def close(self) -> None:
        """Close every socket that is still here, and remove the files of UNIX sockets. Idempotent."""
        self.files.remove()
        for each in self.bound.values():
            for one in each:
                one.close()
        self.bound.clear()


def prepare(config: Config, uid: int | None, gid: int | None) -> Prepared:
    """Make directories, read the certificate, bind. Raises ConfigError, and nothing stays bound then."""
    for path in (config.paths.state, config.paths.spool, config.paths.mail):
        make_directory(path, uid, gid)
    for path in (config.log.file, config.paths.control_socket):
        if os.path.dirname(path):
            make_directory(os.path.dirname(path), uid, gid, 0o755)
    inherited = InheritedSockets.from_environment()
    prepared = Prepared({}, _read_certificate(config))
    try:
        for listener in config.listeners:
            if listener.kind == "unix":
                make_directory(os.path.dirname(listener.within), uid, gid, 0o755)
            prepared.bound[listener.name] = patiently(partial(binding.bind, listener, inherited, uid, gid))
            if listener.kind == "unix":
                prepared.files.note(listener.within)
        inherited.check_all_taken()
    except BaseException:
        prepared.close()
        raise
    if os.geteuid() == 0 and uid:
        import_everything()
    return prepared


def patiently(attempt: Callable[[], T]) -> T:
    """What `attempt` returns; where an address is in use, once it is free, or after `_PATIENCE_SECONDS` what it raises.

    The workers of a server whose supervisor was killed let go of its sockets within moments. Blocks: for a start alone.
    """
    until = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return attempt()
        except (OSError, ConfigError) as problem:
            cause = problem if isinstance(problem, OSError) else problem.__cause__
            if getattr(cause, "errno", None) != errno.EADDRINUSE or time.monotonic() > until:
                raise
        time.sleep(0.02)


def import_everything() -> None:
    """Import now what is imported on first use: Python itself may lie where the later user cannot read."""
    for name in _IMPORTED_LATE:
        importlib.import_module(name)
    rehearse()


def _read_certificate(config: Config) -> CertificateStore | None:
    if not _has_tls(config):
        return None
    try:
        return CertificateStore(config.tls.certificate, config.tls.key)
    except ConfigError as problem:
        # What needs no certificate is served all the same (HOSTILE E11); the log says it once it is open.
        return CertificateStore.without(config.tls.certificate, config.tls.key, str(problem))


def _has_tls(config: Config) -> bool:
    return any(listener.tls != "none" for listener in config.listeners)


@frozen
class Place:
    """A worker's place: its number from 0, among how many, and the descriptors that it has inherited for it."""

    number: int
    workers: int
    supervisor: int  # its process id
    channel: int = 0
    shares: int = 1
    control: int = 2
    grants: Mapping[str, int] = field(factory=dict)


@frozen
class Inheritance:
    """All that a worker is given. `text` is the configuration as it was checked, `newer` what a reload has put in its place
    since; `sockets` are descriptors by listener; `pem` are certificate chain and key.

    As the supervisor sends it, descriptors are places in the list of those that the worker inherits; see `on`.
    """

    place: Place
    config_path: str
    text: str
    newer: str | None
    clock_offset_seconds: float
    uid: int | None
    gid: int | None
    sockets: Mapping[str, list[int]]
    pem: tuple[bytes, bytes] | None = field(repr=False)

    def render(self) -> bytes:
        """One line of JSON. It holds the private key: it goes to the worker and nowhere else."""
        table: dict[str, Any] = {
            "place": {name: getattr(self.place, name) for name in Place.__match_args__},
            "pem": None if self.pem is None else [octets.decode("ascii") for octets in self.pem],
        }
        for name in ("config_path", "text", "newer", "clock_offset_seconds", "uid", "gid", "sockets"):
            table[name] = getattr(self, name)
        return json.dumps(table).encode("ascii") + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> Inheritance:
        """What `render` wrote."""
        table = json.loads(line)
        place, pem = Place(**table.pop("place")), table.pop("pem")
        return cls(place=place, pem=None if pem is None else (pem[0].encode("ascii"), pem[1].encode("ascii")), **table)

    def on(self, descriptors: Sequence[int]) -> Inheritance:
        """The same, with the descriptors as they are numbered in this process."""
        place = self.place
        return evolve(
            self,
            place=evolve(
                place,
                channel=descriptors[place.channel],
                shares=descriptors[place.shares],
                control=descriptors[place.control],
            ),
            sockets={name: [descriptors[at] for at in places] for name, places in self.sockets.items()},
        )

    def config(self) -> Config:
        """The configuration that the listeners were bound by. Raises ConfigError."""
        return parse(self.config_path, self.text)

    def prepared(self, config: Config) -> Prepared:
        """The inherited sockets as sockets, the certificate as a store."""
        bound = {
            name: [socket.socket(fileno=descriptor) for descriptor in descriptors]
            for name, descriptors in self.sockets.items()
        }
        certificates = None
        if self.pem is not None:
            certificates = CertificateStore(config.tls.certificate, config.tls.key, pem=self.pem)
        elif _has_tls(config):
            certificates = CertificateStore.without(config.tls.certificate, config.tls.key, "nobody could read it")
        return Prepared(bound, certificates)
