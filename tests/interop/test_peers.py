# SPDX-License-Identifier: MIT
"""Mail between polarismail and the programs that people run: Postfix both ways, swaks, msmtp, getmail, fetchmail, mutt."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.peers import DOMAIN, Postfix
from tests.e2e.conftest import make_helper, make_server  # noqa: F401
from tests.e2e.server import PASSWORD, Helper, Server, free_port, wait_until


def needs(program: str) -> pytest.MarkDecorator:
    """Skip, and say so, where a Debian package is not installed. CI installs them all."""
    missing = shutil.which(program) is None
    if missing and os.environ.get("CI"):
        raise RuntimeError(f"{program} is missing in CI: .ci/run installs it")
    return pytest.mark.skipif(missing, reason=f"{program} is not installed (apt-get install it, or run .ci/run)")


def run_program(*words: str | Path, input: str = "", cwd: Path | None = None, ok: tuple[int, ...] = (0,)) -> str:
    """Run a client; its output. Fails with the output when its status is not one of `ok`."""
    done = subprocess.run(
        [str(word) for word in words],
        input=input,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=60,
        cwd=cwd,
    )
    assert done.returncode in ok, f"{words[0]} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with ann and bob, that relays what is foreign to a sink."""
    directory = tmp_path_factory.mktemp("interop")
    sink = Helper(directory, "sink")
    dns = Helper(
        directory, "dns", {"there.test": {"MX": [[10, "mx.there.test"]]}, "mx.there.test": {"A": ["127.0.0.1"]}}
    )
    server = Server(directory / "server", dns_port=dns.port, remote_port=sink.port)
    server.sink = sink  # type: ignore[attr-defined]
    try:
        yield server.start()
    finally:
        server.kill()
        dns.stop()
        sink.stop()
        print(server.twistd_log()[-3000:])


def swaks(server: Server, port: str, to: str, *words: str, ok: tuple[int, ...] = (0,)) -> str:
    """One message by swaks; its transcript."""
    return run_program(
        *("swaks", "--server", "127.0.0.1", "--port", str(server.ports[port]), "--from", "ann@here.test", "--to", to),
        *("--ehlo", "client.test", "--header", f"Subject: swaks {port}", *words),
        ok=ok,
    )


def login(mechanism: str = "PLAIN") -> tuple[str, ...]:
    """swaks' options for a login as ann."""
    return ("--auth", mechanism, "--auth-user", "ann@here.test", "--auth-password", PASSWORD)


@needs("swaks")
@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
def test_swaks_submits_with_auth_over_587_and_465(server: Server, mechanism: str) -> None:
    before = len(server.messages("bob@here.test"))
    swaks(server, "submission", "bob@here.test", "--tls", *login(mechanism))
    swaks(server, "submissions", "bob@here.test", "--tls-on-connect", *login(mechanism))
    found = server.wait_for_messages("bob@here.test", before + 2)
    assert sum(b"Subject: swaks submission" in message for message in found) >= 2


@needs("swaks")
def test_swaks_sends_abroad_over_26_with_a_login_and_is_refused_without(server: Server) -> None:
    transcript = swaks(server, "mx-alt", "zoe@there.test", ok=(24,))
    assert "550 5.7.1" in transcript
    swaks(server, "mx-alt", "zoe@there.test", "--tls", *login())
    sink: Helper = server.sink  # type: ignore[attr-defined]
    wait_until(lambda: [m for m in sink.received() if m["recipients"] == ["zoe@there.test"]], "the message abroad")
    # In clear there is no AUTH at all; swaks calls that status 28.
    assert (
        "AUTH" not in swaks(server, "mx-alt", "zoe@there.test", *login(), ok=(28,)).split("<** ")[0].split("250-", 1)[1]
    )


@needs("swaks")
def test_swaks_pipelines(server: Server) -> None:
    transcript = swaks(server, "mx", "bob@here.test", "--pipeline")
    assert "250 2.0.0 Queued as" in transcript


@needs("msmtp")
def test_msmtp_submits(server: Server, tmp_path: Path) -> None:
    config = tmp_path / "msmtprc"
    config.write_text(
        f"account default\nhost localhost\nport {server.ports['submission']}\ntls on\ntls_starttls on\n"
        f"tls_trust_file {server.ca}\nauth on\nuser ann@here.test\npassword {PASSWORD}\nfrom ann@here.test\n"
    )
    config.chmod(0o600)
    run_program("msmtp", "-C", config, "bob@here.test", input="From: ann@here.test\nSubject: by msmtp\n\nHello\n")
    wait_until(
        lambda: [m for m in server.messages("bob@here.test") if b"Subject: by msmtp" in m], "the message of msmtp"
    )


@needs("getmail")
def test_getmail_collects(server: Server, tmp_path: Path) -> None:
    swaks(server, "mx", "bob@here.test", "--header", "Subject: for getmail")
    expected = len(server.wait_for_messages("bob@here.test", 1))
    collected = tmp_path / "collected"
    collected.mkdir()
    # getmail's own Maildir writer refuses to run as root; an external one does what it is told.
    script = tmp_path / "deliver"
    script.write_text(f'#!/bin/sh\nexec cat > "$(mktemp {collected}/XXXXXX)"\n')
    script.chmod(0o755)
    (tmp_path / "getmailrc").write_text(
        f"[retriever]\ntype = SimplePOP3SSLRetriever\nserver = localhost\nport = {server.ports['pop3s']}\n"
        f"username = bob@here.test\npassword = {PASSWORD}\nca_certs = {server.ca}\n"
        f"[destination]\ntype = MDA_external\npath = {script}\nallow_root_commands = true\n"
        "[options]\nread_all = false\ndelete = false\n"
    )
    words = ("getmail", "--getmaildir", tmp_path, "--rcfile", "getmailrc")
    run_program(*words)
    assert len(list(collected.iterdir())) == expected
    run_program(*words)  # UIDL says: nothing is new
    assert len(list(collected.iterdir())) == expected


@needs("fetchmail")
def test_fetchmail_collects_over_stls_and_deletes(server: Server, tmp_path: Path) -> None:
    with server.smtp("mx") as client:
        client.sendmail("x@else.test", ["ann@here.test"], "Subject: for fetchmail\r\n\r\nHello\r\n")
    count = len(server.wait_for_messages("ann@here.test", 1))
    out = tmp_path / "out.mbox"
    script = tmp_path / "deliver"
    script.write_text(f"#!/bin/sh\ncat >> {out}\n")
    script.chmod(0o755)
    config = tmp_path / "fetchmailrc"
    config.write_text(
        f'poll localhost protocol pop3 service {server.ports["pop3"]} auth password username "ann@here.test" '
        f'password "{PASSWORD}" sslproto TLS1.2+ sslcertfile "{server.ca}" sslcertck mda "{script}"\n'
    )
    config.chmod(0o700)
    run_program("fetchmail", "-f", config, "--pidfile", tmp_path / "pid", "--nosyslog", "--nodetach", ok=(0,))
    assert out.read_text(errors="replace").count("Subject: for fetchmail") == 1
    assert count >= 1
    assert server.messages("ann@here.test") == []


@needs("mutt")
def test_mutt_reads_over_pop3_and_sends_over_smtp(server: Server, tmp_path: Path) -> None:
    config = tmp_path / "muttrc"
    config.write_text(
        f'set from="ann@here.test"\nset ssl_force_tls=yes\nset certificate_file="{server.ca}"\n'
        f'set smtp_url="smtp://ann@here.test@localhost:{server.ports["submission"]}/"\nset smtp_pass="{PASSWORD}"\n'
        f'set pop_pass="{PASSWORD}"\nset copy=no\nset folder="{tmp_path}"\nset header_cache=""\n'
        f'set tmpdir="{tmp_path}"\nset hostname="client.test"\n'
    )
    (tmp_path / "home").mkdir()
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "TERM": "xterm"}
    done = subprocess.run(
        ["mutt", "-n", "-F", str(config), "-s", "by mutt", "bob@here.test"],
        input="Hello from mutt\n",
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    wait_until(lambda: [m for m in server.messages("bob@here.test") if b"Subject: by mutt" in m], "the message of mutt")


@needs("postfix")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts a Postfix of its own")
def test_postfix_relays_to_us_and_we_relay_to_postfix(
    make_server: Callable[..., Server],  # noqa: F811
    make_helper: Callable[..., Helper],  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    import tempfile

    directory = Path(tempfile.mkdtemp(prefix="polarismail-postfix-"))  # open to Postfix's own users, unlike tmp_path
    postfix = Postfix(directory, port=free_port())
    dns = make_helper("dns", {DOMAIN: {"MX": [[10, "pf.lab.test"]]}, "pf.lab.test": {"A": ["127.0.0.1"]}})
    server = make_server(dns_port=dns.port, remote_port=postfix.port).start()
    postfix.smtp_port = server.ports["mx"]
    try:
        postfix.start()
        with server.smtp("submission", "ann@here.test") as client:
            client.sendmail(
                "ann@here.test", [f"box@{DOMAIN}"], "From: ann@here.test\r\nSubject: to postfix\r\n\r\n.dots\r\n"
            )
        (file,) = wait_until(lambda: list(postfix.new.iterdir()) if postfix.new.is_dir() else [], "Postfix's delivery")
        text = file.read_text()
        assert "Subject: to postfix\n" in text
        assert text.endswith("\n\n.dots\n")
        import smtplib

        with smtplib.SMTP("127.0.0.1", postfix.port, timeout=20) as client:
            client.sendmail(f"box@{DOMAIN}", ["bob@here.test"], "Subject: from postfix\r\n\r\n.dots\r\n")
        (message,) = server.wait_for_messages("bob@here.test", 1)
        assert message.startswith(f"Return-Path: <box@{DOMAIN}>\r\n".encode())
        assert b"by pf.lab.test (Postfix)" in message
        assert message.endswith(b"\r\n\r\n.dots\r\n")
        with smtplib.SMTP("127.0.0.1", postfix.port, timeout=20) as client:
            client.sendmail(f"box@{DOMAIN}", ["nobody@here.test"], "Subject: bounces\r\n\r\n")
        bounce = wait_until(
            lambda: [f for f in postfix.new.iterdir() if "No such mailbox here" in f.read_text()], "Postfix's bounce"
        )
        assert len(bounce) == 1
    finally:
        postfix.stop()
        print((directory / "postfix.log").read_text()[-3000:] if (directory / "postfix.log").exists() else "no log")
        shutil.rmtree(directory)
