# SPDX-License-Identifier: MIT
"""Where the files of a maildrop are and what they are called; directories appear whole or not at all.

Names follow Maildir as Dovecot writes it: `<seconds>.Q<queue id>R<number>.<host>,S=<octets on disk>,W=<octets with CRLF>`
and, once a reader has seen the file, `:2,<flags>`. The part before the host derives from the queue id and the number of the
recipient, so that a delivery which is repeated writes the same name (DURABILITY rule 5).

Everything is opened relative to directory descriptors, never through a link, and only when it belongs to the account
(HOSTILE I9). Directories that are made here have mode 0700; they are durable after the next `syncfs` of their file system.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from functools import lru_cache

from attrs import frozen

from polarismail.values.errors import Unavailable

TMP, NEW, CUR = "tmp", "new", "cur"
PARTS = (TMP, NEW, CUR)
DIRECTORY_MODE = 0o700
FILE_MODE = 0o600
UIDL_OCTETS = 70  # RFC 1939 §7

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_SIZES = re.compile(r"(?:,[SW]=\d{1,18})+$")
_SIZE = re.compile(r",([SW])=(\d{1,18})")
_SECONDS = re.compile(r"\d{1,12}(?=\.)")
_UIDL = re.compile(rf"[\x21-\x7e]{{1,{UIDL_OCTETS}}}")
_HOST_JUNK = re.compile(r"[^A-Za-z0-9._-]")


class MaildirRefused(Unavailable):
    """The maildir is there but must not be used as it is (another owner, a link, a bad path); `str()` says why."""


@frozen
class FileName:
    """A maildir file name in its parts. `unique` is what never changes: no sizes, no flags."""

    unique: str
    disk_octets: int | None  # ,S=
    wire_octets: int | None  # ,W=: with CRLF line ends
    flags: str

    @classmethod
    def parse(cls, name: str) -> FileName:
        """Split any name; nothing is refused, what is not there is None or ""."""
        base, _, info = name.partition(":")
        sizes = _SIZES.search(base)
        if sizes is None:
            return cls(base, None, None, info[2:] if info[:2] == "2," else "")
        found = {letter: int(octets) for letter, octets in _SIZE.findall(sizes[0])}
        return cls(base[: sizes.start()], found.get("S"), found.get("W"), info[2:] if info[:2] == "2," else "")

    @property
    def seconds(self) -> int | None:
        """When the file was delivered, in seconds since 1970, where its name says so."""
        found = _SECONDS.match(self.unique)
        return int(found[0]) if found else None


def delivery_key(created: float, queue_id: str, number: int) -> str:
    """The part of a name that belongs to one recipient of one message, for ever."""
    return f"{int(created)}.Q{queue_id}R{number}"


def key_of(name: str) -> str:
    """The `delivery_key` of a file that we wrote; of others' files, something that equals no key of ours."""
    return ".".join(name.split(".", 2)[:2])


def render_unique(key: str, hostname: str) -> str:
    """The name without sizes. `/` and `:` never get into it, whatever the host is called."""
    return f"{key}.{_render_host(hostname)}"


@lru_cache(maxsize=16)
def _render_host(hostname: str) -> str:
    return _HOST_JUNK.sub("_", hostname)[:100] or "localhost"


def render_name(unique: str, disk_octets: int, wire_octets: int) -> str:
    """The name under which the file lies in new/."""
    return f"{unique},S={disk_octets},W={wire_octets}"


def uidl(unique: str) -> str:
    """POP3's unique-id (RFC 1939 §7): the unchanging part of the name, or a hash where that is too long or unprintable.

    Flags, sizes, and the move from new/ to cur/ do not change it.
    """
    return unique if _UIDL.fullmatch(unique) else hash_uidl(unique)


def hash_uidl(text: str) -> str:
    """Forty hexadecimal digits for a name that cannot serve as a unique-id itself."""
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=20).hexdigest()


@lru_cache(maxsize=10_000)  # asked for each message, and few accounts get most of them
def locate(mail_root: str, maildir: str) -> str:
    """The absolute path of an account's maildir. Raises MaildirRefused for a path that climbs or holds NUL."""
    if not maildir or "\0" in maildir or ".." in maildir.split("/"):
        raise MaildirRefused("the account's maildir is no usable path")
    return os.path.normpath(os.path.join(mail_root, maildir))


def create(path: str, mail_root: str) -> None:
    """Make a maildir with what is missing of tmp/, new/ and cur/.

    Directories between the mail root and the maildir are made too, but never the mail root itself, nor the parent of a
    maildir elsewhere: where those are missing a disk is probably not mounted, and mail must wait. Raises OSError.
    """
    parent = os.path.dirname(path)
    root = os.path.normpath(mail_root)
    if os.path.commonpath((root, path)) == root and path != root:
        missing = []
        while parent != root and not os.path.isdir(parent):
            missing.append(parent)
            parent = os.path.dirname(parent)
        for directory in reversed(missing):
            _make_directory(directory)
    _make_directory(path)
    directory_fd = open_directory(path)
    try:
        # tmp/ last: delivery opens it first, so that a maildir whose making was cut off is completed, cur/ included.
        for part in reversed(PARTS):
            _make_directory(part, directory_fd)
    finally:
        os.close(directory_fd)


def _make_directory(path: str, directory_fd: int | None = None) -> None:
    try:
        os.mkdir(path, DIRECTORY_MODE, dir_fd=directory_fd)
    except FileExistsError:
        pass  # somebody else made it first, or it was there: open_directory looks at what it is


def open_directory(path: str, directory_fd: int | None = None, *, owner: int | None = None) -> int:
    """A descriptor of a directory; inside a maildir (`directory_fd`) links are not followed. Raises OSError, MaildirRefused."""
    flags = _DIRECTORY_FLAGS if directory_fd is None else _DIRECTORY_FLAGS | os.O_NOFOLLOW
    opened = os.open(path, flags, dir_fd=directory_fd)
    if owner is not None:
        actual = os.fstat(opened).st_uid
        if actual != owner:
            os.close(opened)
            raise MaildirRefused(f"the maildir belongs to uid {actual}, not to {owner}")
    return opened


def open_message(name: str, directory_fd: int, *, owner: int) -> int:
    """A descriptor to read one message from: a regular file of the account, not a link, FIFO or device.

    Raises OSError (ENOENT when it was renamed), MaildirRefused.
    """
    opened = os.open(
        name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, dir_fd=directory_fd
    )
    about = os.fstat(opened)
    if not is_message(about, owner):
        os.close(opened)
        raise MaildirRefused("not a regular, readable file of the account")
    return opened


def is_message(about: os.stat_result, owner: int) -> bool:
    """True for what may be shown as a message. Hard links are fine: Dovecot copies by making them."""
    return stat.S_ISREG(about.st_mode) and about.st_uid == owner and bool(about.st_mode & stat.S_IRUSR)
