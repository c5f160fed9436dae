# SPDX-License-Identifier: MIT
"""A PostgreSQL cluster of the tests' own: initdb into a temporary directory, UNIX socket only, gone at the end.

Skips, visibly, where the server's programs or psycopg are not installed.
"""

from __future__ import annotations

import atexit
import functools
import glob
import importlib.util
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile

import pytest

_numbers = itertools.count()


def postgres_url() -> str:
    """The URL of a fresh, empty database. Skips the test where there can be none."""
    directory = _cluster()
    name = f"test_{os.getpid()}_{next(_numbers)}"
    import psycopg

    with psycopg.connect(f"host={directory} user=postgres dbname=postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')  # type: ignore[call-overload]
    return f"postgresql+psycopg://postgres@/{name}?host={directory}"


@functools.cache
def _cluster() -> str:
    """Start the cluster once a test process; returns the directory of its socket."""
    binaries = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"), key=lambda path: float(path.split("/")[4]))
    found = os.path.dirname(binaries[-1]) if binaries else os.path.dirname(shutil.which("initdb") or "")
    if not found:
        pytest.skip("PostgreSQL's server programs are not installed")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed: pip install 'polarismail[postgresql]'")
    as_user: list[str] = []
    directory = tempfile.mkdtemp(prefix="pm-pg-", dir="/tmp")  # a socket's path is at most 107 octets
    if os.geteuid() == 0:
        # The server refuses to run as root.
        try:
            user = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("running as root, and there is no user postgres")
        os.chown(directory, user.pw_uid, user.pw_gid)
        as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    data = os.path.join(directory, "data")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "cwd": "/", "timeout": 60, "check": True}
    initdb = ["initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync", "--no-instructions"]
    subprocess.run([*as_user, os.path.join(found, initdb[0]), *initdb[1:]], **quiet)  # type: ignore[call-overload]
    options = (
        f"-c listen_addresses= -c unix_socket_directories={directory} -c fsync=off -c shared_buffers=16MB "
        "-c max_connections=50 -c full_page_writes=off"
    )
    control = [*as_user, os.path.join(found, "pg_ctl"), "-D", data, "-w"]
    subprocess.run([*control, "-l", os.path.join(directory, "log"), "-o", options, "start"], **quiet)  # type: ignore[call-overload]

    def stop() -> None:
        subprocess.run([*control, "-m", "immediate", "stop"], **{**quiet, "check": False})  # type: ignore[call-overload]
        shutil.rmtree(directory, ignore_errors=True)

    atexit.register(stop)
    return directory
