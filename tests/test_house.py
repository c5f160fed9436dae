# SPDX-License-Identifier: MIT
"""The house checks itself: arrows, lengths, first lines, references, and modules that leave the reactor alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "polarismail"
# docs/architecture.rst draws this. Rooms in one pair of parentheses never import one another.
LAYERS = ("values", "wire", "message", "store", "net", "auth", "policy", "relay serve web")
PURE = ("values", "wire", "message")
# Twisted is not all I/O, but none of it belongs in a pure room.
IMPURE = re.compile(r"(twisted|os|socket|asyncio|sqlalchemy|threading|subprocess)(\.|$)")
CLOCKS = re.compile(r"\b(time\.time|monotonic|perf_counter|localtime|datetime\.now|utcnow|time_ns)\b")
MAX_LINES = 500
SOURCES = sorted(PACKAGE.rglob("*.py"))


def room_of(module: str) -> str | None:
    """The room of a dotted module name: `polarismail.wire.framing` is in `wire`."""
    parts = module.split(".")
    return parts[1] if parts[0] == "polarismail" and len(parts) > 1 else None


def rank(module: str) -> int | None:
    """How far right the module's room stands, or None for the wiring modules at the top."""
    room = room_of(module)
    for at, layer in enumerate(LAYERS):
        if room in layer.split():
            return at
    return None


def name_of(path: Path) -> str:
    """The dotted name of a source file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module == "polarismail":
                yield from (f"polarismail.{alias.name}" for alias in node.names)


# What makes code, or a process, of text (HOSTILE E12): a message must never come near it.
RUNS = {"eval", "exec", "compile", "__import__", "system", "popen"}
RUNNING = {"pickle", "marshal", "shelve", "yaml", "xmlrpc"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_runs_what_it_reads(path: Path) -> None:
    assert not RUNNING.intersection(name.split(".")[0] for name in imports(path))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            assert not (isinstance(node.func, ast.Name) and node.func.id in RUNS), f"{path}:{node.lineno}"
            assert not any(keyword.arg == "shell" for keyword in node.keywords), f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_arrows_point_left(path: Path) -> None:
    mine = rank(name_of(path))
    if mine is None:
        return
    for module in imports(path):
        if not module.startswith("polarismail."):
            continue
        theirs = rank(module)
        assert theirs is not None or module == "polarismail.__version__", f"{path} reaches up to {module}"
        assert theirs <= mine, f"{path} reaches right to {module}"
        if theirs == mine:
            assert room_of(module) == room_of(name_of(path)), f"{path} reaches across to {module}"


@pytest.mark.parametrize("path", [p for p in SOURCES if room_of(name_of(p)) in PURE], ids=name_of)
def test_pure_rooms_do_no_input_or_output(path: Path) -> None:
    for module in imports(path):
        assert not IMPURE.match(module), f"{path} is pure, but imports {module}"
    assert not CLOCKS.search(path.read_text()), f"{path} is pure, but reads a clock: time is an argument"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_file_is_small_and_opens_with_a_promise(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# SPDX-License-Identifier: MIT\n"), f"{path}: no SPDX line"
    assert text.count("\n") <= MAX_LINES, f"{path}: over {MAX_LINES} lines; which two rooms is it?"
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring and len(docstring.split("\n")[0]) > 20, f"{path}: no docstring that promises something"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_is_left_undone(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert not re.search(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b", line), f"{path}:{number}: {line.strip()}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_rfc_references_can_be_searched_for(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for found in re.finditer(r"\bRFC[ -]?(\d+)([ ,]+(?:section|sec\.?|s\.)[ ]?[\d.]+)?", line):
            assert found[0].startswith("RFC ") and not found[2], f"{path}:{number}: write RFC {found[1]} §x.y"


def test_only_the_smtp_factory_needs_a_reactor() -> None:
    """Importing any other module installs no reactor: an embedding program chooses its own."""
    modules = [name_of(path).removesuffix(".__init__") for path in SOURCES]
    modules = [m for m in modules if m != "polarismail.serve.smtp" and ".migrations" not in m]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'twisted.internet.reactor' not in sys.modules, name + ' installs a reactor'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_no_shell_no_pickle() -> None:
    """Security habits that a reader should not have to look for."""
    for path in SOURCES:
        text = path.read_text()
        assert "shell=True" not in text and "os.system(" not in text, path
        assert not any(module in ("pickle", "marshal", "shelve") for module in imports(path)), path
