# SPDX-License-Identifier: MIT
"""The sentences of an RFC that require something, by section: what docs/rfc-requirements.tsv must account for.

    python -m tests.rfc_sentences 5321        each with its section and its number within it, as the table counts them

Texts are not kept in the project. They are looked for in $RFC_TEXTS, or where this project's machines have them.
"""

from __future__ import annotations

import os
import re
import sys
from functools import cache
from pathlib import Path

TEXTS = Path(os.environ.get("RFC_TEXTS", "/work/shared/rfc"))
WORDS = r"(?:MUST|SHALL|SHOULD|REQUIRED|RECOMMENDED)(?: NOT)?"
# Written before RFC 2119 had set the words in capitals, or without regard to it.
LOWER_CASE = frozenset({1870, 2034})

_WORD = re.compile(rf"\b{WORDS}\b")
_WORD_OF_OLD = re.compile(r"\b(?:must|shall|should)(?: not)?\b", re.IGNORECASE)
_HEAD_OR_FOOT = re.compile(r"RFC \d+ .*\d{4}\s*|\S.*\[Page \d+\]\s*")
_HEADING = re.compile(r"(?:Appendix )?((?:\d+|[A-Z])(?:\.\d+)*)[. ] *\S")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[\"'(A-Z0-9<])")
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|etc|cf|vs)\.")
_ABOUT_THE_WORDS = re.compile(r"(?:key words|terms) \"MUST\"|\"MUST\", \"SHOULD\"")


def text_of(number: int) -> str | None:
    """The text of an RFC, or None where there is none."""
    path = TEXTS / f"rfc{number}.txt"
    return path.read_text("utf-8", "replace") if path.is_file() else None


@cache
def sentences(number: int) -> dict[str, list[str]] | None:
    """Section -> its sentences that require something, in their order; None where the text is not at hand."""
    text = text_of(number)
    if text is None:
        return None
    word = _WORD_OF_OLD if number in LOWER_CASE else _WORD
    found: dict[str, list[str]] = {}
    section = "0"
    for paragraph in _paragraphs(text):
        heading = _HEADING.match(paragraph)
        if heading:
            section = heading[1]
        joined = _ABBREVIATION.sub(lambda it: it[0].replace(".", "\0"), " ".join(paragraph.split()))
        for sentence in _SENTENCE_END.split(joined):
            if word.search(sentence) and not _ABOUT_THE_WORDS.search(sentence):
                found.setdefault(section, []).append(sentence.replace("\0", "."))
    return found


def words_of(sentence: str) -> set[str]:
    """The levels that it has, as they are written; MUST NOT is not MUST."""
    return set(_WORD.findall(sentence)) | {word for word in _WORD_OF_OLD.findall(sentence) if word.islower()}


def _paragraphs(text: str) -> list[str]:
    """Runs of lines without an empty one between them; a paragraph that a page break cuts is one."""
    lines: list[str] = []
    for page in text.split("\f"):
        kept = [line.rstrip() for line in page.split("\n") if not _HEAD_OR_FOOT.fullmatch(line)]
        while kept and not kept[0]:
            del kept[0]
        while kept and not kept[-1]:
            del kept[-1]
        goes_on = lines and kept and not lines[-1].endswith((".", ":", ";")) and not _HEADING.match(kept[0])
        lines += kept if goes_on else ["", *kept]
    return re.split(r"\n\n+", "\n".join(lines))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for section, of_section in (sentences(int(argument)) or {}).items():
            for place, sentence in enumerate(of_section, 1):
                print(f"{argument} {section} {place}: {sentence}")
