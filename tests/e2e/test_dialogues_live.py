# SPDX-License-Identifier: MIT
"""Every dialogue that can be is played against the ports of a real twistd process, whole and in small pieces."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import evolve

from tests.dialogues.runner import Dialogue, LivePeer, Step, expand, load, play, to_octets
from tests.e2e.server import PASSWORD, Server, free_port, wait_until

FOLDER = Path(__file__).resolve().parent.parent / "dialogues"
# Those with `offers` want a listener that offers something else than its role does.
SMTP = [dialogue for dialogue in load(FOLDER / "smtp") if dialogue.live and "offers" not in dialogue.options]
# The others hold what cannot be had here: passwords inside base64, a database that is down, settings of their own. They are
# played on sockets in tests/serve/test_pop3_dialogues.py.
POP3 = [
    dialogue
    for dialogue in load(FOLDER / "pop3")
    if not dialogue.name.startswith("auth_")
    and "hard_errors" not in dialogue.options
    and not any("down" in step.text or "YW5u" in step.text for step in dialogue.steps)
]
# Listeners beside the harness's own: name, role, tls, plaintext_auth.
MORE = (
    ("mx-open", "mx", "starttls", "always"),
    ("submission-open", "submission", "starttls", "always"),
    ("lmtp", "lmtp", "none", "never"),
    ("mx-front", "mx", "none", "never"),
    ("pop3-open", "pop3", "none", "always"),
    ("pop3-stls-open", "pop3", "starttls", "always"),
)
# Dialogues try what is forbidden over and over; how much of it is allowed is tested in tests/serve/test_smtp_budgets.py.
PATIENT = """
[session]
soft_error_delay_seconds = 0.0
hard_errors = 1000
max_auth_failures = 1000
[pop3]
soft_error_delay_seconds = 0.0
hard_errors = 100
"""


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


VARIABLES = {
    "login": encoded(f"\0joe@local.test\0{PASSWORD}"),
    "name": encoded("joe@local.test"),
    "password": encoded(PASSWORD),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    ports = {name: free_port() for name, *_ in MORE}
    listeners = "".join(
        f'[[listeners]]\nname = "{name}"\nrole = "{role}"\ntls = "{tls}"\nplaintext_auth = "{plaintext}"\n'
        f'address = "127.0.0.1"\nport = {ports[name]}\n'
        + ('xclient_networks = ["127.0.0.0/8"]\n' if name == "mx-front" else "")
        for name, role, tls, plaintext in MORE
    )
    made = Server(
        tmp_path_factory.mktemp("dialogues") / "server",
        domains=("local.test",),
        accounts=("user@local.test", "joe@local.test", "anna@local.test"),
        extra=PATIENT + listeners,
    )
    made.ports |= ports
    try:
        yield made.start()
        assert "Traceback" not in made.twistd_log()
        assert not [event for event in made.events() if "Traceback" in str(event)]
    finally:
        made.kill()
        print(made.twistd_log()[-3000:])


def listener_of(dialogue: Dialogue) -> str:
    """The listener that is what the header asks for."""
    role = dialogue.options.get("listener", "mx")
    if dialogue.options.get("front_end") == "yes":
        return f"{role}-front"
    return f"{role}-open" if dialogue.options.get("auth") == "always" else role


@pytest.mark.parametrize("slice_octets", [0, 7])
@pytest.mark.parametrize("dialogue", SMTP, ids=lambda dialogue: dialogue.name)
def test_smtp(server: Server, dialogue: Dialogue, slice_octets: int) -> None:
    if slice_octets and not dialogue.sliced:
        pytest.skip("its outcome depends on what comes in one piece")
    port = server.ports[listener_of(dialogue)]
    if slice_octets and any("*" in step.text for step in dialogue.steps if step.kind in ("C:", "C+")):
        slice_octets = 1009  # pieces of seven would be tens of thousands
    with LivePeer("127.0.0.1", port, tls=server.tls) as peer:
        play(dialogue, peer, VARIABLES, slice_octets=slice_octets)


@pytest.mark.parametrize("dialogue", POP3, ids=lambda dialogue: dialogue.name)
def test_pop3(server: Server, dialogue: Dialogue) -> None:
    (account,) = [row for row in server.json("account", "list") if row["address"] == "anna@local.test"]
    maildir = server.directory / "mail" / account["maildir"]
    for part in ("new", "cur", "tmp"):
        (maildir / part).mkdir(parents=True, exist_ok=True)
    for path in files(maildir):
        path.unlink()
    for line in dialogue.options.get("mail", "").splitlines():
        name, _, octets = line.partition(" ")
        (maildir / "new" / name).write_bytes(to_octets(expand(octets, dialogue.variables)))
    implicit = dialogue.options.get("tls") == "implicit"
    name = "pop3s" if implicit else "pop3-open"
    if dialogue.options.get("tls") == "starttls":
        name = "pop3" if dialogue.options.get("plaintext_auth") == "never" else "pop3-stls-open"
    with LivePeer("127.0.0.1", server.ports[name], tls=server.tls, implicit=implicit) as peer:
        play(evolve(dialogue, steps=tuple(as_here(step) for step in dialogue.steps)), peer)
    if "left" in dialogue.options:
        left = dialogue.options["left"].split()
        wait_until(lambda: sorted(path.name.partition(":")[0] for path in files(maildir)) == left, "what is left")


def as_here(step: Step) -> Step:
    """The same step with this server's account and password."""
    text = step.text.replace("anna", "anna@local.test").replace("secret", PASSWORD)
    return evolve(step, text=text.replace("mail.example.org", "mail.here.test"))


def files(maildir: Path) -> list[Path]:
    """The messages of a maildir."""
    return [path for part in ("new", "cur") for path in (maildir / part).iterdir()]


def test_there_are_dialogues() -> None:
    assert len(SMTP) > 40 and len(POP3) > 15
