# SPDX-License-Identifier: MIT
"""`polarismail send`: submits a message through a running server, with a login over TLS, as any mail program would.

The certificate must lead to the system's trust store, to `--ca`, or be the very one that the configuration names.
"""

from __future__ import annotations

import email.utils
import re
import smtplib
import socket
import ssl
from typing import IO

import click

from polarismail.cli.account import password_options, read_password
from polarismail.cli.invocation import Invocation, common
from polarismail.cli.output import progress, show
from polarismail.config import Config
from polarismail.net.listeners import Listener
from polarismail.values.address import Mailbox
from polarismail.values.errors import BadAddress, ControlError, Unavailable
from polarismail.values.reply import Reply

_TIMEOUT_SECONDS = 60.0
_FINAL_SECONDS = 630.0  # the final dot may take ten minutes (RFC 5321 §4.5.3.2.6)
_PIECE_OCTETS = 65536
_LONG_OCTETS = 1 << 20  # from here on a bar is shown
_FIELD = re.compile(rb"[!-9;-~]+[ \t]*:")
_LINE_END = re.compile(rb"\r\n|\r|\n")
_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


class _Connect(smtplib.SMTP):
    """Connects to an address and verifies another name: on this machine the server is at 127.0.0.1 under its own name."""

    address = ""

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        return socket.create_connection((self.address, port), timeout)


class _ConnectTls(smtplib.SMTP_SSL, _Connect):
    """The same with TLS from the start (RFC 8314)."""


@click.command()
@click.argument("file", type=click.File("rb"), default="-")
@click.option("--from", "reverse_path", required=True, metavar="ADDRESS", help="The sender.")
@click.option("--to", "forward_paths", required=True, multiple=True, metavar="ADDRESS", help="May be repeated.")
@click.option("--user", metavar="NAME", help="The login name; the sender's address by default.")
@password_options
@click.option("--host", help="The server; by default the one that the configuration describes, on this machine.")
@click.option("--port", type=int, help="Its submission port.")
@click.option("--tls", type=click.Choice(["starttls", "implicit"]), help="With --host; implicit on 465 by default.")
@click.option("--ca", type=click.Path(exists=True, dir_okay=False), metavar="FILE", help="Certificates to trust (PEM).")
@common
def send(
    invocation: Invocation,
    file: IO[bytes],
    reverse_path: str,
    forward_paths: tuple[str, ...],
    user: str | None,
    password: str | None,
    password_stdin: bool,
    host: str | None,
    port: int | None,
    tls: str | None,
    ca: str | None,
) -> None:
    """Submit the message in FILE (or standard input) through a running server.

    From, To, Date and Message-ID are put in where the message has none.
    """
    if password_stdin and file.name in ("-", "<stdin>"):
        raise click.UsageError("standard input cannot be both the password and the message")
    sender, recipients = _address(reverse_path), [_address(each) for each in forward_paths]
    config = None if host and port and ca else invocation.load()
    secret = read_password(password, password_stdin, confirm=False)
    octets = complete(file.read(), sender, recipients)
    try:
        with _connect(config, host, port, tls, ca) as client:
            client.login(user or str(sender), secret)
            reply, refused = _submit(client, sender, recipients, octets)
    except smtplib.SMTPResponseException as problem:
        raise _refusal(problem.smtp_code, problem.smtp_error) from problem
    except ssl.SSLError as problem:
        raise ControlError(f"the server's certificate is not trusted: {problem}; see --ca") from problem
    except smtplib.SMTPNotSupportedError as problem:
        raise ControlError(str(problem)) from problem
    except (OSError, smtplib.SMTPException) as problem:
        raise Unavailable(f"the server does not take the message: {problem}") from problem
    queue_id = reply.text.rpartition(" ")[2]
    text = str(reply) + "".join(f"\nrefused: {address}: {why}" for address, why in refused.items())
    for line in text.split("\n")[1:]:
        click.echo(line, err=True)
    show(invocation, {"queue_id": queue_id, "reply": str(reply), "refused": refused}, str(reply))
    if refused:
        raise ControlError(f"{len(refused)} of {len(recipients)} recipients were refused")


def complete(octets: bytes, sender: Mailbox, recipients: list[Mailbox]) -> bytes:
    """The message with CRLF line ends, and with the header fields that every message has (RFC 5322 §3.6)."""
    octets = _LINE_END.sub(b"\r\n", octets)
    if octets and not octets.endswith(b"\r\n"):
        octets += b"\r\n"
    header, _, _ = octets.partition(b"\r\n\r\n")
    has_header = _FIELD.match(octets) is not None
    present = {line.split(b":")[0].strip().lower() for line in header.split(b"\r\n")} if has_header else set()
    fields = {
        "From": str(sender),
        "To": ", ".join(str(each) for each in recipients),
        "Date": email.utils.formatdate(localtime=True),
        "Message-ID": email.utils.make_msgid(domain=sender.domain_ascii or None),
    }
    missing = [f"{name}: {value}\r\n" for name, value in fields.items() if name.lower().encode() not in present]
    return "".join(missing).encode() + (b"" if has_header else b"\r\n") + octets


def _address(text: str) -> Mailbox:
    try:
        return Mailbox.parse(text)
    except BadAddress as problem:
        raise click.UsageError(f"{text!r} is no address: {problem}") from problem


def _connect(
    config: Config | None, host: str | None, port: int | None, tls: str | None, ca: str | None
) -> smtplib.SMTP:
    context = ssl.create_default_context()
    if ca:
        context.load_verify_locations(ca)
    listener = _submission_listener(config, port) if config is not None else None
    if config is not None and not ca and not host:
        _trust_own_certificate(context, config.tls.certificate)
    address = host or _EVERYWHERE.get(listener.address if listener else "", listener.address if listener else "")
    name = host or (config.hostname if config is not None else "")
    number = port or (listener.port if listener is not None else 587)
    if tls is None:
        tls = listener.tls if listener is not None and not host else "implicit" if number == 465 else "starttls"
    implicit = tls == "implicit"
    settings = {"context": context} if implicit else {}
    # A class of its own, because the constructor connects, and must know the address by then.
    connect = type("Connect", (_ConnectTls if implicit else _Connect,), {"address": address})
    client: smtplib.SMTP = connect(name, number, timeout=_TIMEOUT_SECONDS, **settings)
    client.ehlo_or_helo_if_needed()
    if implicit:
        return client
    if tls == "starttls":
        client.starttls(context=context)
    return client


def _submission_listener(config: Config, port: int | None) -> Listener | None:
    for listener in config.listeners:
        if listener.kind != "tcp" or listener.proxy_networks:
            continue  # we do not know where it is, or are no proxy
        if listener.protocol == "smtp" and (listener.port == port if port else listener.role == "submission"):
            return listener
    return None


def _trust_own_certificate(context: ssl.SSLContext, path: str) -> None:
    try:
        context.load_verify_locations(path)
    except (OSError, ssl.SSLError):
        return  # not ours to read, or none: then the trust store must do
    # The server's own certificate is no authority; it is trusted as it stands.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN


def _submit(
    client: smtplib.SMTP, sender: Mailbox, recipients: list[Mailbox], octets: bytes
) -> tuple[Reply, dict[str, str]]:
    _expect(client.mail(str(sender), [f"SIZE={len(octets)}"]))
    refused = {}
    for recipient in recipients:
        code, text = client.rcpt(str(recipient))
        if code >= 400:
            refused[str(recipient)] = str(_refusal(code, text))
    if len(refused) == len(recipients):
        client.rset()
        raise ControlError("; ".join(f"{address}: {why}" for address, why in refused.items()))
    code, text = client.docmd("DATA")
    if code != 354:
        raise smtplib.SMTPResponseException(code, text)
    stuffed = re.sub(rb"(?m)^\.", b"..", octets) + b".\r\n"
    with progress() as bar:
        task = bar.add_task("sending", total=len(stuffed), visible=len(stuffed) > _LONG_OCTETS)
        for at in range(0, len(stuffed), _PIECE_OCTETS):
            client.send(stuffed[at : at + _PIECE_OCTETS])
            bar.advance(task, min(_PIECE_OCTETS, len(stuffed) - at))
    client.sock.settimeout(_FINAL_SECONDS)  # type: ignore[union-attr]
    return _expect(client.getreply()), refused


def _expect(answer: tuple[int, bytes]) -> Reply:
    code, text = answer
    if code >= 400 or code < 200:
        raise smtplib.SMTPResponseException(code, text)
    return Reply.parse([b"%d %s" % (code, text.replace(b"\n", b" "))])


def _refusal(code: int, text: bytes | str) -> ControlError | Unavailable:
    shown = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    said = f"the server says {code} {shown}".replace("\n", " ")
    return Unavailable(said) if 400 <= code < 500 else ControlError(said)
