# SPDX-License-Identifier: MIT
"""Every SMTP dialogue holds against the pure engine, whole and octet by octet."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dialogues.runner import Dialogue, load, parse_dialogue, play
from tests.dialogues.smtp_peer import EnginePeer

DIALOGUES = load(Path(__file__).resolve().parent.parent / "dialogues" / "smtp")


@pytest.mark.parametrize("dialogue", DIALOGUES, ids=lambda dialogue: dialogue.name)
def test_dialogue(dialogue: Dialogue) -> None:
    play(dialogue, EnginePeer(dialogue.options))


@pytest.mark.parametrize("octets", [1, 3])
@pytest.mark.parametrize("dialogue", [d for d in DIALOGUES if d.sliced], ids=lambda dialogue: dialogue.name)
def test_dialogue_in_slices(dialogue: Dialogue, octets: int) -> None:
    play(dialogue, EnginePeer(dialogue.options), slice_octets=octets)


def test_there_are_dialogues() -> None:
    assert len(DIALOGUES) > 20


@pytest.mark.parametrize("text", ["---\n", "C: x\n", "a: b\n---\nX: y\n", "a: b\n"])
def test_a_broken_dialogue_is_named(text: str) -> None:
    with pytest.raises(ValueError):
        parse_dialogue(text, "broken")


def test_a_dialogue_that_does_not_hold_fails() -> None:
    for steps in ("S: 221*", "S: 220 *\nS!", "S-", "S: 220 *\nC: NOOP\nS~ 500", "S: 220 *\nC: NOOP\nS-"):
        with pytest.raises(AssertionError):
            play(parse_dialogue(f"---\n{steps}", "wrong"), EnginePeer({}))
