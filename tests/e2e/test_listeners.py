# SPDX-License-Identifier: MIT
"""Listeners of every kind, live: behind proxies, at UNIX sockets, handed over, with relay networks and limits of their own."""

from __future__ import annotations

import contextlib
import os
import poplib
import pwd
import shutil
import smtplib
import socket
import ssl
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server import PASSWORD, Helper, Server, free_port, wait_until
from tests.proxies import block, render_block, render_line

TEXT = b"Subject: listeners\r\n\r\nHello.\r\n"
_TCP = {
    # name: role, tls, more
    "proxied": ("mx", "starttls", 'proxy_networks = ["127.0.0.1/32"]'),
    "proxied-tls": ("submission", "implicit", 'proxy_networks = ["127.0.0.1/32"]'),
    "proxied-pop3": ("pop3", "none", 'proxy_networks = ["127.0.0.1/32"]\nplaintext_auth = "always"'),
    "proxied-one": (
        "mx",
        "none",
        'proxy_networks = ["127.0.0.0/8"]\nrelay_networks = ["192.0.2.0/24"]\nlimits = { connections_per_address = 1 }',
    ),
    "relaying": ("mx", "none", 'relay_networks = ["127.0.0.64/26"]'),
    "small": (
        "mx",
        "none",
        'relay_networks = ["127.0.0.1/32"]\n'
        "[listeners.limits]\nmax_message_octets = 2000\nmax_recipients = 2\ncommand_seconds = 1.0\ncontent_seconds = 1.0",
    ),
    "two": ("mx", "none", "[listeners.limits]\nconnections = 2"),
    "one-pop3": ("pop3", "none", "[listeners.limits]\nconnections_per_address = 1"),
}


def listener(name: str, role: str, tls: str, more: str) -> str:
    return f'[[listeners]]\nname = "{name}"\nrole = "{role}"\ntls = "{tls}"\n{more}\n'


class World:
    """A server with all of them, strangers greylisted, and a next hop for what is foreign."""

    def __init__(self, directory: Path) -> None:
        self.sink = Helper(directory, "sink")
        zone = {"there.test": {"MX": [[10, "mx.there.test"]]}, "mx.there.test": {"A": ["127.0.0.1"]}}
        self.dns = Helper(directory, "dns", zone)
        self.ports = {name: free_port() for name in _TCP}
        self.socket, self.proxied_socket = directory / "server" / "run" / "mx.sock", directory / "server" / "run" / "p"
        extra = "[proxy]\nheader_seconds = 1.0\nwaiting = 3\n[gate]\nwait_seconds = 1.0\nallow_networks = "
        extra += '["127.0.0.0/26", "192.0.2.0/24", "203.0.113.0/24", "2001:db8::/32"]\n'
        for name, (role, tls, more) in _TCP.items():
            extra += listener(name, role, tls, f'address = "127.0.0.1"\nport = {self.ports[name]}\n{more}')
        unix = 'plaintext_auth = "networks"\nrelay_networks = ["local"]\n'
        extra += listener("unix", "mx", "none", f'address = "unix:{self.socket}"\n{unix}')
        extra += listener(
            "unix-proxied",
            "mx",
            "none",
            f'address = "unix:{self.proxied_socket}"\nproxy_networks = ["local"]\nsocket_mode = 0o600',
        )
        self.server = Server(
            directory / "server", dns_port=self.dns.port, remote_port=self.sink.port, greylisting=True, extra=extra
        )

    def close(self) -> None:
        self.server.kill()
        self.dns.stop()
        self.sink.stop()
        print(self.server.twistd_log()[-3000:])

    def connect(self, name: str, first: bytes = b"", source: str = "127.0.0.1") -> socket.socket:
        """A connection from this address, with its first octets sent."""
        made = socket.create_connection(("127.0.0.1", self.ports[name]), 20, (source, 0))
        made.sendall(first)
        return made

    def smtp(self, name: str, first: bytes = b"", source: str = "127.0.0.1") -> smtplib.SMTP:
        return Client(lambda: self.connect(name, first, source))

    def wait_for_event(self, event: str, **fields: str) -> dict[str, Any]:
        def found() -> list[dict[str, Any]]:
            return [row for row in self.server.events(event) if fields.items() <= row.items()]

        return wait_until(found, f"{event} with {fields}; there are {self.server.events(event)}")[-1]  # type: ignore[no-any-return]


class Client(smtplib.SMTP):
    """smtplib over a socket that somebody else opens."""

    def __init__(self, opens: Callable[[], socket.socket]) -> None:
        self._opens = opens
        super().__init__("localhost", 25, "client.test", timeout=20)

    def _get_socket(self, host: str, port: int, timeout: Any) -> socket.socket:
        return self._opens()


def unix_connection(path: Path, first: bytes = b"") -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.settimeout(20)
    made.connect(str(path))
    made.sendall(first)
    return made


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("listeners"))
    try:
        made.server.start()
        yield made
    finally:
        made.close()


# -- PROXY protocol ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "client"),
    [
        (render_line("192.0.2.7", 5000), "192.0.2.7"),
        (render_line("2001:db8::7", 5000), "2001:db8::7"),
        (render_block("192.0.2.8", 5000, [(0x20, b"\x01\0\0\0\0"), (5, b"id")], checksum=True), "192.0.2.8"),
        (render_block("2001:db8::8", 5000), "2001:db8::8"),
        (render_block("::ffff:192.0.2.9", 5000), "192.0.2.9"),
        (b"PROXY UNKNOWN\r\n", "127.0.0.1"),
        (block(0, b"", command=0x20), "127.0.0.1"),
    ],
)
def test_the_client_is_who_the_proxy_says(world: World, header: bytes, client: str) -> None:
    with world.smtp("proxied", header) as smtp:
        assert smtp.ehlo()[1].decode().startswith(f"mail.here.test greets {client}\n")
        smtp.starttls(context=world.server.tls)  # TLS behind the header, and the client is still who he was
        assert smtp.ehlo()[1].decode().startswith(f"mail.here.test greets {client}\n")
        smtp.mail(f"who@{len(header)}.test")
        assert smtp.rcpt("bob@here.test")[0] == 451  # greylisted as that client
    world.wait_for_event("tempfailed", listener="proxied", client=client, stage="greylist")


def test_a_header_may_dribble_in_and_the_greeting_waits_for_it(world: World) -> None:
    with world.connect("proxied") as client:
        for octet in render_block("192.0.2.10", 5000):
            client.sendall(bytes([octet]))
        client.sendall(b"EHLO client.test\r\n")
        lines = client.makefile("rb")
        assert lines.readline().startswith(b"220 ")
        assert b"greets 192.0.2.10" in lines.readline()


@pytest.mark.parametrize("header", [render_line("192.0.2.11", 5000), render_block("192.0.2.11", 5000)])
def test_tls_may_come_in_the_same_segment(world: World, header: bytes) -> None:
    """Not an octet behind the header is touched."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = world.server.tls.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    with world.connect("proxied-tls", header + outgoing.read()) as client:
        while True:
            incoming.write(client.recv(65536))
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                pass
        client.sendall(outgoing.read())
        greeting = b""
        while not greeting.endswith(b"\n"):
            try:
                greeting += tls.read()
            except ssl.SSLWantReadError:
                incoming.write(client.recv(65536))
        assert greeting.startswith(b"220 ")


def test_the_gate_judges_the_client_and_not_the_proxy(world: World) -> None:
    with world.connect("proxied", render_line("198.51.100.66", 5000) + b"EHLO client.test\r\n") as client:
        assert client.recv(3) == b"554"
    world.wait_for_event("gate-refused", client="198.51.100.66")


def test_mail_over_implicit_tls_behind_a_proxy_knows_its_client(world: World) -> None:
    class Tls(smtplib.SMTP_SSL):
        def _get_socket(self, host: str, port: int, timeout: Any) -> socket.socket:
            opened = world.connect("proxied-tls", render_block("2001:db8::12", 4711))
            return world.server.tls.wrap_socket(opened, server_hostname="localhost")

    with Tls("localhost", 465, "client.test", timeout=20) as smtp:
        smtp.login("ann@here.test", PASSWORD)
        smtp.sendmail("ann@here.test", ["bob@here.test"], TEXT)
    world.wait_for_event("received", listener="proxied-tls", client="2001:db8::12", account="ann@here.test")
    assert any(b"(unknown [IPv6:2001:db8::12])" in each for each in world.server.wait_for_messages("bob@here.test", 1))


def test_pop3_behind_a_proxy_knows_its_client(world: World) -> None:
    class Pop3(poplib.POP3):
        def _create_socket(self, timeout: Any) -> socket.socket:
            return world.connect("proxied-pop3", render_line("192.0.2.13", 5000))

    client = Pop3("here", 110)
    client.user("ann@here.test")
    client.pass_(PASSWORD)
    client.quit()
    world.wait_for_event("login", listener="proxied-pop3", client="192.0.2.13")


@pytest.mark.parametrize(
    ("first", "source", "problem"),
    [
        (render_line("192.0.2.7", 5000), "127.0.0.2", "not in proxy_networks"),
        (b"EHLO client.test\r\n", "127.0.0.3", "not in proxy_networks"),
        (b"EHLO client.test\r\n", "127.0.0.1", "expected a PROXY header, found something else"),
        (b"PROXY TCP4 192.0.2.7\r\n", "127.0.0.1", "version 1: expected two addresses and two ports"),
        (b"PROXY UNKNOWN " + b"x" * 100, "127.0.0.1", "version 1: more than 107 octets"),
        (block(0x11, b"", command=0x22), "127.0.0.1", "version 2: a version or command that does not exist"),
        (block(0x12, bytes(12)), "127.0.0.1", "version 2: an address family or transport that carries no mail"),
        (b"PROXY TCP4 192", "127.0.0.1", "no complete PROXY header in time"),
        (b"", "127.0.0.1", "no complete PROXY header in time"),
    ],
)
def test_who_says_no_good_header_is_closed_without_a_word(
    world: World, first: bytes, source: str, problem: str
) -> None:
    def told() -> bool:  # of several refusals in a second, the log tells of the first
        with contextlib.suppress(ConnectionError), world.connect("proxied", first, source) as client:
            assert client.recv(100) == b""
        rows = world.server.events("proxy-refused")
        return any((row["listener"], row["proxy"], row["problem"]) == ("proxied", source, problem) for row in rows)

    wait_until(told, f"{problem}: {world.server.events('proxy-refused')}")


def test_an_octet_now_and_then_does_not_move_the_deadline(world: World) -> None:
    with world.connect("proxied") as client, contextlib.suppress(ConnectionError):
        for octet in b"PROXY UNKNOWN " + b"x" * 80:
            client.sendall(bytes([octet]))
            client.settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                assert client.recv(1) == b""
                return
        pytest.fail("it was waited for, for 94 octets in 9 seconds, with one second to say it in")


def test_of_too_many_that_wait_the_oldest_makes_room(world: World) -> None:
    if world.server.workers > 1:
        pytest.skip("each worker has its own")
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(world.connect("proxied")) for _ in range(4)]
        with contextlib.suppress(ConnectionError):
            assert silent[0].recv(1) == b""
        silent[3].sendall(render_line("192.0.2.14", 5000))
        assert silent[3].recv(3) == b"220"


def test_clients_are_counted_by_their_own_address_and_the_proxy_by_none(world: World) -> None:
    with contextlib.ExitStack() as stack:

        def greeting(header: bytes) -> bytes:
            client = stack.enter_context(world.connect("proxied-one", header))
            return client.recv(3)

        assert greeting(render_line("203.0.113.1", 1)) == b"220"
        assert greeting(render_block("203.0.113.1", 2)) == b"421"
        assert greeting(render_line("203.0.113.2", 1)) == b"220"
        assert greeting(render_line("2001:db8:1::1", 1)) == b"220"
        assert greeting(render_line("2001:db8:1::2", 1)) == b"421"  # the same /64
        for _ in range(3):
            assert greeting(b"PROXY UNKNOWN\r\n") == b"220"

    def gone() -> bool:
        with world.connect("proxied-one", render_line("203.0.113.1", 3)) as client:
            return client.recv(3) == b"220"

    wait_until(gone, "room for the client again")


def test_whether_a_client_may_relay_is_about_its_own_address(world: World) -> None:
    for header, code in ((render_line("192.0.2.1", 1), 250), (b"PROXY UNKNOWN\r\n", 550)):
        with world.smtp("proxied-one", header) as smtp:
            smtp.ehlo()
            smtp.mail("who@else.test")
            assert smtp.rcpt("far@there.test")[0] == code


# -- relay networks ---------------------------------------------------------------------------------------------------------


def test_a_relay_network_sends_anywhere_and_is_not_greylisted_and_others_are(world: World) -> None:
    with world.smtp("relaying", source="127.0.0.65") as smtp:
        smtp.sendmail("app@else.test", ["far@there.test", "bob@here.test"], TEXT)
    wait_until(
        lambda: any("far@there.test" in str(each) for each in world.sink.received()), "the message at the next hop"
    )
    with world.smtp("relaying", source="127.0.0.63") as smtp:
        smtp.ehlo()
        smtp.mail("app@else.test")
        assert smtp.rcpt("far@there.test")[0] == 550
        assert smtp.rcpt("bob@here.test")[0] == 451
    with world.smtp("relaying", source="127.0.0.65") as smtp:
        smtp.ehlo()
        smtp.mail("app@else.test")
        assert smtp.rcpt("nobody@here.test")[0] == 550  # an address of ours that does not exist is for nobody


# -- limits -----------------------------------------------------------------------------------------------------------------


def test_two_listeners_with_different_limits(world: World) -> None:
    with world.smtp("small") as small, world.smtp("relaying", source="127.0.0.65") as usual:
        for client, size, third in ((small, "2000", 452), (usual, "52428800", 250)):
            client.ehlo()
            assert client.esmtp_features["size"] == size
            assert client.docmd("MAIL FROM:<who@else.test> SIZE=2001")[0] == (552 if client is small else 250)
            client.rset()
            client.mail("who@else.test")
            codes = [client.rcpt(f"{name}@here.test")[0] for name in ("ann", "bob", "postmaster")]
            assert codes == [250, 250, third]


def test_a_limit_of_time(world: World) -> None:
    with world.connect("small") as small, world.connect("two") as other:
        assert small.recv(100).startswith(b"220 ")
        assert other.recv(100).startswith(b"220 ")
        assert small.recv(100).startswith(b"421 ")  # nothing was said for a second
        other.settimeout(0.2)
        with pytest.raises(TimeoutError):
            other.recv(100)


def test_a_limit_of_connections_on_one_listener_alone(world: World) -> None:
    def third() -> bytes:
        with world.connect("two") as first, world.connect("two") as second, world.connect("two") as client:
            greetings = [each.recv(3) for each in (first, second, client)]
            with world.connect("relaying") as elsewhere:
                assert elsewhere.recv(3) == b"220"
            return b" ".join(greetings)

    # What the test before had open may still be counted for a moment.
    wait_until(lambda: third() == b"220 220 421", "two greetings and a refusal")


def test_a_limit_of_connections_from_one_client_of_pop3(world: World) -> None:
    with world.connect("one-pop3") as first, world.connect("one-pop3", source="127.0.0.2") as other:
        assert first.recv(3) == b"+OK"
        assert other.recv(3) == b"+OK"
        with world.connect("one-pop3") as second:
            assert second.recv(4) == b"-ERR"


# -- UNIX sockets -----------------------------------------------------------------------------------------------------------


def test_a_client_of_a_unix_socket_is_local(world: World) -> None:
    assert stat.S_IMODE(world.socket.stat().st_mode) == 0o660
    assert stat.S_IMODE(world.proxied_socket.stat().st_mode) == 0o600
    before = len(world.server.messages("ann@here.test"))
    with Client(lambda: unix_connection(world.socket)) as smtp:
        assert b"greets local" in smtp.ehlo()[1]
        assert "auth" in smtp.esmtp_features  # there is no wire that a password could be read on
        smtp.sendmail("who@else.test", ["ann@here.test", "far@there.test"], TEXT)  # not greylisted; "local" may relay
    world.wait_for_event("received", listener="unix", client="local")
    found = world.server.wait_for_messages("ann@here.test", before + 1)[-1]
    assert b"Received: from client.test (local)\r\n\tby mail.here.test with ESMTP\r\n\tid " in found


def test_many_clients_of_a_unix_socket_are_not_one_client(world: World) -> None:
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(unix_connection(world.socket)) for _ in range(60)
        ]  # connections.per_address is 50
        assert [each.recv(3) for each in clients] == [b"220"] * 60


def test_a_proxy_may_come_over_a_unix_socket(world: World) -> None:
    with Client(lambda: unix_connection(world.proxied_socket, render_block("192.0.2.15", 5000))) as smtp:
        assert b"greets 192.0.2.15" in smtp.ehlo()[1]


def test_a_unix_socket_goes_at_the_end_and_a_killed_servers_is_replaced(
    make_server: Callable[..., Server], tmp_path: Path
) -> None:
    path = tmp_path / ("long" * 30) / "mx.sock"  # a directory that is made, with a name beyond a socket address
    server = make_server(extra=listener("unix", "mx", "none", f'address = "unix:{path}"')).start()
    server.kill()
    assert path.is_socket()
    server.start()
    server.write_config(extra=listener("unix", "mx", "none", f'address = "unix:{path}2"'))
    server.signal(1)  # SIGHUP
    (event,) = wait_until(lambda: server.events("reloaded"), "the reload")
    assert event["needs_restart"] == "listeners"
    server.stop()
    assert not path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts as root and drops to nobody")
def test_a_unix_socket_is_the_later_users_and_of_the_group_that_was_asked_for() -> None:
    nobody = pwd.getpwnam("nobody")
    directory = Path(tempfile.mkdtemp(prefix="polarismail-drop-"))
    os.chmod(directory, 0o755)
    path = directory / "run" / "mx.sock"
    more = f'address = "unix:{path}"\nsocket_group = "mail"'
    server = Server(directory / "server", extra=listener("unix", "mx", "none", more))
    try:
        server.make_accounts()
        for each in (directory / "server", *(directory / "server").rglob("*")):
            shutil.chown(each, nobody.pw_uid, nobody.pw_gid)
        server.start(twistd=("--uid", str(nobody.pw_uid), "--gid", str(nobody.pw_gid)))
        assert (path.owner(), path.group(), stat.S_IMODE(path.stat().st_mode)) == ("nobody", "mail", 0o660)
        with unix_connection(path) as client:
            assert client.recv(3) == b"220"
        server.stop()
        assert not path.exists()
    finally:
        server.kill()
        print(server.twistd_log()[-3000:])
        shutil.rmtree(directory)


# -- handed over ------------------------------------------------------------------------------------------------------------

# What systemd does: descriptors from 3 on, and the process's own number in the environment.
_ACTIVATE = """
import fcntl, os, sys
names, numbers = sys.argv[1], [int(each) for each in sys.argv[2].split(",")]
for at, number in enumerate([fcntl.fcntl(each, fcntl.F_DUPFD, 100) for each in numbers]):
    os.dup2(number, 3 + at)
    os.close(number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(numbers)), LISTEN_FDNAMES=names)
os.execv(sys.argv[3], sys.argv[3:])
"""


def activated(names: str, sockets: list[socket.socket]) -> dict[str, Any]:
    """Arguments for Server.start."""
    numbers = tuple(each.fileno() for each in sockets)
    return {
        "before": (sys.executable, "-c", _ACTIVATE, names, ",".join(map(str, numbers))),
        "descriptors": numbers,
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_sockets_of_systemd_are_found_by_name(make_server: Callable[..., Server], tmp_path: Path, workers: int) -> None:
    # A dual one, as systemd makes them, a second of the same name, and a UNIX socket.
    dual = socket.create_server(("::", free_port()), family=socket.AF_INET6, dualstack_ipv6=True)
    second = socket.create_server(("127.0.0.1", free_port()))
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "s"))
    unix.listen()
    extra = listener("handed", "mx", "none", 'address = "systemd:smtp"')
    extra += listener("handed-unix", "mx", "none", 'address = "systemd:local-mail"')
    server = make_server(workers=workers, extra=extra)
    with dual, second, unix:
        server.start(**activated("smtp:local-mail:smtp", [dual, unix, second]))
        for address, greeted in (
            (("127.0.0.1", dual.getsockname()[1]), b"127.0.0.1"),  # not ::ffff:127.0.0.1
            (("::1", dual.getsockname()[1]), b"::1"),
            (("127.0.0.1", second.getsockname()[1]), b"127.0.0.1"),
        ):
            with Client(lambda address=address: socket.create_connection(address, 20)) as smtp:  # type: ignore[misc]
                assert smtp.ehlo()[1].split()[:3] == [b"mail.here.test", b"greets", greeted]
        with Client(lambda: unix_connection(tmp_path / "s")) as smtp:
            smtp.sendmail("who@else.test", ["bob@here.test"], TEXT)
        server.wait_for_messages("bob@here.test", 1)
        server.stop()
    assert (tmp_path / "s").is_socket()  # systemd's, not ours


def test_a_socket_of_systemd_that_nobody_serves_is_said_at_the_start(
    make_server: Callable[..., Server], tmp_path: Path
) -> None:
    server = make_server(extra=listener("unix", "mx", "none", f'address = "unix:{tmp_path}/mx.sock"'))
    server.make_accounts()
    with socket.create_server(("127.0.0.1", 0)) as given:
        server.spawn(**activated("other", [given]))
        assert server.process is not None
        assert server.process.wait(30) == 1
    assert 'systemd hands over a socket named "other"' in server.twistd_log()
    assert not (tmp_path / "mx.sock").exists()  # nothing stays bound


def test_a_descriptor_is_served_and_known_as_ours(
    make_server: Callable[..., Server], make_helper: Callable[..., Helper]
) -> None:
    zone = {"loop.test": {"MX": [[10, "mx.loop.test"]]}, "mx.loop.test": {"A": ["127.0.0.1"]}}
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as given:
        extra = listener("handed", "mx", "none", f'address = "fd:{given.fileno()}"')
        server = make_server(extra=extra, dns_port=make_helper("dns", zone).port, remote_port=port)
        server.start(descriptors=(given.fileno(),))
        with Client(lambda: socket.create_connection(("127.0.0.1", port), 20)) as smtp:
            smtp.sendmail("who@else.test", ["bob@here.test"], TEXT)
        server.wait_for_messages("bob@here.test", 1)
        assert server.events("received")[0]["listener"] == "handed"
        with server.smtp("submission", "ann@here.test") as smtp:
            smtp.sendmail("ann@here.test", ["far@loop.test"], TEXT)
        (event,) = wait_until(lambda: server.events("failed"), "the loop is seen before we connect to ourselves")
        assert "loop" in event["reply"]
