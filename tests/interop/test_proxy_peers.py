# SPDX-License-Identifier: MIT
"""HAProxy in front: whatever version it speaks and whatever is behind the header, the server knows the real client."""

from __future__ import annotations

import smtplib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server import PASSWORD, Server, free_port, wait_until
from tests.interop.test_peers import needs

TEXT = b"Subject: haproxy\r\n\r\nHello.\r\n"
_WAYS = {
    # name: where HAProxy connects to, how it says who the client is
    "v1": ("proxied", "send-proxy"),
    "v2": ("proxied", "send-proxy-v2"),
    "v2-options": ("proxied", "send-proxy-v2 proxy-v2-options crc32c,unique-id"),
    "v2-tls": ("proxied-tls", "send-proxy-v2"),
    "unix": ("unix", "send-proxy-v2"),
}


class HAProxy:
    """One process with a front for each of the ways; `checks` asks for health checks, which are LOCAL."""

    def __init__(self, directory: Path, server: Server, ports: dict[str, int], path: Path) -> None:
        self.ports = {name: free_port() for name in _WAYS}
        text = "global\n  maxconn 100\ndefaults\n  mode tcp\n"
        text += "  timeout connect 10s\n  timeout client 30s\n  timeout server 30s\n"
        text += "  unique-id-format %{+X}o%ci_%cp\n"
        for name, (to, how) in _WAYS.items():
            where = f"unix@{path}" if to == "unix" else f"127.0.0.1:{ports[to]}"
            check = " check check-send-proxy inter 200" if name == "v2" else ""
            text += f"listen {name}\n  bind 127.0.0.1:{self.ports[name]}\n  server polarismail {where} {how}{check}\n"
        config = directory / "haproxy.cfg"
        config.write_text(text)
        self.log = open(directory / "haproxy.log", "wb")
        self.process = subprocess.Popen(["haproxy", "-db", "-f", config], stdout=self.log, stderr=self.log)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, HAProxy]]:
    """A server whose listeners serve HAProxy alone, and HAProxy."""
    directory = tmp_path_factory.mktemp("haproxy")
    ports = {name: free_port() for name in ("proxied", "proxied-tls")}
    path = directory / "mx.sock"
    extra = ""
    for name, role, tls, address in (
        (
            "proxied",
            "mx",
            "starttls",
            f'address = "127.0.0.1"\nport = {ports["proxied"]}\nproxy_networks = ["127.0.0.1/32"]',
        ),
        (
            "proxied-tls",
            "submission",
            "implicit",
            f'address = "127.0.0.1"\nport = {ports["proxied-tls"]}\nproxy_networks = ["127.0.0.1/32"]',
        ),
        ("unix", "mx", "none", f'address = "unix:{path}"\nproxy_networks = ["local"]'),
    ):
        extra += f'[[listeners]]\nname = "{name}"\nrole = "{role}"\ntls = "{tls}"\n{address}\n'
    server = Server(directory / "server", extra=extra)
    haproxy = None
    try:
        server.start()
        haproxy = HAProxy(directory, server, ports, path)
        wait_until(lambda: _accepts(haproxy.ports["unix"]), "HAProxy")
        yield server, haproxy
    finally:
        server.kill()
        if haproxy is not None:
            haproxy.stop()
            print((directory / "haproxy.log").read_text()[-3000:])
        print(server.twistd_log()[-3000:])


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except OSError:
        return False
    return True


@needs("haproxy")
@pytest.mark.parametrize("way", list(_WAYS))
def test_the_event_log_shows_the_real_client(proxied: tuple[Server, HAProxy], way: str) -> None:
    server, haproxy = proxied
    source = f"127.0.0.{10 + list(_WAYS).index(way)}"  # somebody whom HAProxy is not

    class Tls(smtplib.SMTP_SSL):
        def _get_socket(self, host: str, port: int, timeout: Any) -> socket.socket:
            opened = socket.create_connection(("127.0.0.1", port), timeout, (source, 0))
            return server.tls.wrap_socket(opened, server_hostname="localhost")

    listener = _WAYS[way][0]
    client: smtplib.SMTP
    if listener == "proxied-tls":
        client = Tls("localhost", haproxy.ports[way], "client.test", timeout=30)
        client.login("ann@here.test", PASSWORD)
    else:
        client = smtplib.SMTP("localhost", haproxy.ports[way], "client.test", timeout=30, source_address=(source, 0))
        if listener == "proxied":
            client.starttls(context=server.tls)
    with client:
        client.sendmail("ann@here.test", ["bob@here.test"], TEXT)
    wait_until(
        lambda: [row for row in server.events("received") if (row["client"], row["listener"]) == (source, listener)],
        f"a message from {source}; there are {server.events('received')}",
    )
    assert not server.events("proxy-refused")
