# SPDX-License-Identifier: MIT
"""The configuration file: every fault is named, nothing is half-read, and the shipped file tells the truth."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import attrs
import pytest

from polarismail.config import Config, load
from polarismail.config_reader import is_table, keys_of
from polarismail.relay.routing import Smarthost
from polarismail.values.errors import ConfigError

SHIPPED = Path(__file__).parent.parent / "etc" / "polarismail.toml"


def read(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "polarismail.toml"
    path.write_text(text)
    return load(str(path))


def faults(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    return [line.removeprefix(f"{tmp_path}/polarismail.toml: ") for line in str(caught.value).splitlines()]


def all_keys(hint: Any = Config, before: str = "") -> dict[str, Any]:
    """Every key of the file with its default, by path."""
    found: dict[str, Any] = {}
    for name, key in keys_of(hint).items():
        if is_table(key.hint):
            found |= all_keys(key.hint, f"{before}{name}.")
        else:
            found[before + name] = key.default
    return found


def test_shipped_file_has_each_key_with_its_default() -> None:
    text = SHIPPED.read_text()
    table = tomllib.loads(text)
    for path, default in all_keys().items():
        if path in ("listeners", "smarthost", "smarthosts"):
            continue  # tables of their own, below
        *tables, name = path.split(".")
        inside: Any = table
        for each in tables:
            inside = inside[each]
        if default is None:
            assert re.search(rf"(?m)^# {name} = ", text), f"{path} is not explained"
        else:
            assert inside.get(name) == (list(default) if isinstance(default, tuple) else default), path


def test_shipped_file_loads_as_the_defaults() -> None:
    assert attrs.evolve(load(str(SHIPPED)), hostname="") == Config()


def test_shipped_file_explains_listeners_and_smarthosts() -> None:
    text = SHIPPED.read_text()
    for name in keys_of(Smarthost):
        assert re.search(rf"(?m)^# {name} = ", text), name
    for name in keys_of(type(Config().listeners[0])):
        assert re.search(rf"(?m)^#   {name}\b", text), name
    for name in keys_of(type(Config().listeners[0].limits)):
        assert re.search(rf"(?m)^#     .*\b{name}\b", text), name
    ports = {(each.port, each.role, each.tls) for each in Config().listeners}
    assert ports == {
        (25, "mx", "starttls"),
        (26, "mx", "starttls"),
        (587, "submission", "starttls"),
        (465, "submission", "implicit"),
        (110, "pop3", "starttls"),
        (995, "pop3", "implicit"),
    }
    assert all(each.plaintext_auth == "never" for each in Config().listeners)


def test_every_key_has_a_comment_or_a_neighbour_with_one() -> None:
    blocks = re.split(r"(?m)^\[", SHIPPED.read_text())
    for block in blocks[1:]:
        if "=" in block:
            assert "#" in block or block.startswith(("[listeners", "relay.client")), block.splitlines()[0]


def test_empty_file_is_the_defaults_with_a_hostname(tmp_path: Path) -> None:
    config = read(tmp_path, "")
    assert config.hostname
    assert attrs.evolve(config, hostname="") == Config()


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    config = read(tmp_path, '[paths]\nstate = "state"\nmail = "/srv/mail"\n[log]\nfile = "-"\n')
    assert config.paths.state == f"{tmp_path}/state"
    assert config.paths.mail == "/srv/mail"
    assert config.log.file == "-"
    assert config.database_url == f"sqlite:///{tmp_path}/state/polarismail.db"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("hostname = 3", "hostname: expected a string, found 3"),
        ('hostname = "a..b"', 'hostname: expected a domain name, found "a..b": '),
        ("hostnam = 'x'", 'hostnam: unknown key; did you mean "hostname"?'),
        ("[logs]", 'logs: unknown key; did you mean "log"?'),
        ("[log]\nzzzzz = 1", "log.zzzzz: unknown key; expected one of: file, format"),
        ("log = 3", "log: expected a table, found 3"),
        ('[log]\nformat = "xml"', 'log.format: expected one of "json", "text", found "xml"'),
        ("[log]\nfile = 7", "log.file: expected a path (a string), found 7"),
        ('[log]\nfile = "a\\u0000b"', 'log.file: expected a path (a string), found "a\\u0000b"'),
        ("[dns]\ntimeout_seconds = '5'", 'dns.timeout_seconds: expected a number, 0 or more, found "5"'),
        ("[dns]\ntimeout_seconds = -1", "dns.timeout_seconds: expected a number, 0 or more, found -1"),
        ("[dns]\ntimeout_seconds = nan", "dns.timeout_seconds: expected a number, 0 or more, found nan"),
        ("[dns]\ntries = true", "dns.tries: expected a whole number, 0 or more, found true"),
        ("[dns]\ntries = 2.0", "dns.tries: expected a whole number, 0 or more, found 2.0"),
        ("[dns]\nipv6 = 1", "dns.ipv6: expected true or false, found 1"),
        ("[dns]\nservers = '1.2.3.4:53'", "dns.servers: expected a list, each a string as "),
        ("[dns]\nservers = ['1.2.3.4']", 'dns.servers[0]: expected a string as "192.0.2.1:53" or '),
        ("[dns]\nservers = ['1.2.3.4:99999']", "dns.servers[0]: expected a string as "),
        ("[[listeners]]\nname = 'a'\nport = 1", 'listeners[0].role: missing: expected one of "mx", "submission", '),
        ("[[listeners]]\nname = 'a'\nport = 70000\nrole = 'mx'", "listeners[0].port: expected 0 to 65535, found 70000"),
        ("[[listeners]]\nname = 'a'\nport = 1\nrole = 'mx'\naddress = 'x'", "listeners[0].address: expected an IP "),
        ("[[listeners]]\nname = 'a'\nport = 25\nrole = 'lmtp'", "listeners[0].port: expected another one than 25, "),
        (
            "[[listeners]]\nname = 'a'\nport = 1\nrole = 'mx'\nxclient_networks = ['x']",
            'listeners[0].xclient_networks: expected networks as "192.0.2.0/24"',
        ),
        (
            "[[listeners]]\nname = 'a'\nport = 1\nrole = 'pop3'\nxclient_networks = ['10.0.0.0/8']",
            "listeners[0].xclient_networks: XCLIENT and XFORWARD are SMTP's",
        ),
        (
            "[[listeners]]\nname = 'a'\nport = 1\nrole = 'mx'\noffers = ['DSN', 'REQUIRETLS']",
            "listeners[0].offers: expected some of PIPELINING, CHUNKING, DSN, SMTPUTF8, ",
        ),
        ("[reception]\nmax_priority = 10", "reception.max_priority: expected -9 to 9, found 10"),
        (
            "[[listeners]]\nname = 'a'\nrole = 'mx'",
            "listeners[0].port: missing: expected a whole number, 0 or more",
        ),
        *(
            (f"[[listeners]]\nname = 'a'\nrole = 'mx'\n{keys}", f"listeners[0].{fault}")
            for keys, fault in (
                ("address = 'unix:run/x'", "address: expected unix: and the absolute path of a socket, found "),
                ("address = 'systemd:'", "address: expected systemd: and a FileDescriptorName, found "),
                ("address = 'systemd:a b'", "address: expected systemd: and a FileDescriptorName, found "),
                ("address = 'fd:2'", "address: expected fd: and a descriptor's number, 3 or more, found 'fd:2'"),
                ("address = 'fd:-3'", "address: expected fd: and a descriptor's number, 3 or more, found 'fd:-3'"),
                ("address = 'tcp:1'", 'address: expected an IP address, "unix:/path", "systemd:NAME", "fd:N" or ""'),
                ("address = 'unix:/run/x'\nport = 25", 'port: expected none with address = "unix:/run/x", found 25'),
                ("port = 1\nsocket_mode = 0o1777", "socket_mode: expected a file's mode as 0o660, found 0o1777"),
                ("port = 1\nproxy_networks = ['here']", "proxy_networks: expected networks as "),
                ("port = 1\nproxy_networks = ['10.0.0.1/8']", "proxy_networks: expected networks as "),
                ("port = 1\nrelay_networks = ['0.0.0.0/0']", 'relay_networks: "0.0.0.0/0" would let strangers send '),
                ("port = 1\nrelay_networks = ['::/0']", 'relay_networks: "::/0" would let strangers send through '),
                ("port = 1\nrelay_networks = ['128.0.0.0/1']", 'relay_networks: "128.0.0.0/1" would let strangers '),
                ("port = 1\nlimits = 3", "limits: expected a table, found 3"),
                ("port = 1\n[listeners.limits]\nconnections = 0", "limits.connections: expected more than 0, found 0"),
                ("port = 1\n[listeners.limits]\ntotal = 3", "limits.total: unknown key; expected one of: "),
            )
        ),
        (
            "[[listeners]]\nname = 'a'\nrole = 'submission'\nport = 1\nrelay_networks = ['10.0.0.0/8']",
            'listeners[0].relay_networks: expected none where the role is "submission", which is for who logs in; ',
        ),
        (
            "[[listeners]]\nname = 'a'\nrole = 'pop3'\nport = 1\nlimits = { max_recipients = 3 }",
            'listeners[0].limits: expected no max_recipients where the role is "pop3"',
        ),
        (
            "".join(f"[[listeners]]\nname = '{name}'\nrole = 'mx'\naddress = 'fd:3'\n" for name in "ab"),
            'listeners: expected different addresses, found "fd:3" twice',
        ),
        ("[listeners]\nname = 'a'", "listeners: expected a list, each a table, found a table"),
        ("[greylisting]\nallow_networks = ['x']", "greylisting"),
        ("[tls]\nkey = ''", 'tls: expected "certificate" and "key", because a listener has tls'),
        ("[smarthost]\nport = 25", "smarthost.host: missing: expected a string"),
        ("[smarthost]\nhost = 'a'\ntls = 'maybe'", 'smarthost.tls: expected one of "none", "opportunistic", '),
        ("[smarthosts]\n'X.example' = false", 'smarthosts: expected "x.example", found "X.example"'),
        ("[smarthosts]\n'x.example' = true", "smarthosts.x.example: expected a table, found true"),
        ("[relay]\nprot = 26", 'relay.prot: unknown key; did you mean "port"?'),
        ("[relay.client]\nhostname = 'x'", "relay.client.hostname: unknown key; "),
        ("[smtp]\nrequire_auth = true", "smtp.require_auth: unknown key; "),
        ("hostname = ", "expected TOML: "),
    ],
)
def test_a_fault_names_the_key_and_what_was_expected(tmp_path: Path, text: str, fault: str) -> None:
    (found,) = faults(tmp_path, text)
    assert found.startswith(fault), found


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    assert len(faults(tmp_path, "hostnam = 'x'\n[log]\nformat = 1\n[dns]\ntries = 'x'\n")) == 3


def test_two_listeners_may_not_share_a_name_or_a_place(tmp_path: Path) -> None:
    one = "[[listeners]]\nname = 'a'\nport = 2525\nrole = 'mx'\n"
    assert faults(tmp_path, one + one) == ['listeners: expected different names, found "a" twice']
    other = one.replace("'a'", "'b'")
    assert faults(tmp_path, one + other) == ["listeners: expected different ports, found 2525 twice"]


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml: cannot be read: No such file"):
        load(str(tmp_path / "nothing.toml"))


def test_flat_tables_fill_the_settings_of_several_rooms(tmp_path: Path) -> None:
    config = read(tmp_path, "[relay]\nport = 2525\nconnections = 3\n[pop3]\nthreads = 2\nlogin_seconds = 5\n")
    assert config.relay.routing.port == 2525 and config.relay.connections == 3
    assert config.pop3.door.threads == 2 and config.pop3.session.login_seconds == 5.0


def test_smarthosts_reach_the_routing(tmp_path: Path) -> None:
    text = "[smarthost]\nhost = 'a.example'\npassword = 'hunter2'\n[smarthosts]\n'b.example' = false\n"
    routing = read(tmp_path, text).relay.routing
    assert routing.smarthost is not None and routing.smarthost.host == "a.example"
    assert routing.domains == {"b.example": None}
    assert "hunter2" not in repr(routing)


def test_config_cannot_be_changed() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Config().hostname = "x"  # type: ignore[misc]


def test_workers_are_a_number_or_one_for_each_core(tmp_path: Path) -> None:
    assert read(tmp_path, "").worker_count == 1
    assert read(tmp_path, "workers = 3").worker_count == 3
    assert read(tmp_path, 'workers = "auto"').worker_count == len(os.sched_getaffinity(0))
    for wrong in ("0", "65", '"many"', "2.5"):
        with pytest.raises(ConfigError, match="workers: expected "):
            read(tmp_path, f"workers = {wrong}")
