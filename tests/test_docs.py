# SPDX-License-Identifier: MIT
"""The documents name only what is there: tests, commands and their options, configuration keys, events, RFC references."""

from __future__ import annotations

import csv
import re
import smtplib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest

from polarismail.cli.main import command
from polarismail.config import Config
from polarismail.config_reader import is_table, keys_of
from polarismail.telemetry import EVENTS
from tests.rfc_sentences import TEXTS, WORDS, sentences, words_of

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.rst"))
# Issue 4 names them: each MUST and SHOULD of theirs that concerns a server has a row in docs/rfc-requirements.tsv.
RFCS = (5321, 1870, 2034, 2920, 3030, 3461, 6152, 6531, 7505, 9422)
REFERENCE = re.compile(r"RFC \d+(?: §[0-9A-Z]+(?:\.\d+)*)?")


@cache
def source(name: str) -> str:
    """The text of a file of the project."""
    return (ROOT / name).read_text()


@cache
def events() -> frozenset[str]:
    """Every name that an event of the log can have."""
    named = re.compile(r'event="([^"]+)"')
    found = (named.findall(path.read_text()) for path in (ROOT / "polarismail").rglob("*.py"))
    return frozenset(EVENTS).union(*found)


@cache
def rows() -> list[dict[str, str]]:
    """docs/rfc.tsv."""
    with (DOCS / "rfc.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@cache
def requirements() -> list[dict[str, str]]:
    """docs/rfc-requirements.tsv."""
    with (DOCS / "rfc-requirements.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def numbers_in(text: str) -> list[int]:
    """`1,3-5` is 1, 3, 4, 5; `-` is nothing."""
    spans = [span.partition("-") for span in text.split(",") if span != "-"]
    return [number for first, _, last in spans for number in range(int(first), int(last or first) + 1)]


def check_test(name: str) -> None:
    """A test file, a folder of tests, `file::function`, or a dialogue."""
    path, _, function = name.partition("::")
    assert (ROOT / path).exists(), name
    if function:
        assert re.search(rf"^(?:async )?def {function}\(", source(path), re.MULTILINE), name


def has_key(path: str) -> bool:
    """Whether the configuration has this key, as `table.key`."""
    hint: Any = Config
    for name in path.split("."):
        arguments = [one for one in getattr(hint, "__args__", ()) if one not in (type(None), Ellipsis)]
        if not is_table(hint) and len(arguments) == 1:
            hint = arguments[0]  # `X | None`, tuple[X, ...]
        if not is_table(hint) or name not in (keys := keys_of(hint)):
            return False
        hint = keys[name].hint
    return True


def check_command(words: list[str], page: Path) -> None:
    """Nouns and verbs exist, and so do the options."""
    found: click.Command = command
    seen: list[click.Command] = [found]
    at_noun = True
    for word in words:
        word = word.strip("[]()|,")
        if isinstance(found, click.Group) and at_noun and re.fullmatch(r"[a-z]+", word) and word in found.commands:
            found = found.commands[word]
            seen.append(found)
        elif isinstance(found, click.Group) and re.fullmatch(r"[a-z]{4,}", word):
            raise AssertionError(f"{page.name}: polarismail {' '.join(words)}: no {word!r}")
        elif word.startswith("-") and word not in ("-h", "--help"):
            options = [option for each in seen for parameter in each.params for option in parameter.opts]
            assert word in options, f"{page.name}: polarismail {' '.join(words)}: no option {word}"


def commands_of(text: str) -> Iterator[list[str]]:
    """Every `polarismail ...` of a page, in a literal or in a line of its own, without what a shell does after it."""
    for found in re.finditer(
        r"``polarismail ([^`]+)``|^\s+(?:.*\| )?(?:\S+/)?polarismail (?!on )(.+)$", text, re.MULTILINE
    ):
        yield found[1].split() if found[1] else re.split(r"[;>#]| \| ", found[2].split("``")[0])[0].split()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_names_only_what_is_there(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"tests/[\w/]+(?:\.py(?:::\w+)?|\.dlg)", text):
        check_test(name)
    for key in re.findall(r":key:`([^`]+)`", text):
        assert has_key(key), f"no key {key}"
    for event in re.findall(r":event:`([^`]+)`", text):
        assert event in events(), f"no event {event}"
    for name in re.findall(r"``(polarismail/[\w/.]+\.py|etc/[\w.]+|docs/[\w/.]+|benchmarks/[\w.]+)``", text):
        assert (ROOT / name).exists(), name
    for words in commands_of(text):
        check_command(words, page)


# The numbered rows of HOSTILE.md, and the sentences of its sections 2, 4 and 5, in the order of the page.
HOSTILE = [
    *(f"0.{number}" for number in range(1, 17)),
    *(f"F{number}" for number in range(1, 15)),
    *(f"2.{number}" for number in range(1, 9)),
    *(f"A{number}" for number in range(1, 10)),
    *(f"4.{number}" for number in range(1, 8)),
    *(f"5.{number}" for number in range(1, 11)),
    *(f"E{number}" for number in range(1, 14)),
]


def test_every_row_of_the_hostile_list_has_its_reaction_and_its_test() -> None:
    rows = re.findall(
        r"^   \* - (\d\.\d+|[FAE]\d+)\n     - (.+)\n     - (.+)\n     -(.*)$", source("docs/hostile.rst"), re.MULTILINE
    )
    assert list(dict.fromkeys(row[0] for row in rows)) == HOSTILE  # some numbers hold several inputs
    for number, _, reaction, tests in rows:
        later = "*not here*" in reaction or re.search(r"row \w\.\d", reaction)
        assert "``tests/" in tests or later, f"{number}: neither a test nor a reason"


def test_the_commands_are_all_described() -> None:
    text = source("docs/commands.rst")
    for noun, found in command.commands.items():
        verbs = [f"{noun} {verb}" for verb in found.commands] if isinstance(found, click.Group) else [noun]
        for verb in verbs:
            assert f"polarismail {verb}" in text, verb


def test_the_events_are_all_described() -> None:
    described = set(re.findall(r":event:`([^`]+)`", source("docs/operations.rst")))
    assert events() == described & events()


def test_every_rfc_of_the_sources_is_in_the_table() -> None:
    table = {row["reference"].split(" §")[0] for row in rows()}
    sources = "\n".join(path.read_text() for path in (ROOT / "polarismail").rglob("*.py"))
    # Named where it is explained why something is not done.
    assert {found.split(" §")[0] for found in REFERENCE.findall(sources)} - table <= {"RFC 3030"}


def test_every_row_of_the_rfc_table_holds() -> None:
    assert '\t"' not in source("docs/rfc.tsv"), "a quote at the start of a cell begins a quoted one: Sphinx stops there"
    for row in rows():
        references = REFERENCE.findall(source(f"polarismail/{row['code']}"))
        number, _, section = row["reference"].partition(" §")
        named = row["reference"] in references or (section and f"§{section}" in source(f"polarismail/{row['code']}"))
        assert named and number in {each.split(" §")[0] for each in references}, row
        check_test(row["test"])


# -- the requirements of RFCs ------------------------------------------------------------------------------------------


def test_every_requirement_is_well_formed() -> None:
    assert requirements()
    for row in requirements():
        assert None not in row and None not in row.values(), f"{row}: eight columns"
        assert all(value == value.strip() for value in row.values()), row
        assert row["RFC"] in {str(number) for number in RFCS} and row["section"] and row["requirement"], row
        assert re.fullmatch(r"-|\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*", row["sentences"]), row
        level = rf"(?:{WORDS}|MAY|{WORDS.lower()}|may)"
        assert re.fullmatch(rf"-|{level}(?:/{level})*", row["level"]), row
        assert row["status"] in ("met", "not met", "not ours"), row


def test_what_is_met_has_tests_and_what_is_not_has_a_reason() -> None:
    for row in requirements():
        tests = row["test"].split()
        for name in tests:
            assert name.endswith(".dlg") or "::" in name, row
            check_test(name)
        if row["status"] == "met":
            assert tests, row
        else:
            assert row["remark"], row


@pytest.mark.parametrize("number", RFCS)
def test_every_sentence_that_requires_something_is_accounted_for(number: int) -> None:
    found = sentences(number)
    if found is None:
        pytest.skip(f"the text of RFC {number} is not in {TEXTS}")
    if all(row["sentences"] == "-" for row in requirements() if row["RFC"] == str(number)):
        pytest.skip(f"the rows of RFC {number} were written without its text")
    told: dict[str, set[int]] = {}
    for row in requirements():
        if row["RFC"] == str(number):
            places = numbers_in(row["sentences"])
            assert places, f"{row}: which sentences?"
            told.setdefault(row["section"], set()).update(places)
            said = {word for place in places for word in words_of(found.get(row["section"], [])[place - 1])}
            assert set(row["level"].split("/")) <= said, row
    assert told == {section: set(range(1, len(of) + 1)) for section, of in found.items()}


def test_the_page_shows_the_requirements_of_each_rfc() -> None:
    assert [int(number) for number in re.findall(r"^\.\. requirements:: (\d+)$", source("docs/rfc.rst"), re.M)] == [
        *RFCS
    ]


def test_the_embedding_example_runs() -> None:
    example = subprocess.Popen(
        [sys.executable, str(DOCS / "examples" / "embedding.py"), "0"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert example.stdout is not None
        port = int(example.stdout.readline().removeprefix("listening on "))
        with smtplib.SMTP("127.0.0.1", port, timeout=10) as client:
            client.ehlo()
            assert client.mail("ann@example.org")[0] == 530
            client.login("ann", "secret")
            client.sendmail("ann@example.org", ["bob@example.org"], "Subject: hi\r\n\r\nHello\r\n")
            assert client.mail("ann@example.org")[0] == 250
            assert client.rcpt("bob@example.com")[0] == 550
        assert example.stdout.readline() == "for bob@example.org: 4 lines\n"
    finally:
        example.kill()
        example.wait()
