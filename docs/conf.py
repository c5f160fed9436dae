# SPDX-License-Identifier: MIT
"""Sphinx: `make docs` builds docs/_build/html, and a warning is an error."""

from __future__ import annotations

import re
from pathlib import Path

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
