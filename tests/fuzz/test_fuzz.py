# SPDX-License-Identifier: MIT
"""The fuzz targets in short: every seed and some hundred inputs of Hypothesis's; and each target notices what it is for."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polarismail.values.address import Mailbox
from polarismail.values.reply import OK
from polarismail.wire import smtp_server
from polarismail.wire.framing import DotDecoder
from polarismail.wire.proxy_protocol import ProxyParser
from polarismail.wire.smtp_chunks import Chunks
from polarismail.wire.smtp_client import ReplyReader, Transaction
from polarismail.wire.smtp_events import Data, EndOfData
from polarismail.wire.smtp_server import SmtpServer
from tests.fuzz import session
from tests.fuzz.targets import TARGETS, seeds, words

SHORT = {name: [octets for octets in seeds(name) if len(octets) < 2000] for name in TARGETS}
_WORDS = {name: words(name) for name in TARGETS}


@pytest.mark.parametrize("name", TARGETS)
def test_every_seed_holds(name: str) -> None:
    assert len(SHORT[name]) > 10
    for octets in SHORT[name]:
        TARGETS[name](octets)


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_like_the_seeds_hold(name: str) -> None:
    """A seed, with words of the dictionary, octets and parts of other seeds put over and between it."""
    seed = st.sampled_from(SHORT[name]).filter(lambda octets: len(octets) < 400)
    patch = st.sampled_from(_WORDS[name]) | st.binary(min_size=1, max_size=8) | seed.map(lambda octets: octets[20:120])
    patches = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 12), patch), max_size=6)

    @settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck), database=None)
    @given(seed, patches)
    def hold(octets: bytes, patches: list[tuple[int, int, bytes]]) -> None:
        for at, over, patch in patches:
            octets = octets[:at] + patch + octets[at + over :]
        TARGETS[name](octets)

    hold()


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_left_behind(name: str) -> None:
    """Objects do not grow from one round of the same inputs to the next: an hour of fuzzing is no leak."""
    counts = []
    for _ in range(3):
        for octets in SHORT[name]:
            TARGETS[name](octets)
        gc.collect()
        counts.append(len(gc.get_objects()))
    assert counts[2] - counts[1] < 20


# -- each target notices what it is for ------------------------------------------------------------------------------


def finds(name: str) -> bool:
    """Whether a seed breaks a promise now."""
    for octets in SHORT[name]:
        try:
            TARGETS[name](octets)
        except Exception:
            return True
    return False


def lenient_end(self: DotDecoder, octets: bytes) -> bytes:
    """LF "." LF ends the content."""
    if b"\n.\n" in octets:
        before, _, self.rest = octets.partition(b"\n.\n")
        return before
    return _RECEIVE(self, octets)


def forgets_a_dot(self: DotDecoder, octets: bytes) -> bytes:
    """Dot-stuffing is undone only where a piece does not begin with it."""
    return _RECEIVE(self, octets[1:] if octets[:2] == b".." else octets)


def two_replies(self: SmtpServer, reply: Any) -> bytes:
    """A reply too many at the end of data."""
    owed = self._owed
    octets = _ANSWER(self, reply)
    return octets + OK.octets if isinstance(owed, EndOfData) else octets


def believes_early_talk(self: SmtpServer, owed: Any, reply: Any) -> bool:
    """What stands behind DATA is taken for content, if it comes before the reply."""
    waiting = self._lines.take()
    followed = _DATA(self, owed, reply)
    self._lines.receive(waiting)
    return followed


def yes_to_all(self: Transaction, reply: Any) -> None:
    """Whatever was said, the rest of the recipients were taken."""
    self.verdicts = [OK if verdict is None else verdict for verdict in self.verdicts]


def loses_a_line(self: ReplyReader, octets: bytes) -> None:
    """Half a line is forgotten when the other half comes."""
    self._buffer, self._at = octets, 0


def greedy(self: ProxyParser, octets: bytes) -> int:
    """Takes all that came with the header."""
    return max(_HEADER(self, octets), 0 if self.result is None else len(octets))


def takes_one_too_few(self: Chunks, octets: bytes) -> bytes:
    """A chunk ends an octet early when it has dots."""
    content = _CHUNK(self, octets)
    if b"." in octets and self.left == 0:
        content = content[:-1]
    return content


_HEADER, _CHUNK = ProxyParser.receive, Chunks.receive
_RECEIVE, _ANSWER, _DATA = DotDecoder.receive, SmtpServer.answer, SmtpServer._follow_data


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "fault"),
    [
        ("framing", DotDecoder, "receive", lenient_end),
        ("session", DotDecoder, "receive", lenient_end),
        ("session", DotDecoder, "receive", forgets_a_dot),
        ("session", SmtpServer, "answer", two_replies),
        ("framing", ReplyReader, "receive", loses_a_line),
        ("client", ReplyReader, "receive", loses_a_line),
        ("client", Transaction, "decide_rest", yes_to_all),
        ("proxy", ProxyParser, "receive", greedy),
        ("session", Chunks, "receive", takes_one_too_few),
        ("grammar", Mailbox, "__str__", lambda self: f"{self.local}@{self.domain}."),
    ],
)
def test_a_fault_is_found(
    name: str, owner: type, attribute: str, fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not finds(name)
    monkeypatch.setattr(owner, attribute, fault)
    assert finds(name)


def test_early_talk_that_is_believed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [b"EHLO x\r\n", b"MAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\ntext\r\n.\r\nNOOP\r\n"]
    octets = session.write({}, turns, cuts=0)
    session.check(octets)
    monkeypatch.setitem(smtp_server._FOLLOW, Data, believes_early_talk)
    with pytest.raises(AssertionError):
        session.check(octets)


# -- found by fuzzing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "turns"),
    [
        # A command that must be waited for, refused, with others behind it that came a moment later.
        ({}, [b"DATA\r\nNOOP\r\n"]),
        ({}, [b"EHLO x\r\n", b"STARTTLS x\r\nNOOP\r\n"]),
        ({}, [b"EHLO\r\nNOOP\r\n"]),
        # A chunk whose BDAT has a word that is none, and octets that are no UTF-8.
        ({}, [b"EHLO x\r\n", b"MAIL FROM:<>\r\nRCPT TO:<a@b.example>\r\nBDAT 6 \xb4\xc3ST\r\nQUIT\r\nNOOP\r\n"]),
    ],
)
def test_what_was_found_holds_however_it_is_cut(options: dict[str, str], turns: list[bytes]) -> None:
    for cuts in range(64):
        session.check(session.write(options, turns, cuts))


def test_content_beyond_every_limit_ends_the_session_in_any_slicing() -> None:
    for over in range(-8, 9):
        script = session.Script(
            settings=session.ServerSettings(max_message_octets=20, max_discarded_octets=20),
            tls="none",
            auth="never",
            clear_in_tls=False,
            front_end=False,
            verdicts=0,
            cuts=0,
            turns=(
                b"",
                b"EHLO x\r\n",
                b"MAIL FROM:<>\r\nRCPT TO:<a@b.example>\r\nDATA\r\n",
                b"x" * (35 + over) + b"\r\n.\r\nNOOP\r\n",
            ),
        )
        whole = session.Playing(script, slices=False, holds=False).play()
        sliced = session.Playing(script, slices=True, holds=False).play()
        assert whole.said == sliced.said
        assert whole.closed is (over > 0)


@pytest.mark.parametrize("limits", [(200, 20, 20), (20, 200, 20), (200, 200, 20)])
def test_limits_the_wrong_way_round_still_do_not_depend_on_slices(limits: tuple[int, int, int]) -> None:
    line = b"AUTH PLAIN " + b"A" * 100 + b"\r\nNOOP\r\n"
    found = []
    for size in (len(line), 1, 7):
        reader = session.SmtpServer(
            session.ServerSettings(
                max_command_octets=limits[0], max_auth_octets=limits[1], max_discarded_line_octets=limits[2]
            ),
            tls_available=False,
            auth_mechanisms=lambda _: ("PLAIN",),
        )
        reader.answer(OK)
        events = []
        for at in range(0, len(line), size):
            reader.receive(line[at : at + size])
            while (event := reader.next_event()) is not None:
                events.append(event)
                reader.answer(getattr(event, "reply", OK))
        found.append(events)
    assert found[0] == found[1] == found[2]
