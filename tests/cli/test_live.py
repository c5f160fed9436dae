# SPDX-License-Identifier: MIT
"""The command against a running server: what it does takes effect there, and what it says is what the server knows."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import Command
from tests.e2e.server import PASSWORD, Helper, Server, wait_until


class Live(Command):
    """The command with a running server's configuration."""

    def __init__(self, server: Server) -> None:
        self.server, self.directory, self.config = server, server.directory, server.config

    def send(self, *to: str, text: str = "Subject: x\n\nHello\n", **options: Any) -> str:
        """Send from ann; the queue id."""
        words = [word for each in to for word in ("--to", each)]
        words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        sent = self.json("send", "--from", "ann@here.test", "--password", PASSWORD, *words, input=text)
        return str(sent["queue_id"])


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    directory = tmp_path_factory.mktemp("live")
    dns = Helper(directory, "dns", {"broken.test": "SERVFAIL", "other.test": "SERVFAIL"})
    server = Server(directory / "server", dns_port=dns.port)
    try:
        server.start()
        yield Live(server)
    finally:
        server.kill()
        dns.stop()
        print(server.twistd_log()[-3000:])


def events(live: Live, queue_id: str, last: str) -> list[dict[str, Any]]:
    """What trace finds, once the log has come to the event `last`."""

    def found() -> list[dict[str, Any]] | None:
        done = live.run("trace", queue_id, "--json")
        rows = json.loads(done.stdout) if done.returncode == 0 else []
        return rows if rows and rows[-1]["event"] == last else None

    return wait_until(found, f"the event {last} of {queue_id}")  # type: ignore[no-any-return]


@pytest.mark.parametrize("port", ["submission", "submissions", "mx"])
def test_send_through_every_port_and_read_it(live: Live, port: str) -> None:
    before = len(live.server.messages("bob@here.test"))
    live.send("bob@here.test", text="Subject: dots\n\n.\n..\nend", port=live.server.ports[port])
    found = live.server.wait_for_messages("bob@here.test", before + 1)[-1]
    assert found.endswith(b"Subject: dots\r\n\r\n.\r\n..\r\nend\r\n")
    header = found.partition(b"\r\n\r\n")[0]
    for field in (b"\r\nFrom: ann@here.test", b"\r\nTo: bob@here.test", b"\r\nDate: ", b"\r\nMessage-ID: <"):
        assert header.count(field) == 1
    assert b"with ESMTPSA" in header


def test_send_a_file_to_a_named_server(live: Live, tmp_path: Path) -> None:
    message = tmp_path / "message.eml"
    message.write_bytes(b"From: ann@here.test\r\nSubject: x\r\n\r\n" + b"0123456789\r\n" * 200_000)
    words = ["--host", "localhost", "--port", str(live.server.ports["submission"]), "--ca", str(live.server.ca)]
    words += ["--user", "ann@here.test", "--password-stdin", "--from", "ann@here.test", "--to", "bob@here.test"]
    assert live.ok("send", str(message), *words, input=PASSWORD + "\n").startswith("250 2.0.0 Queued as ")


def test_send_tells_what_is_wrong(live: Live) -> None:
    common = ["send", "--from", "ann@here.test", "--to"]
    text = "Subject: x\n\nx\n"
    assert "535" in live.fails(1, *common, "bob@here.test", "--password", "wrong", input=text)
    assert "550" in live.fails(1, *common, "nobody@here.test", "--password", PASSWORD, input=text)
    partly = live.run(*common, "bob@here.test", "--to", "nobody@here.test", "--password", PASSWORD, input=text)
    assert partly.returncode == 1 and "Queued as" in partly.stdout and "refused: nobody@here.test" in partly.stderr
    assert "refused" in live.fails(4, *common, "bob@here.test", "--password", "x", "--port", "9", input=text)
    assert "is no address" in live.fails(2, *common, "bob", "--password", "x", input=text)
    assert "cannot be both" in live.fails(2, *common, "bob@here.test", "--password-stdin", input=text)
    # The system's trust store does not know our authority, and the name is not what the certificate is for.
    words = [
        "--password",
        PASSWORD,
        "--host",
        "127.0.0.1",
        "--port",
        str(live.server.ports["submissions"]),
        "--tls",
        "implicit",
    ]
    untrusted = live.run(*common, "bob@here.test", *words, input=text)
    assert untrusted.returncode == 1 and "not trusted" in untrusted.stderr and not untrusted.stdout


def test_a_changed_account_is_changed_in_the_running_server(live: Live) -> None:
    live.ok("account", "add", "cyd@here.test", "--password", "one")
    live.server.messages("cyd@here.test", "one")
    live.ok("account", "passwd", "cyd@here.test", "--password-stdin", input="two\n")
    live.server.messages("cyd@here.test", "two")
    with pytest.raises(Exception, match="-ERR"):
        live.server.messages("cyd@here.test", "one")
    live.ok("alias", "add", "team@here.test", "ann@here.test", "cyd@here.test")
    live.send("team@here.test")
    wait_until(lambda: live.server.messages("cyd@here.test", "two"), "the message to the alias")
    live.ok("account", "remove", "cyd@here.test")
    with pytest.raises(Exception, match="-ERR"):
        live.server.messages("cyd@here.test", "two")


def test_queue_in_the_running_server(live: Live) -> None:
    first = live.send("zoe@broken.test", "yan@other.test")
    second = live.send("zoe@broken.test")

    def tried() -> list[dict[str, Any]] | None:
        rows = live.json("queue", "list")
        return rows if len(rows) == 3 and all(row["attempts"] for row in rows) else None

    rows = wait_until(tried, "the first deferrals")
    assert {row["queue_id"] for row in rows} == {first, second}
    table = live.ok("queue", "list")
    assert first in table and "yan@other.test" in table and "3 recipients of 2 messages" in table
    assert [row["recipient"] for row in live.json("queue", "list", "--domain", "other.test")] == ["yan@other.test"]
    assert live.json("queue", "hold", "--domain", "broken.test") == {"changed": 2}
    assert len(live.json("queue", "list", "--state", "held")) == 2
    shown = live.ok("queue", "show", first)
    assert "<ann@here.test>" in shown and "held" in shown and "ESMTPSA" in shown
    attempts = live.json("queue", "show", first)["recipients"][1]["attempts"]
    assert live.json("queue", "retry", first) == {"changed": 1}
    wait_until(
        lambda: live.json("queue", "show", first)["recipients"][1]["attempts"] > attempts,
        "the retried recipient's attempt",
    )
    assert live.json("queue", "release", second) == {"changed": 1}
    assert live.json("queue", "delete", "--all") == {"changed": 3}
    assert live.json("queue", "list") == []
    assert live.json("status")["running"] is True
    assert re.search(r"workers\.0\.relay\.in_hand +0", live.run("status").stdout)


def test_trace_finds_a_message_through_rotation(live: Live) -> None:
    queue_id = live.send("bob@here.test")
    rows = events(live, queue_id, "removed")
    assert [row["event"] for row in rows] == ["received", "delivered", "removed"]
    assert "to bob@here.test through local (250 2.0.0" in live.ok("trace", queue_id)
    log = live.directory / "log" / "events.log"
    os.rename(log, f"{log}.1")
    live.server.signal(signal.SIGUSR1)
    wait_until(log.exists, "the new log")
    with open(f"{log}.1", "rb") as plain, gzip.open(f"{log}.2.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    os.unlink(f"{log}.1")
    later = live.send("bob@here.test")
    assert len(events(live, later, "removed")) == 3
    assert len(events(live, queue_id, "removed")) == 3
    assert "no event of" in live.fails(1, "trace", "0123456789012")
    assert "is no queue id" in live.fails(1, "trace", "../../etc/passwd")
