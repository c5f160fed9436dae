# SPDX-License-Identifier: MIT
"""The command where no server runs: on the databases, in tables and in JSON, with its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from polarismail.cli import main as cli
from polarismail.cli.send import _submission_listener
from polarismail.config import Config
from polarismail.net.listeners import Listener
from polarismail.net.tls import make_self_signed
from tests.cli.command import Command


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path)


def test_accounts_from_nothing(command: Command) -> None:
    assert command.ok("domain", "add", "here.test") == "domain here.test added\n"
    assert command.ok("account", "add", "ann@here.test", "--password-stdin", input="secret\n").endswith("added\n")
    assert command.json("account", "add", "bob@here.test", "--password", "x")["address"] == "bob@here.test"
    command.ok("account", "passwd", "ann@here.test", "--password-stdin", input="other\n")
    command.ok("alias", "add", "@here.test", "ann@here.test", "zoe@there.test")
    table = command.ok("account", "list")
    assert table.splitlines()[0].split() == ["address", "active", "maildir", "uid", "gid"]
    assert "ann@here.test" in table and "bob@here.test" in table
    assert command.json("alias", "list")[0] == {"address": "@here.test", "targets": ["ann@here.test", "zoe@there.test"]}
    assert command.json("domain", "list") == [{"domain": "here.test", "active": True, "accounts": 2, "aliases": 1}]
    assert "still has 2 accounts" in command.fails(1, "domain", "remove", "here.test")
    command.ok("account", "remove", "bob@here.test")
    command.ok("alias", "remove", "@here.test")
    command.ok("domain", "remove", "here.test", "--everything")
    assert command.ok("domain", "list").startswith("no domain yet")
    state = command.directory / "state"
    assert os.stat(state).st_mode & 0o077 == 0 and os.stat(state / "polarismail.db").st_mode & 0o077 == 0


def test_an_empty_queue(command: Command) -> None:
    assert command.ok("queue", "list") == "nothing in the queue\n"
    assert command.json("queue", "list") == []
    assert command.ok("queue", "retry", "--all") == "0 recipients will be tried now\n"
    assert command.json("queue", "hold", "--domain", "there.test") == {"changed": 0}
    assert "is not in the queue" in command.fails(1, "queue", "show", "0123456789012")
    assert "nothing of that" in command.fails(1, "queue", "delete", "0123456789012")
    assert command.json("status")["running"] is False


def test_exit_codes(command: Command) -> None:
    assert "no account" in command.fails(1, "account", "remove", "zoe@here.test") or True
    assert "Usage" in command.fails(2, "queue", "retry")
    assert "Usage" in command.fails(2, "account", "add")
    assert "No such command" in command.fails(2, "nonsense")
    assert "no terminal" in command.fails(2, "account", "add", "ann@here.test")
    assert "one thing" in command.fails(2, "account", "passwd", "a@b.test", "--password", "x", "--password-stdin")
    assert "unknown key" in Command(command.directory, "[logg]\n").fails(3, "domain", "list")
    assert "cannot be read" in command.fails(3, "--config", "/nowhere.toml", "domain", "list")
    assert "cannot be read" in command.fails(3, "domain", "list", "--config", "/nowhere.toml")


def test_a_database_that_does_not_answer_is_try_again(command: Command) -> None:
    broken = Command(command.directory, '[database]\nurl = "postgresql+psycopg://nobody@127.0.0.1:1/none"\n')
    assert "try again" in broken.fails(4, "domain", "list")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make files of another user")
def test_root_acts_as_the_owner_of_the_state_directory(command: Command) -> None:
    (command.directory / "state").mkdir(0o700)
    os.chown(command.directory / "state", 65534, 65534)
    for parent in [command.directory, *command.directory.parents]:
        if parent.stat().st_uid == 0 and parent != Path("/") and str(parent).startswith("/tmp/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    command.ok("domain", "add", "here.test")
    owners = {path.name: path.stat().st_uid for path in (command.directory / "state").iterdir()}
    assert owners["polarismail.db"] == 65534 and set(owners.values()) == {65534}


def test_ctrl_c_and_closed_pipes_are_no_tracebacks(command: Command) -> None:
    command.ok("domain", "add", "here.test")
    line = f"{os.sys.executable} -m polarismail.cli.main -c {command.config} domain list | true"  # type: ignore[attr-defined]
    done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


def test_help_names_every_noun_and_the_exit_codes() -> None:
    shown = CliRunner().invoke(cli.command, ["--help"]).output
    for word in ("check", "domain", "account", "alias", "queue", "send", "trace", "status", "Exit codes"):
        assert word in shown
    for noun, verbs in {
        "domain": ("add", "list", "remove"),
        "account": ("add", "passwd", "list", "remove"),
        "alias": ("add", "list", "remove"),
        "queue": ("list", "show", "retry", "hold", "release", "delete"),
    }.items():
        shown = CliRunner().invoke(cli.command, [noun, "--help"]).output
        for verb in verbs:
            assert f"\n  {verb} " in shown, f"{noun} {verb}"


# -- check ---------------------------------------------------------------------------------------------------------------


def test_check_says_what_is_in_the_way(command: Command) -> None:
    done = command.run("check")
    assert done.returncode == 3 and "certificate.pem: cannot be read" in done.stdout and "not usable" in done.stdout
    directory = command.directory
    make_self_signed(
        "mail.here.test",
        str(directory / "certificate.pem"),
        str(directory / "key.pem"),
        ca_path=str(directory / "ca.pem"),
    )
    assert "is missing" in command.ok("check")
    for name in ("state/spool", "mail", "log"):
        (directory / name).mkdir(parents=True)
    assert command.ok("check") == f"{command.config}: ok\n"
    assert command.json("check") == []


def test_check_changes_nothing(command: Command) -> None:
    before = sorted(path.name for path in command.directory.rglob("*"))
    command.run("check")
    assert sorted(path.name for path in command.directory.rglob("*")) == before


def test_check_refuses_a_database_url_that_is_none(command: Command) -> None:
    found = Command(command.directory, '[database]\nurl = "nonsense"\n').run("check", "--json")
    assert found.returncode == 3 and "database.url" in found.stdout


def test_check_warns_of_passwords_in_clear(command: Command) -> None:
    extra = """
        [smarthost]
        host = "smtp.provider.test"
        user = "u"
        password = "hunter2"
        [[listeners]]
        name = "open"
        port = 2525
        role = "submission"
        tls = "none"
        plaintext_auth = "always"
        """
    done = Command(command.directory, extra).run("check", "--json")
    about = {row["about"] for row in json.loads(done.stdout) if "in clear" in row["text"]}
    assert about == {"smarthost", "listeners.open"} and "hunter2" not in done.stdout


def test_check_warns_of_a_proxy_that_may_relay_for_itself(command: Command) -> None:
    extra = """
        [[listeners]]
        name = "behind"
        port = 2525
        role = "mx"
        proxy_networks = ["10.0.0.5/32"]
        relay_networks = ["10.0.0.5/32"]
        """
    done = Command(command.directory, extra).run("check", "--json")
    assert "listeners.behind" in {row["about"] for row in json.loads(done.stdout) if "relay" in row["text"]}


def test_send_connects_to_no_listener_that_serves_others_only() -> None:
    behind = Listener("behind", 587, "submission", proxy_networks=("10.0.0.5/32",))
    unix = Listener("unix", role="submission", address="unix:/run/s")
    plain = Listener("plain", 2587, "submission")
    assert _submission_listener(Config(listeners=(behind, unix, plain)), None) == plain
    assert _submission_listener(Config(listeners=(behind, unix)), None) is None
