# SPDX-License-Identifier: MIT
"""What an operator may do, directly and over the socket, and what the socket does not let anybody do."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polarismail.control import OPERATIONS, Control, do_operation
from polarismail.control_socket import (
    MAX_CONNECTIONS,
    MAX_REQUEST_OCTETS,
    ControlClient,
    ControlServer,
    NoServer,
)
from polarismail.values.errors import ControlError, Unavailable
from tests.controls import open_control, put_in_queue, serve
from tests.reactor import run


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    with open_control(tmp_path) as made:
        yield made


@pytest.fixture
def server(control: Control, tmp_path: Path) -> Iterator[ControlServer]:
    with serve(control, tmp_path / "socket") as made:
        yield made


@pytest.fixture
def client(server: ControlServer) -> Iterator[ControlClient]:
    made = ControlClient(server.path, timeout_seconds=20)
    yield made
    made.close()


def ask(control: Control, operation: str, **arguments: Any) -> Any:
    """One operation; its result must survive JSON, as it does over the socket."""
    result = run(do_operation, control, operation, arguments)
    assert json.loads(json.dumps(result)) == result
    return result


def test_domains_accounts_and_aliases(control: Control) -> None:
    assert ask(control, "domain_add", name="Here.Test") == {"domain": "here.test"}
    with pytest.raises(ControlError, match="exists already"):
        ask(control, "domain_add", name="here.test")
    added = ask(control, "account_add", address="Ann@here.test", password="secret")
    assert added["address"] == "ann@here.test" and added["active"] and not os.path.isabs(added["maildir"])
    assert "secret" not in json.dumps(added) and "argon2" not in json.dumps(added)
    imported = ask(control, "account_add", address="bob@here.test", password="x", maildir="/srv/bob", uid=1000, gid=100)
    assert (imported["maildir"], imported["uid"], imported["gid"]) == ("/srv/bob", 1000, 100)
    assert ask(control, "alias_add", address="@here.test", targets=["ann@here.test", "zoe@there.test"])
    assert [row["address"] for row in ask(control, "account_list")] == ["ann@here.test", "bob@here.test"]
    assert ask(control, "alias_list", domain="here.test")[0]["targets"] == ["ann@here.test", "zoe@there.test"]
    assert ask(control, "domain_list") == [{"domain": "here.test", "active": True, "accounts": 2, "aliases": 1}]
    with pytest.raises(ControlError, match="still has"):
        ask(control, "domain_remove", name="here.test")
    ask(control, "account_remove", address="bob@here.test")
    ask(control, "alias_remove", address="@here.test")
    ask(control, "domain_remove", name="here.test", everything=True)
    assert ask(control, "account_list") == [] and ask(control, "domain_list") == []


def test_a_new_password_is_worth_something_and_the_old_one_nothing(control: Control) -> None:
    ask(control, "domain_add", name="here.test")
    ask(control, "account_add", address="ann@here.test", password="old")
    ask(control, "account_passwd", address="ann@here.test", password="new")
    account = run(control.directory.find_account, "ann@here.test")
    assert run(control.passwords.verify, account.password_hash, b"new")
    assert not run(control.passwords.verify, account.password_hash, b"old")
    with pytest.raises(ControlError, match="may not be empty"):
        ask(control, "account_passwd", address="ann@here.test", password="")
    with pytest.raises(ControlError, match="there is no account"):
        ask(control, "account_passwd", address="zoe@here.test", password="x")


def test_queue_is_listed_by_page_and_filtered(control: Control) -> None:
    ids = [put_in_queue(control, f"a{n}@there.test", f"b{n}@else.test") for n in range(5)]
    page = ask(control, "queue_list", limit=2)
    assert [row["queue_id"] for row in page["rows"]] == [ids[0], ids[0], ids[1], ids[1]]
    assert page["after"] == ids[1]
    rest = ask(control, "queue_list", limit=100, after=page["after"])
    assert len(rest["rows"]) == 6 and rest["after"] == ""
    of_domain = ask(control, "queue_list", recipient="@else.test")["rows"]
    assert {row["recipient"] for row in of_domain} == {f"b{n}@else.test" for n in range(5)}
    (row,) = ask(control, "queue_list", queue_ids=[ids[0]], next_hop="there.test")["rows"]
    assert row["recipient"] == "a0@there.test" and row["state"] == "queued" and row["attempts"] == 0
    assert row["reverse_path"] == "ann@here.test" and row["created"] <= row["next_attempt"] <= row["expires"]
    assert ask(control, "queue_list", sender="@nobody.test")["rows"] == []
    assert ask(control, "queue_list", state="held")["rows"] == []


def test_queue_show(control: Control) -> None:
    queue_id = put_in_queue(control, "a@there.test", "b@there.test")
    entry = ask(control, "queue_show", queue_id=queue_id)
    assert entry["reverse_path"] == "ann@here.test" and entry["session"]["protocol"] == "ESMTPSA"
    assert [row["recipient"] for row in entry["recipients"]] == ["a@there.test", "b@there.test"]
    with pytest.raises(ControlError, match="is not in the queue"):
        ask(control, "queue_show", queue_id="0123456789012")
    with pytest.raises(ControlError, match="is no queue id"):
        ask(control, "queue_show", queue_id="x")


def test_queue_changes_reach_whoever_works_on_it(control: Control) -> None:
    seen: list[tuple[str, int]] = []
    control.spool.on_operator_change(lambda action, keys: seen.append((action, len(keys))))
    queue_id = put_in_queue(control, "a@there.test", "b@else.test")
    other = put_in_queue(control, "c@there.test")
    assert ask(control, "queue_hold", recipient="@there.test") == {"changed": 2}
    assert len(ask(control, "queue_list", state="held")["rows"]) == 2
    assert ask(control, "queue_retry", everything=True) == {"changed": 1}
    assert ask(control, "queue_release", queue_ids=[queue_id]) == {"changed": 1}
    assert ask(control, "queue_delete", queue_ids=[queue_id, other]) == {"changed": 3}
    assert ask(control, "queue_list")["rows"] == []
    assert seen == [("hold", 2), ("retry", 1), ("unhold", 1), ("delete", 3)]


@pytest.mark.parametrize("operation", ["queue_retry", "queue_hold", "queue_release", "queue_delete"])
def test_the_whole_queue_must_be_meant(control: Control, operation: str) -> None:
    with pytest.raises(ControlError, match="say which"):
        ask(control, operation)


def test_status(control: Control) -> None:
    put_in_queue(control, "a@there.test")
    status = ask(control, "status")
    assert status["running"] is False and status["queue"] == {"messages": 1, "queued": 1, "held": 0, "owned": 0}


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        ("no_such", {}),
        ("__init__", {}),
        ("_change", {}),
        ("domain_add", {}),
        ("domain_add", {"name": "x.test", "other": 1}),
        ("domain_add", {"name": 3}),
        ("domain_add", {"self": "x", "name": "x.test"}),
        ("domain_remove", {"name": "x.test", "everything": "yes"}),
        ("account_add", {"address": "a@x.test", "password": "p", "uid": True}),
        ("alias_add", {"address": "a@x.test", "targets": "b@x.test"}),
        ("alias_add", {"address": "a@x.test", "targets": [1]}),
        ("queue_list", {"limit": "many"}),
        ("queue_list", {"state": "gone"}),
        ("queue_list", {"queue_ids": ["' OR 1=1 --"]}),
    ],
)
def test_only_the_table_can_be_asked_for_and_only_with_its_types(
    control: Control, operation: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ControlError):
        run(do_operation, control, operation, arguments)


def test_every_operation_is_documented_and_in_the_table() -> None:
    methods = {name for name, value in vars(Control).items() if "_" in name[1:] and callable(value) and name[0] != "_"}
    assert methods <= set(OPERATIONS)
    assert all(operation.__doc__ for operation in OPERATIONS.values())


# -- the socket ----------------------------------------------------------------------------------------------------------


def test_the_same_over_the_socket(client: ControlClient) -> None:
    assert client.call("domain_add", name="here.test") == {"domain": "here.test"}
    with pytest.raises(ControlError, match="exists already"):
        client.call("domain_add", name="here.test")
    assert client.call("domain_list")[0]["domain"] == "here.test"
    with pytest.raises(ControlError, match="no operation"):
        client.call("os_system", command="true")


def test_socket_belongs_to_its_user_alone(control: Control, tmp_path: Path) -> None:
    with serve(control, tmp_path / "own"):
        assert stat.S_IMODE(os.stat(tmp_path / "own").st_mode) == 0o600
    with serve(control, tmp_path / "shared", group_access=True):
        assert stat.S_IMODE(os.stat(tmp_path / "shared").st_mode) == 0o660
    assert not os.path.lexists(tmp_path / "own")


def test_left_over_socket_is_replaced_and_a_live_one_is_not(control: Control, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(NoServer):
        ControlClient(str(path))
    with serve(control, path):
        with pytest.raises(OSError, match="another server"), serve(control, path):
            pass
        ControlClient(str(path)).close()


def test_socket_in_a_deep_directory(control: Control, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    with serve(control, deep / "control"):
        client = ControlClient(str(deep / "control"))
        assert client.call("domain_list") == []
        client.close()
    with pytest.raises(NoServer):
        ControlClient(str(tmp_path / ("n" * 120) / "control"))


def raw(server: ControlServer, octets: bytes) -> list[dict[str, Any]]:
    """Send octets, and read answers until the server is silent for a moment or closes."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(server.path)
        try:
            connection.sendall(octets)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it had closed already, which some of the tests want
        received = b""
        try:
            while piece := connection.recv(65536):
                received += piece
        except ConnectionError:
            pass
    return [json.loads(line) for line in received.splitlines()]


@pytest.mark.parametrize("line", [b"", b"x", b"[]", b"3", b'"x"', b"{}", b'{"operation": 3}', b"\xff\x00", b"[" * 5000])
def test_rubbish_is_refused_and_the_connection_goes_on(server: ControlServer, line: bytes) -> None:
    first, second = raw(server, line + b'\n{"operation": "domain_list", "arguments": {}}\n')
    assert first["kind"] == "refused" and second == {"result": []}


def test_answers_come_in_order(server: ControlServer) -> None:
    names = [f"d{n}.test" for n in range(30)]
    lines = [json.dumps({"operation": "domain_add", "arguments": {"name": name}}).encode() for name in names]
    assert raw(server, b"\n".join(lines) + b"\n") == [{"result": {"domain": name}} for name in names]


def test_overlong_request_ends_the_connection(server: ControlServer) -> None:
    answers = raw(server, b"x" * (MAX_REQUEST_OCTETS + 10))
    assert len(answers) <= 1  # it may be lost when our octets still come as the server closes
    with pytest.raises(ControlError, match="too long"):
        ControlClient(server.path).call("domain_add", name="x" * MAX_REQUEST_OCTETS)


def test_connections_are_bounded(server: ControlServer) -> None:
    clients = [ControlClient(server.path) for _ in range(MAX_CONNECTIONS)]
    for each in clients:
        each.call("domain_list")
    # The text may be lost where our request crosses the close; that it is "try again" is not.
    with pytest.raises(Unavailable):
        ControlClient(server.path).call("domain_list")
    for each in clients:
        each.close()


def test_a_failure_of_ours_is_not_told(control: Control, server: ControlServer, client: ControlClient) -> None:
    spool, control.spool = control.spool, None
    try:
        with pytest.raises(Unavailable, match="unexpected failure, see the log"):
            client.call("status")
    finally:
        control.spool = spool
    assert client.call("domain_list") == []
