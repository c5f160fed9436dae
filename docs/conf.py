# SPDX-License-Identifier: MIT
"""Sphinx: `make docs` builds docs/_build/html, and a warning is an error."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

project = "polarismail"
author = "the polarismail authors"
project_copyright = "the polarismail authors; MIT licence"
_package = (Path(__file__).parent.parent / "polarismail" / "__init__.py").read_text()
release = version = re.findall(r'__version__ = "([^"]+)"', _package)[0]

exclude_patterns = ["_build", "examples"]
html_theme = "alabaster"
html_show_sourcelink = False
highlight_language = "text"
# A key of the configuration, and an event of the log: tests/test_docs.py looks each of them up.
rst_prolog = """
.. role:: key(literal)
.. role:: event(literal)
"""


class Requirements(SphinxDirective):
    """The rows of rfc-requirements.tsv: with the number of an RFC, its own; without one, how many there are of each kind."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        path = Path(__file__).parent / "rfc-requirements.tsv"
        self.env.note_dependency(str(path))
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        if self.arguments:
            return self._table([18, 8, 32, 10, 40, 34], _rows_of(self.arguments[0], rows))
        return self._table([20, 20, 20, 20], _counts_of(rows))

    def _table(self, widths: list[int], rows: list[list[Any]]) -> list[nodes.Node]:
        text = io.StringIO()
        csv.writer(text, quoting=csv.QUOTE_ALL).writerows(rows)
        body = "".join(f"   {line}\n" for line in text.getvalue().splitlines())
        head = f".. csv-table::\n   :header-rows: 1\n   :widths: {' '.join(map(str, widths))}\n\n"
        return self.parse_text_to_nodes(head + body)


def _rows_of(number: str, rows: list[dict[str, str]]) -> list[list[Any]]:
    table: list[list[Any]] = [["section", "level", "requirement", "status", "tests", "remark"]]
    for row in rows:
        if row["RFC"] == number:
            place = f"§{row['section']}" + (f" ({row['sentences']})" if row["sentences"] != "-" else "")
            tests = " ".join(f"``{test}``" for test in row["test"].split())
            table.append([place, row["level"], row["requirement"], row["status"], tests, row["remark"]])
    return table


def _counts_of(rows: list[dict[str, str]]) -> list[list[Any]]:
    kinds = ("met", "not met", "not ours")
    numbers = list(dict.fromkeys(row["RFC"] for row in rows))
    counts = Counter((row["RFC"], row["status"]) for row in rows) + Counter(("all", row["status"]) for row in rows)
    table: list[list[Any]] = [["RFC", *kinds]]
    return table + [[number, *(counts[number, kind] for kind in kinds)] for number in [*numbers, "all"]]


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_directive("requirements", Requirements)
