# SPDX-License-Identifier: MIT
"""The event log: one line per event, written within 100 ms, whatever a peer put into its fields.

Guarantees
    - A field cannot forge or break a line, and cannot drive a terminal: C0, C1, DEL, bidirectional marks and all that
      is not ASCII leave as JSON escapes (HOSTILE E7). A field is cut at 512 characters, a traceback at 8,192.
    - `record_event` costs microseconds (benchmarks/telemetry.py measures it) and never raises.
    - A disk that cannot be written costs log lines, which are counted and reported, and never memory or service.

Lines that are younger than 100 ms die with a SIGKILL: the log tells, the spool promises.

Events of an ordinary message: three. Every one has `queue_id`:

    received    reverse_path size recipients (how many) listener protocol client helo, account where somebody logged in,
                priority and hold_until where they were granted
    delivered   recipient relay delay_seconds reply, original behind an alias: into a maildrop of ours
    relayed     the same, waited_seconds sending_seconds: to a next hop
    removed     nothing more: the message has left the spool

Of others: deferred (and next_attempt attempts), failed, expired, expanded: as delivered; bounced: `report` is the DSN's id.
Others: see `EVENTS`. Ordinary `twisted.logger` events go to the same file through `EventLog.observe`.
"""

from __future__ import annotations

import json.encoder
import math
import os
import threading
import time
from collections.abc import Callable
from json.encoder import encode_basestring_ascii  # the C function: quotes, escapes C0 and everything that is not ASCII
from typing import Any

from twisted.internet.interfaces import IReactorFromThreads, IReactorTime
from twisted.logger import ILogObserver, LogEvent, LogLevel, formatEvent
from zope.interface import implementer

from polarismail.telemetry_text import TextLines

EVENTS = (
    "received",
    "delivered",
    "relayed",
    "expanded",
    "deferred",
    "failed",
    "expired",
    "bounced",
    "removed",
    "rejected",  # 5yz at a stage: stage client helo listener reverse_path recipient reply
    "tempfailed",  # the same with 4yz
    "alarm",  # an operator must look: queue_id recipient reply
    "gate-refused",  # before the greeting: client why reply
    "login",
    "login-failed",  # client listener login: fit for fail2ban
    "proxy-refused",  # listener proxy problem refused (how many since the last such line)
    "started",
    "stopped",
    "reloaded",
    "reload-failed",
    "worker-ready",  # worker pid
    "worker-ended",  # worker pid how
    "space-short",  # no mail is taken: path free_octets total_octets free_inodes total_inodes
    "space-enough",  # it is again: the same
    "memory-short",  # newcomers are told 421: used_octets limit_octets
    "memory-enough",  # they are served again: the same
    "stress-begins",  # places run out: protocol sessions places
    "stress-ends",  # the same
    "limit-reached",  # client limit of allowed: a client or its network has used up one of `[limits]`
    "connections-refused",  # at most every 10 s: protocol sessions put_out refused_by_address refused_by_network ...
    "stall",  # something blocked the reactor's thread: stalls longest_seconds
    "log",  # an ordinary Logger event: level namespace text traceback
    "log-lines-lost",  # count
)

FIELD_CHARACTERS = 512
TRACEBACK_CHARACTERS = 8192
FLUSH_SECONDS = 0.1
_BUFFER_CHARACTERS = 65536  # this much is written at once, without waiting for the tick
_KEPT_CHARACTERS = 1 << 20  # while the disk refuses, so much is kept for the next try
SECRETS = frozenset({"password", "secret", "credentials", "response", "initial", "token"})

# Bound early: both run for every field of every event.
_quote = encode_basestring_ascii
_names: dict[str, str] = {}


def _refuse(value: Any) -> None:
    raise TypeError


# The C encoder behind json.dumps; None where Python was built without.
_make_encoder: Any = getattr(json.encoder, "c_make_encoder", None)
_encode: Any = _make_encoder and _make_encoder(None, _refuse, _quote, None, ":", ",", False, False, False)


def render_json(name: str, fields: dict[str, Any], seconds: float) -> str:
    """One event as a JSON object on one line, with its final newline; `seconds` since 1970."""
    if _encode is not None and fields and SECRETS.isdisjoint(fields):
        # Nearly every event: short, of plain values. What is short as a whole has no field that must be cut.
        try:
            text = "".join(_encode(fields, 0))
        except (TypeError, ValueError):
            return _render_piecewise(name, fields, seconds)
        if len(text) <= FIELD_CHARACTERS and "\x7f" not in text:
            return f'{{"time":"{_render_time(seconds)}","event":{_quote(name)},{text[1:]}\n'
    return _render_piecewise(name, fields, seconds)


def _render_piecewise(name: str, fields: dict[str, Any], seconds: float) -> str:
    parts = ['{"time":"', _render_time(seconds), '","event":', _quote(name)]
    append = parts.append
    for key, value in fields.items():
        rendered = _names.get(key)
        if rendered is None:
            rendered = _render_name(key)
            if key in SECRETS:
                append(rendered + '"***"')
                continue
        append(rendered)
        if type(value) is str:
            text = _quote(value if len(value) <= FIELD_CHARACTERS else _cut(key, value))
            append(text if "\x7f" not in text else text.replace("\x7f", "\\u007f"))
        elif type(value) is int:
            append(str(value))
        else:
            append(_render_value(value))
    append("}\n")
    return "".join(parts)


def _render_value(value: Any, depth: int = 0) -> str:
    if value is None:
        return "null"
    if value is True or value is False:
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.6g}" if abs(value) < 1e5 else repr(value) if math.isfinite(value) else "null"
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, (list, tuple)) and depth < 2:
        return "[" + ",".join(_render_value(item, depth + 1) for item in value[:100]) + "]"
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return _quote(text[:FIELD_CHARACTERS]).replace("\x7f", "\\u007f")


def _cut(key: str, value: str) -> str:
    limit = TRACEBACK_CHARACTERS if key == "traceback" else FIELD_CHARACTERS
    return value if len(value) <= limit else value[: limit - 3] + "..."


def _render_name(key: str) -> str:
    rendered = f",{_quote(str(key)[:64])}:"
    if key not in SECRETS and len(_names) < 1000:  # names come from our code; the bound is for the day they do not
        _names[key] = rendered
    return rendered


_second, _second_text = -1, ""


def _render_time(seconds: float) -> str:
    global _second, _second_text
    whole = int(seconds)
    if whole != _second:
        _second_text = time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(whole))
        _second = whole
    return f"{_second_text}{int((seconds - whole) * 1e6):06d}Z"


@implementer(ILogObserver)
class EventLog:
    """Writes events to one file, or to standard output when `path` is "-" or "".

    `reactor` ticks; `now` is the wall clock; `style` is "json" or "text". Nothing is opened before `open()`, so that
    the file belongs to the user that the server runs as. Call everything but `observe` on the reactor's thread.
    """

    def __init__(
        self,
        path: str,
        *,
        reactor: IReactorTime,
        style: str = "json",
        hostname: str = "localhost",
        now: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self._reactor = reactor
        self._now = now
        self._render = TextLines(hostname, os.getpid()).render if style == "text" else render_json
        self._lines: list[str] = []
        self._waiting = 0
        self._tick: Any = None
        self._descriptor: int | None = None
        self._thread = threading.get_ident()
        self.lost = 0  # lines that could not be written, not yet reported

    def open(self) -> None:
        """Open the file (made 0640 when new). Raises OSError."""
        self._thread = threading.get_ident()
        if self._descriptor is None:
            self._descriptor = self._open()
        self._schedule()

    def close(self) -> None:
        """Write what waits and close. Events that come later are dropped. Idempotent."""
        self.flush()
        if self._tick is not None and self._tick.active():
            self._tick.cancel()
        self._tick = None
        self._close()

    def reopen(self) -> None:
        """After a rotation (SIGHUP, SIGUSR1): write what waits to the old file, go on in a new one of the same name. When
        that cannot be opened the old one is kept, and its last line says so."""
        if self._descriptor is None:
            return
        self.flush()
        try:
            fresh = self._open()
        except OSError as problem:
            self.record_event("reload-failed", {"path": self.path, "problem": problem.strerror or str(problem)})
            return
        self._close()
        self._descriptor = fresh

    def record_event(self, name: str, fields: dict[str, Any]) -> None:
        """Note one event; it is in the file within 100 ms. Never raises."""
        try:
            line = self._render(name, fields, self._now())
        except Exception:
            # A field whose str() raises must not take the mail transaction with it.
            self.lost += 1
            return
        self._lines.append(line)
        self._waiting += len(line)
        if self._waiting > _BUFFER_CHARACTERS:
            self.flush()
        elif self._tick is None:
            self._schedule()

    def observe(self, event: LogEvent) -> None:
        """A twisted.logger observer: the event becomes a line of the same file. May be called from any thread.

        What Twisted itself says below a warning (each socket that opens and closes) stays out: an ordinary message has at
        most three lines here.
        """
        if event.get("log_level", LogLevel.info) < LogLevel.warn and _is_chatter(event):
            return
        name, fields = _from_logger(event)
        if threading.get_ident() == self._thread:
            self.record_event(name, fields)
        else:
            IReactorFromThreads(self._reactor).callFromThread(self.record_event, name, fields)

    __call__ = observe

    def flush(self) -> None:
        """Write what waits, now. While the file cannot be written, 1 MB is kept and the rest is counted in `lost`."""
        if self._descriptor is None or not (self._lines or self.lost):
            return
        if self.lost:
            self._lines.append(self._render("log-lines-lost", {"count": self.lost}, self._now()))
        octets = "".join(self._lines).encode("utf-8", "backslashreplace")
        try:
            while octets:
                octets = octets[os.write(self._descriptor, octets) :]
        except OSError:
            self._keep(octets)
            return
        self._lines, self._waiting, self.lost = [], 0, 0

    def _keep(self, octets: bytes) -> None:
        # What a short write left begins in the middle of a line; the next successful write completes that line.
        if self.lost:
            self._lines.pop()
        if len(octets) > _KEPT_CHARACTERS:
            self.lost += len(self._lines)
            self._lines, self._waiting = [], 0
        else:
            self._lines, self._waiting = [octets.decode("utf-8", "replace")], len(octets)
        self._schedule()

    def _schedule(self) -> None:
        if self._tick is None and self._descriptor is not None and (self._lines or self.lost):
            self._tick = self._reactor.callLater(FLUSH_SECONDS, self._on_tick)

    def _on_tick(self) -> None:
        self._tick = None
        self.flush()

    def _open(self) -> int:
        if self.path in ("", "-"):
            return os.dup(1)
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _from_logger(event: LogEvent) -> tuple[str, dict[str, Any]]:
    """An event of twisted.logger as name and fields: its own simple fields, and none of its machinery."""
    fields: dict[str, Any] = {
        key: value
        for key, value in event.items()
        if not key.startswith("log_") and key not in _LEGACY and type(value) in (str, int, float, bool)
    }
    name = str(fields.pop("event", "log"))
    level = event.get("log_level", LogLevel.info)
    fields["level"] = level.name
    fields["namespace"] = str(event.get("log_namespace", ""))
    fields["text"] = formatEvent(event)
    failure = event.get("log_failure")
    if failure is not None:
        fields["traceback"] = failure.getTraceback()[-TRACEBACK_CHARACTERS:]
    return name, fields


def _is_chatter(event: LogEvent) -> bool:
    namespace = str(event.get("log_namespace", ""))
    return namespace == "log_legacy" or namespace.startswith("twisted.")


# What twisted.python.log adds to events that come through it.
_LEGACY = frozenset({"time", "message", "system", "format", "isError", "failure", "why"})
