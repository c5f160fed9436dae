# SPDX-License-Identifier: MIT
"""Events as people who read Postfix's log expect them: `queue id: to=<...>, relay=..., dsn=..., status=sent (...)`.

The same guarantees as the JSON form: control characters, bidirectional marks and DEL leave as `\\xNN` or `\\uNNNN`, and
fields are cut at 512 characters. Times are UTC, so that the log does not jump with daylight saving.
"""

from __future__ import annotations

import re
import time
from typing import Any

_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)
_STATUS = re.compile(r"\d{3} (\d\.\d{1,3}\.\d{1,3}) ")
_FIELD_CHARACTERS = 512

# event -> the daemon of Postfix that would say it, and its word for the status of a recipient
_COMPONENTS = {
    "received": "smtpd",
    "rejected": "smtpd",
    "tempfailed": "smtpd",
    "gate-refused": "postscreen",
    "login": "auth",
    "login-failed": "auth",
    "delivered": "local",
    "relayed": "smtp",
    "deferred": "smtp",
    "failed": "smtp",
    "expired": "qmgr",
    "expanded": "cleanup",
    "bounced": "bounce",
    "removed": "qmgr",
}
_STATUSES = {
    "delivered": "sent",
    "relayed": "sent",
    "expanded": "expanded",
    "deferred": "deferred",
    "failed": "bounced",
    "expired": "expired",
}


class TextLines:
    """Renders events as lines; knows the host and the process that each line names."""

    def __init__(self, hostname: str, pid: int) -> None:
        self._host = safe(hostname)
        self._pid = pid
        self._second, self._stamp = -1, ""

    def render(self, name: str, fields: dict[str, Any], seconds: float) -> str:
        """One line with its final newline; `seconds` since 1970."""
        whole = int(seconds)
        if whole != self._second:
            self._stamp = time.strftime("%b %e %H:%M:%S", time.gmtime(whole))
            self._second = whole
        component = _COMPONENTS.get(name, "master")
        queue_id = fields.get("queue_id")
        subject = f"{safe(queue_id)}: " if queue_id else ""
        return f"{self._stamp} {self._host} polarismail/{component}[{self._pid}]: {subject}{_body(name, fields)}\n"


def safe(value: Any) -> str:
    """A field as it may stand in a line."""
    text = value if type(value) is str else "" if value is None else str(value)
    if len(text) > _FIELD_CHARACTERS:
        text = text[: _FIELD_CHARACTERS - 3] + "..."
    return text if text.isascii() and text.isprintable() else _UNSAFE.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}" if number < 65536 else f"\\U{number:08x}"


def _body(name: str, fields: dict[str, Any]) -> str:
    if name == "received":
        known = [
            f"from=<{safe(fields.get('reverse_path'))}>",
            f"size={safe(fields.get('size'))}",
            f"nrcpt={safe(fields.get('recipients'))} (queue active)",
            f"client={safe(fields.get('client'))}",
        ]
        if fields.get("account"):
            known.append(f"sasl_username={safe(fields['account'])}")
        return ", ".join(known)
    if name in _STATUSES:
        return _recipient(name, fields)
    if name in ("rejected", "tempfailed"):
        return (
            f"reject: {safe(fields.get('stage'))} from {safe(fields.get('client'))}: {safe(fields.get('reply'))}; "
            f"from=<{safe(fields.get('reverse_path'))}> to=<{safe(fields.get('recipient'))}> "
            f"helo=<{safe(fields.get('helo'))}>"
        )
    if name == "bounced":
        return f"sender non-delivery notification: {safe(fields.get('report'))}"
    if name == "removed":
        return "removed"
    if name == "log":
        text = safe(fields.get("text"))
        lines = fields.get("traceback")
        return text if not lines else f"{text} | {safe(str(lines).strip().splitlines()[-1])}"
    rest = " ".join(f"{key}={safe(value)}" for key, value in fields.items() if key != "queue_id")
    return f"{safe(name)} {rest}".rstrip()


def _recipient(name: str, fields: dict[str, Any]) -> str:
    reply = safe(fields.get("reply"))
    status = _STATUS.match(reply)
    parts = [f"to=<{safe(fields.get('recipient'))}>"]
    original = fields.get("original")
    if original and original != fields.get("recipient"):
        parts.append(f"orig_to=<{safe(original)}>")
    parts.append(f"relay={safe(fields.get('relay')) or 'none'}")
    delay = fields.get("delay_seconds")
    if isinstance(delay, (int, float)):
        parts.append(f"delay={delay:.2g}" if delay < 100 else f"delay={delay:.0f}")
    default = "4.0.0" if name == "deferred" else "5.0.0" if name in ("failed", "expired") else "2.0.0"
    parts.append(f"dsn={status[1] if status else default}")
    parts.append(f"status={_STATUSES[name]} ({reply})")
    return ", ".join(parts)
