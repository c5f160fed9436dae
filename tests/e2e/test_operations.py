# SPDX-License-Identifier: MIT
"""An operator's day: reload, rotation, hold, retry, delete, a changed password, dropped privileges, a shifted clock."""

from __future__ import annotations

import os
import poplib
import pwd
import signal
import smtplib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server import PASSWORD, Helper, Server, wait_until

TEXT = "From: ann@here.test\r\nSubject: op\r\n\r\nHi\r\n"


def test_greylisted_stranger_passes_after_the_delay_and_logins_never_wait(make_server: Callable[..., Server]) -> None:
    server = make_server(greylisting=True).start()

    def knock(reverse_path: str = "who@else.test") -> tuple[int, bytes]:
        with server.smtp("mx") as client:
            client.mail(reverse_path)
            return client.rcpt("bob@here.test")

    code, text = knock()
    assert (code, text[:5]) == (451, b"4.7.1")
    assert knock()[0] == 451
    with server.smtp("mx", "ann@here.test") as client:
        client.sendmail("ann@here.test", ["bob@here.test"], TEXT)
    server.wait_for_messages("bob@here.test", 1)
    server.stop()
    server.start(clock_offset=301)
    assert knock()[0] == 250
    assert knock("other@else.test")[0] == 451


def test_a_changed_password_takes_effect_within_a_second(make_server: Callable[..., Server]) -> None:
    server = make_server().start()
    assert server.messages("bob@here.test") == []
    server.command("account", "passwd", "bob@here.test", "--password-stdin", input="another one")
    with pytest.raises(poplib.error_proto):
        server.messages("bob@here.test")
    assert server.messages("bob@here.test", "another one") == []
    with pytest.raises(smtplib.SMTPAuthenticationError), server.smtp("submission", "bob@here.test"):
        pass
    server.command("account", "add", "new@here.test", "--password-stdin", input=PASSWORD)
    assert server.messages("new@here.test") == []
    server.command("alias", "add", "team@here.test", "ann@here.test", "bob@here.test")
    with server.smtp("mx") as client:
        client.sendmail("who@else.test", ["team@here.test"], TEXT)
    server.wait_for_messages("ann@here.test", 1)
    (copy,) = wait_until(lambda: server.messages("bob@here.test", "another one"), "the alias's second copy")
    assert b"Delivered-To: bob@here.test" in copy
    server.command("account", "remove", "new@here.test")
    with pytest.raises(poplib.error_proto):
        server.messages("new@here.test")
    with server.smtp("mx") as client:
        client.mail("who@else.test")
        assert client.rcpt("new@here.test")[0] == 550


def test_queue_hold_retry_and_delete_act_on_the_running_server(
    make_server: Callable[..., Server], make_helper: Callable[..., Helper]
) -> None:
    sink = make_helper("sink", {"RCPT": "451 4.3.0 not today"})
    dns = make_helper("dns", {"there.test": {"MX": [[10, "mx.there.test"]]}, "mx.there.test": {"A": ["127.0.0.1"]}})
    server = make_server(dns_port=dns.port, remote_port=sink.port).start()

    def rows() -> list[dict[str, Any]]:
        return server.json("queue", "list")

    def row(recipient: str) -> dict[str, Any]:
        return next(each for each in rows() if each["recipient"] == recipient)

    with server.smtp("submission", "ann@here.test") as client:
        for name in ("held", "deleted", "retried"):
            client.sendmail("ann@here.test", [f"{name}@there.test"], TEXT)
    wait_until(lambda: len([each for each in rows() if each["attempts"] == 1]) == 3, "three deferrals")
    ids = {each["recipient"].partition("@")[0]: each["queue_id"] for each in rows()}
    server.command("queue", "hold", ids["held"])
    server.command("queue", "delete", ids["deleted"])
    assert row("held@there.test")["state"] == "held"
    assert {each["recipient"] for each in rows()} == {"held@there.test", "retried@there.test"}
    sink.write({})
    server.command("queue", "retry", ids["retried"])
    (message,) = wait_until(sink.received, "the retried message")
    assert message["recipients"] == ["retried@there.test"]
    assert row("held@there.test")["attempts"] == 1
    server.command("queue", "release", ids["held"])
    wait_until(lambda: len(sink.received()) == 2, "the released message")
    wait_until(lambda: not rows(), "the queue to empty")
    shown = server.json("trace", ids["retried"])
    assert shown[0]["event"] == "received"
    assert any("451" in str(event) for event in shown)


def test_reload_keeps_the_old_configuration_when_the_new_is_bad(make_server: Callable[..., Server]) -> None:
    server = make_server().start()
    good = server.config.read_text()
    server.config.write_text(good.replace("[relay]", "[relay]\nprot = 25"))
    server.signal(signal.SIGHUP)
    (event,) = wait_until(lambda: server.events("reload-failed"), "the refusal in the log")
    assert "prot" in event["problem"] and "polarismail.toml" in event["problem"]
    assert server.messages("bob@here.test") == []
    server.write_config(greylisting=True)
    server.signal(signal.SIGHUP)
    wait_until(lambda: server.events("reloaded"), "the reload", 10)
    with server.smtp("mx") as client:
        client.mail("who@else.test")
        assert client.rcpt("bob@here.test")[0] == 451


def test_log_is_reopened_after_rotation(make_server: Callable[..., Server]) -> None:
    server = make_server().start()
    log = server.directory / "log" / "events.log"
    log.rename(log.with_suffix(".1"))
    server.signal(signal.SIGHUP)
    wait_until(log.exists, "a fresh log file")
    with server.smtp("mx") as client:
        client.sendmail("who@else.test", ["bob@here.test"], TEXT)
    wait_until(lambda: server.events("received"), "the event in the fresh file")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts as root and drops to nobody")
def test_privileges_are_dropped_for_good_and_databases_opened_after(tmp_path: Path) -> None:
    import shutil
    import tempfile

    nobody = pwd.getpwnam("nobody")
    # pytest's directories are closed to others; the dropped process must reach its files.
    directory = Path(tempfile.mkdtemp(prefix="polarismail-drop-"))
    os.chmod(directory, 0o755)
    server = Server(directory / "server")
    try:
        server.make_accounts()
        for path in (directory / "server").rglob("*"):
            shutil.chown(path, nobody.pw_uid, nobody.pw_gid)
        shutil.chown(directory / "server", nobody.pw_uid, nobody.pw_gid)
        os.chmod(directory / "server" / "key.pem", 0o600)
        shutil.chown(directory / "server" / "key.pem", 0, 0)  # only root may read the key
        server.start(twistd=("--uid", str(nobody.pw_uid), "--gid", str(nobody.pw_gid)))
        status = Path(f"/proc/{server.pid}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert fields["Uid"].split() == [str(nobody.pw_uid)] * 4
        assert fields["Gid"].split() == [str(nobody.pw_gid)] * 4
        assert fields["CapEff"].strip("0") == "" and fields["CapPrm"].strip("0") == ""
        assert fields["NoNewPrivs"].strip() == "1"
        assert "0" not in fields["Groups"].split()
        # PR_SET_DUMPABLE 0: the files of the process belong to root, and nobody of the same user may trace it.
        assert os.stat(f"/proc/{server.pid}/status").st_uid == 0
        with server.smtp("mx") as client:
            client.sendmail("who@else.test", ["bob@here.test"], TEXT)
        server.wait_for_messages("bob@here.test", 1)
        for path in (directory / "server" / "state").rglob("*"):
            assert path.stat().st_uid == nobody.pw_uid, path
        server.command("account", "passwd", "bob@here.test", "--password-stdin", input="other")
        assert len(server.messages("bob@here.test", "other")) == 1
        log = directory / "server" / "log" / "events.log"
        log.rename(log.with_suffix(".1"))
        server.write_config(greylisting=True)
        server.signal(signal.SIGHUP)
        (event,) = wait_until(lambda: server.events("reloaded"), "the reload, in a log file that nobody opened as root")
        assert log.stat().st_uid == nobody.pw_uid
        assert "key.pem" in event["certificate_kept"]
        with server.smtp("mx") as client:
            client.starttls(context=server.tls)
            client.ehlo()
            client.mail("who@else.test")
            assert client.rcpt("bob@here.test")[0] == 451
        assert len(server.messages("bob@here.test", "other")) == 1
    finally:
        server.kill()
        print(server.twistd_log()[-3000:])
        shutil.rmtree(directory)


def test_a_port_in_use_is_named_and_ends_the_start(make_server: Callable[..., Server]) -> None:
    first = make_server("first").start()
    second = make_server("second")
    second.ports = first.ports
    second.write_config()
    second.make_accounts()
    second.spawn()
    assert second.process is not None
    assert second.process.wait(30) == 1
    assert 'listener "mx" cannot listen on 127.0.0.1 port' in second.twistd_log()


def test_stop_finishes_and_a_second_start_goes_on(make_server: Callable[..., Server]) -> None:
    server = make_server().start()
    with server.smtp("mx") as client:
        for n in range(50):
            client.sendmail("who@else.test", ["bob@here.test"], f"Subject: {n}\r\n\r\nHi\r\n")
        assert server.stop() in (0, -signal.SIGTERM)  # twistd ends by the signal that it was sent
    server.start()
    assert len(server.wait_for_messages("bob@here.test", 50)) == 50
