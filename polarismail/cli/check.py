# SPDX-License-Identifier: MIT
"""`polarismail check`: would the server start with this configuration? Reads, and changes nothing."""

from __future__ import annotations

import os
import time
from typing import Any

import click

from polarismail.cli.invocation import Invocation, common
from polarismail.cli.output import show_rows
from polarismail.config import Config
from polarismail.net.tls import CertificateStore
from polarismail.store.database import COUNTERS, MAIN, Database
from polarismail.telemetry_text import safe
from polarismail.values.errors import ConfigError

_SOON_SECONDS = 14 * 86400


@click.command()
@common
@click.pass_context
def check(context: click.Context, invocation: Invocation) -> None:
    """Validate the configuration without starting. Exit code 3 when the server would not start with it."""
    config = invocation.load()
    rows = findings(config)
    wrong = any(row["level"] == "error" for row in rows)
    if invocation.as_json or rows:
        show_rows(invocation, rows, (("level", "level"), ("about", "about"), ("text", "what")), "")
    if not invocation.as_json:
        click.echo(f"{safe(invocation.config_path)}: {'not usable' if wrong else 'ok'}")
    context.exit(3 if wrong else 0)


def findings(config: Config) -> list[dict[str, Any]]:
    """What stands in the way ("error"), and what somebody should know ("warning"), as level, about, text."""
    rows: list[dict[str, Any]] = []

    def say(level: str, about: str, text: str) -> None:
        rows.append({"level": level, "about": about, "text": text})

    if any(listener.tls != "none" for listener in config.listeners):
        _check_certificate(config, say)
    for key, url, branch in (("url", config.database_url, MAIN), ("counters_url", config.counters_url, COUNTERS)):
        try:
            Database(url, reactor=None, branch=branch, joins=False)
        except ConfigError as problem:
            say("error", f"database.{key}", str(problem))
    for key in ("state", "spool", "mail"):
        path = getattr(config.paths, key)
        if os.path.lexists(path) and not os.path.isdir(path):
            say("error", f"paths.{key}", f"{path}: expected a directory")
        elif not os.path.isdir(path):
            say("warning", f"paths.{key}", f"{path} is missing: the server makes it at its start, where it may")
    log_directory = os.path.dirname(config.log.file)
    if config.log.file not in ("", "-") and not os.path.isdir(log_directory):
        say("warning", "log.file", f"{log_directory} is missing: the server makes it at its start, where it may")
    if not config.listeners:
        say("warning", "listeners", "there is none: mail is only relayed, never received")
    for listener in config.listeners:
        if listener.plaintext_auth == "always" and listener.tls != "implicit":
            say("warning", f"listeners.{listener.name}", "passwords may cross the network in clear (plaintext_auth)")
        if set(listener.relay_networks) & set(listener.proxy_networks):
            say(
                "warning",
                f"listeners.{listener.name}",
                "a proxy may relay where it does not say for whom (relay_networks)",
            )
    for name, smarthost in (("smarthost", config.smarthost), *config.smarthosts.items()):
        if smarthost is not None and smarthost.user and smarthost.tls in ("none", "opportunistic"):
            say("warning", name, f'the password for {smarthost.host} may cross the network in clear: tls = "required"')
    if "." not in config.hostname:
        say("warning", "hostname", f"{config.hostname} is no full name: other servers may refuse our greeting")
    if "_" in config.hostname:  # the machine's own name: one that the file gives is refused
        say("warning", "hostname", f"{config.hostname} has an underscore: other servers may refuse our greeting")
    return rows


def _check_certificate(config: Config, say: Any) -> None:
    for key in ("certificate", "key"):
        path = getattr(config.tls, key)
        if os.path.exists(path) and not os.access(path, os.R_OK):
            say("warning", f"tls.{key}", f"{path} cannot be read by this user; root can tell")
            return
    try:
        store = CertificateStore(config.tls.certificate, config.tls.key)
    except ConfigError as problem:
        say("error", "tls", str(problem))
        return
    left = store.expires - time.time()
    if left < _SOON_SECONDS:
        when = time.strftime("%Y-%m-%d", time.gmtime(store.expires))
        say("warning", "tls.certificate", f"{config.tls.certificate} {'ended' if left < 0 else 'ends'} on {when}")
