# SPDX-License-Identifier: MIT
"""Every POP3 dialogue holds against the real server, whole and octet by octet.

Header keys: `tls` and `plaintext_auth` of the listener; `mail: FILE OCTETS` (as on disk, with escapes; may be repeated);
`left: FILE...` (what is there when the dialogue is over); `hard_errors`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve

from polarismail.serve.pop3 import Pop3SessionSettings
from tests.dialogues.runner import Dialogue, LivePeer, expand, load, play, to_octets
from tests.serve.pop3_world import Pop3World

DIALOGUES = load(Path(__file__).resolve().parent.parent / "dialogues" / "pop3")


def perform(dialogue: Dialogue, folder: Path, slice_octets: int = 0) -> None:
    options = dialogue.options
    session = evolve(
        Pop3SessionSettings(), soft_error_delay_seconds=0.0, hard_errors=int(options.get("hard_errors", "100"))
    )
    tls = options.get("tls", "none")
    with Pop3World(folder, tls=tls, plaintext_auth=options.get("plaintext_auth", "always"), session=session) as world:
        for line in options.get("mail", "").splitlines():
            name, _, octets = line.partition(" ")
            world.put(name, to_octets(expand(octets, dialogue.variables)))
        context = world.client_tls() if tls != "none" else None
        with LivePeer("127.0.0.1", world.port, tls=context, implicit=world.implicit) as peer:
            play(dialogue, peer, slice_octets=slice_octets)
        if "left" in options:
            assert world.files() == options["left"].split()


@pytest.mark.parametrize("dialogue", DIALOGUES, ids=lambda dialogue: dialogue.name)
def test_dialogue(dialogue: Dialogue, tmp_path) -> None:
    perform(dialogue, tmp_path)


@pytest.mark.parametrize("dialogue", [d for d in DIALOGUES if d.sliced], ids=lambda dialogue: dialogue.name)
def test_dialogue_octet_by_octet(dialogue: Dialogue, tmp_path) -> None:
    perform(dialogue, tmp_path, 1)


def test_there_are_dialogues() -> None:
    assert len(DIALOGUES) > 15
