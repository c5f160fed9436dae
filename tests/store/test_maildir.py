# SPDX-License-Identifier: MIT
"""Names, unique-ids, and directories that are made and opened only as they should be."""

from __future__ import annotations

import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polarismail.store import maildir as names
from polarismail.store.maildir import FileName, MaildirRefused

KEY = names.delivery_key(1795310235.9, "1abcdefghjkmn", 3)


def test_a_name_says_sizes_as_dovecot_does() -> None:
    unique = names.render_unique(KEY, "mail.example.org")
    name = names.render_name(unique, 42, 48)
    assert name == "1795310235.Q1abcdefghjkmnR3.mail.example.org,S=42,W=48"
    assert FileName.parse(name) == FileName(unique, 42, 48, "")
    assert FileName.parse(name + ":2,FS") == FileName(unique, 42, 48, "FS")
    assert names.key_of(name + ":2,S") == KEY


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("1.M2P3.host:2,", FileName("1.M2P3.host", None, None, "")),
        ("1.M2P3.host,S=10:2,RS", FileName("1.M2P3.host", 10, None, "RS")),
        ("1.M2P3.host,W=11,S=10", FileName("1.M2P3.host", 10, 11, "")),
        ("1.M2P3.host,S=x", FileName("1.M2P3.host,S=x", None, None, "")),
        ("1.M2P3,a=b.host,S=5", FileName("1.M2P3,a=b.host", 5, None, "")),
        ("junk:1,x", FileName("junk", None, None, "")),
        ("", FileName("", None, None, "")),
    ],
)
def test_names_of_others_are_read(name: str, expected: FileName) -> None:
    assert FileName.parse(name) == expected


def test_the_time_of_delivery_comes_from_the_name() -> None:
    assert FileName.parse("1795310235.x.y").seconds == 1795310235
    assert FileName.parse("x.y").seconds is None


def test_no_host_name_breaks_a_file_name() -> None:
    assert names.render_unique("1.Q", "a/b:c,S=1 \0") == "1.Q.a_b_c_S_1__"
    assert names.render_unique("1.Q", "") == "1.Q.localhost"


@given(st.text(max_size=120))
@settings(deadline=None)
def test_a_uidl_is_always_one_that_rfc_1939_allows(unique: str) -> None:
    assert re.fullmatch(r"[\x21-\x7e]{1,70}", names.uidl(unique))


def test_a_uidl_ignores_what_changes() -> None:
    new = names.render_name(names.render_unique(KEY, "h"), 42, 48)
    assert {names.uidl(FileName.parse(new + info).unique) for info in ("", ":2,", ":2,FRS")} == {f"{KEY}.h"}
    assert len(names.uidl("1." + "x" * 80)) == 40


@pytest.mark.parametrize("path", ["", "../x", "a/../../x", "a\0b", "/srv/../etc"])
def test_no_path_climbs(path: str) -> None:
    with pytest.raises(MaildirRefused):
        names.locate("/var/mail", path)


def test_paths_are_relative_to_the_mail_root_or_absolute() -> None:
    assert names.locate("/var/mail", "example.org/anna") == "/var/mail/example.org/anna"
    assert names.locate("/var/mail", "/home/anna/Maildir") == "/home/anna/Maildir"


def test_a_maildir_is_made_with_what_is_above_it(tmp_path) -> None:
    path = str(tmp_path / "example.org" / "anna")
    names.create(path, str(tmp_path))
    names.create(path, str(tmp_path))
    assert sorted(os.listdir(path)) == ["cur", "new", "tmp"]
    for made in (path, f"{path}/new", str(tmp_path / "example.org")):
        assert os.stat(made).st_mode & 0o777 == 0o700


def test_a_missing_part_is_made_again(tmp_path) -> None:
    path = str(tmp_path / "anna")
    names.create(path, str(tmp_path))
    os.rmdir(f"{path}/tmp")
    names.create(path, str(tmp_path))
    assert sorted(os.listdir(path)) == ["cur", "new", "tmp"]


def test_a_disk_that_is_not_mounted_is_not_made_up(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        names.create(str(tmp_path / "missing" / "anna"), str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError):
        names.create(str(tmp_path / "home" / "anna" / "Maildir"), str(tmp_path / "mail"))
    assert os.listdir(tmp_path) == []


def test_inside_a_maildir_no_link_is_followed(tmp_path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "anna").mkdir()
    (tmp_path / "anna" / "new").symlink_to(tmp_path / "elsewhere")
    directory = names.open_directory(str(tmp_path / "anna"))
    with pytest.raises(OSError):
        names.open_directory("new", directory)
    os.close(directory)


def test_another_owner_is_refused(tmp_path) -> None:
    with pytest.raises(MaildirRefused, match="belongs to uid"):
        names.open_directory(str(tmp_path), owner=os.geteuid() + 1)


def test_only_regular_files_of_the_account_are_messages(tmp_path) -> None:
    owner = os.geteuid()
    (tmp_path / "plain").write_bytes(b"x")
    (tmp_path / "link").symlink_to("plain")
    os.link(tmp_path / "plain", tmp_path / "hard")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    (tmp_path / "secret").write_bytes(b"x")
    (tmp_path / "secret").chmod(0)
    directory = names.open_directory(str(tmp_path))
    for name in ("plain", "hard"):
        os.close(names.open_message(name, directory, owner=owner))
    for name in ("link", "fifo", "directory", "secret"):
        with pytest.raises((OSError, MaildirRefused)):
            names.open_message(name, directory, owner=owner)
    with pytest.raises(MaildirRefused):
        names.open_message("plain", directory, owner=owner + 1)
    os.close(directory)
