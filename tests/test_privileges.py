# SPDX-License-Identifier: MIT
"""That privileges are gone is looked at, not believed (HOSTILE E10). Each case is a process of its own, begun as root."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from polarismail.privileges import check_dropped, make_directory
from polarismail.values.errors import ConfigError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: drops it in several ways")
ROOT = Path(__file__).resolve().parent.parent
NOBODY = 65534
DROP = (
    f"os.setgroups([{NOBODY}]); os.setresgid({NOBODY}, {NOBODY}, {NOBODY}); os.setresuid({NOBODY}, {NOBODY}, {NOBODY})"
)
KEEP_CAPABILITIES = "import ctypes; assert ctypes.CDLL(None).prctl(28, 4, 0, 0, 0) == 0; "


def judge(how: str, uid: int | None = NOBODY, gid: int | None = NOBODY) -> str:
    """Drop privileges by this code in a fresh process; what `check_dropped` says there, "" for nothing."""
    code = f"""
import os
from polarismail.privileges import check_dropped, forbid_new_privileges
from polarismail.values.errors import ConfigError
{how}
try:
    check_dropped({uid}, {gid})
    forbid_new_privileges()
except ConfigError as problem:
    print(problem)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_was_dropped_for_good_passes() -> None:
    assert judge(DROP) == ""
    assert judge("pass", None, None) == ""


@pytest.mark.parametrize(
    ("how", "gid", "words"),
    [
        ("pass", NOBODY, "the user ids are (0, 0, 0)"),
        (f"os.setegid({NOBODY}); os.seteuid({NOBODY})", NOBODY, f"the user ids are (0, {NOBODY}, 0)"),
        (f"os.setresuid({NOBODY}, {NOBODY}, 0)", NOBODY, "the user ids are"),
        (
            f"os.setgroups([{NOBODY}]); os.setresuid({NOBODY}, {NOBODY}, {NOBODY})",
            NOBODY,
            "the group ids are (0, 0, 0)",
        ),
        (DROP.replace(f"os.setgroups([{NOBODY}])", "os.setgroups([0])"), NOBODY, "supplementary group"),
        (f"os.setgroups([]); os.setresuid({NOBODY}, {NOBODY}, {NOBODY})", None, "the group is still root's"),
        (KEEP_CAPABILITIES + DROP, NOBODY, "can become root again"),
    ],
    ids=["nothing", "effective", "saved", "group", "supplementary", "no-gid", "capabilities"],
)
def test_what_was_not_is_noticed(how: str, gid: int | None, words: str) -> None:
    assert words in judge(how, NOBODY, gid)


def test_the_systemd_unit_confines_the_service() -> None:
    unit = (ROOT / "etc" / "polarismail.service").read_text().splitlines()
    for line in (
        "ProtectSystem=strict",
        "PrivateTmp=yes",
        "NoNewPrivileges=yes",
        "SystemCallFilter=@system-service",
        "MemoryMax=80%",
        "LimitNOFILE=65536",
        "RestrictSUIDSGID=yes",
    ):
        assert line in unit
    (kept,) = [line for line in unit if line.startswith("CapabilityBoundingSet=")]
    assert "CAP_SYS" not in kept and "CAP_NET_ADMIN" not in kept


def test_nothing_was_asked_nothing_is_checked() -> None:
    check_dropped(None, None)


def test_missing_directories_belong_to_the_service(tmp_path: Path) -> None:
    make_directory(str(tmp_path / "a" / "b"), NOBODY, NOBODY)
    for path, mode in ((tmp_path / "a", 0o755), (tmp_path / "a" / "b", 0o700)):
        assert (path.stat().st_uid, path.stat().st_gid, path.stat().st_mode & 0o777) == (NOBODY, NOBODY, mode)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        make_directory(str(tmp_path / "file" / "below"), None, None)


def test_a_directory_that_is_there_is_left_alone(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o751)
    make_directory(str(tmp_path), NOBODY, NOBODY)
    assert (tmp_path.stat().st_uid, tmp_path.stat().st_mode & 0o777) == (0, 0o751)
