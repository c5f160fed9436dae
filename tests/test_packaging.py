# SPDX-License-Identifier: MIT
"""What is installed elsewhere works: wheel and sdist have all that is needed, and the core dependencies are enough.

Takes a minute or so: it builds, and fills a fresh virtualenv from pip's cache.
"""

from __future__ import annotations

import configparser
import json
import os
import poplib
import shutil
import smtplib
import ssl
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.e2e.server import wait_until
from tests.test_demo import free_offset

ROOT = Path(__file__).resolve().parent.parent
NEEDED = (
    "twisted/plugins/polarismail_plugin.py",
    "polarismail/service.py",
    "polarismail/cli/main.py",
    "polarismail/py.typed",
    "polarismail/store/migrations/main/env.py",
    "polarismail/store/migrations/main/versions/r0001_first.py",
    "polarismail/store/migrations/counters/versions/r0001_first.py",
)
pytestmark = [pytest.mark.timeout(600)]


def run(*words: str | Path, cwd: Path, **environment: str) -> str:
    """Run a program; what it printed. Nothing of this checkout may be found by accident."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**clean, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist, and a wheel that is made from it: what the sdist lacks the wheel lacks."""
    source = tmp_path_factory.mktemp("source") / "polarismail"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:
        for name in filter(None, tracked.stdout.split("\0")):
            if (ROOT / name).is_file():
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, source / name)
    else:  # from an unpacked sdist there is no git
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".venv", "var", "build", "dist", "*.egg-info"))
    output = tmp_path_factory.mktemp("dist")
    # The setuptools that is here, so that building needs no network.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", output, source, cwd=output)
    (wheel,) = output.glob("*.whl")
    (sdist,) = output.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtualenv's bin directory: the wheel and its core dependencies, no extra, nothing else."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", environment, cwd=environment)
    run(environment / "bin" / "pip", "install", "--quiet", built[0], cwd=environment)
    return environment / "bin"


def test_wheel_and_sdist_are_complete(built: tuple[Path, Path]) -> None:
    wheel, sdist = built
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    assert set(NEEDED) <= in_wheel
    assert {*NEEDED, "etc/polarismail.toml", "LICENSE", "README.rst", "Makefile", "tests/test_packaging.py"} <= in_sdist
    # Twisted's own package files belong to Twisted.
    assert not {"twisted/__init__.py", "twisted/plugins/__init__.py"} & (in_wheel | in_sdist)
    assert not [name for name in in_wheel if name.startswith(("tests/", "docs/", "benchmarks/", "etc/"))]
    assert not [name for name in in_wheel | in_sdist if name.endswith((".pyc", "dropin.cache"))]


def test_every_module_is_in_the_wheel(built: tuple[Path, Path]) -> None:
    tracked = subprocess.run(["git", "ls-files", "polarismail"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no git here to say which files belong to the project")
    assert set(tracked.stdout.split()) <= set(zipfile.ZipFile(built[0]).namelist())


def test_twistd_lists_polarismail(installed: Path, tmp_path: Path) -> None:
    assert "polarismail" in run(installed / "twistd", "--help", cwd=tmp_path)
    shown = run(installed / "twistd", "polarismail", "--help", cwd=tmp_path)
    assert "--config" in shown and "clock-offset" not in shown


def test_command_works_with_the_core_alone(installed: Path, tmp_path: Path) -> None:
    listed = run(installed / "pip", "list", cwd=tmp_path).lower()
    assert "twisted" in listed
    for extra in ("psycopg", "pytest", "hypothesis", "sphinx", "ruff"):
        assert extra not in listed
    assert "Exit codes" in run(installed / "polarismail", "--help", cwd=tmp_path)
    run(installed / "python", "-m", "polarismail.demo", "--prepare-only", cwd=tmp_path)
    assert run(installed / "polarismail", "-c", "var/polarismail.toml", "check", cwd=tmp_path).endswith(": ok\n")
    accounts = run(installed / "polarismail", "-c", "var/polarismail.toml", "account", "list", cwd=tmp_path)
    assert "alice@example.test" in accounts


def test_server_runs_with_the_core_alone(installed: Path, tmp_path: Path) -> None:
    offset = free_offset()
    run(installed / "python", "-m", "polarismail.demo", "--prepare-only", "--port-offset", str(offset), cwd=tmp_path)
    demo = json.loads((tmp_path / "var" / "demo.json").read_text())
    name, password = demo["accounts"][0]["address"], demo["accounts"][0]["password"]
    context = ssl.create_default_context(cafile=str(tmp_path / demo["ca"]))
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = [installed / "twistd", "-n", "--pidfile=", "polarismail", "--config", "var/polarismail.toml"]
    with open(tmp_path / "output", "wb") as output:
        server = subprocess.Popen(words, cwd=tmp_path, env=clean, stdout=output, stderr=output)
    try:

        def submitted() -> bool:
            assert server.poll() is None, (tmp_path / "output").read_text()
            try:
                with smtplib.SMTP_SSL("localhost", demo["ports"]["submissions"], timeout=10, context=context) as client:
                    client.login(name, password)
                    client.sendmail(name, [name], f"From: {name}\r\nSubject: from the wheel\r\n\r\nHello\r\n")
            except ConnectionRefusedError:
                return False
            return True

        def read() -> int:
            client = poplib.POP3_SSL("localhost", demo["ports"]["pop3s"], timeout=10, context=context)
            client.user(name)
            client.pass_(password)
            count = client.stat()[0]
            client.quit()
            return count

        wait_until(submitted, "the installed server to take a message")
        assert wait_until(read, "the message over POP3") == 1
    finally:
        server.kill()
        server.wait()


def test_dependencies_have_lower_bounds_and_a_reason_each() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    reasons = (ROOT / "docs" / "dependencies.rst").read_text()
    for line in setup["options"]["install_requires"].split("\n"):
        if line:
            name, bound = line.split(" >= ")
            assert f"\n{name} " in reasons and bound in reasons, line
