# SPDX-License-Identifier: MIT
"""Requirements of RFCs that belong to no room's other tests; docs/rfc-requirements.tsv names them."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
from twisted.internet.defer import Deferred, succeed

from polarismail.config import Config, load
from polarismail.message.inspection import inspect
from polarismail.policy.relaying import expand_recipient
from polarismail.relay.clients import ConnectFailed
from polarismail.relay.mx import MxSettings, find_exchangers
from polarismail.relay.transactions import plan_recipients, plan_sender
from polarismail.store.interfaces import QueuedMessage, QueuedRecipient, Refused, Resolution, Submission, Target
from polarismail.values import reply as replies
from polarismail.values.address import Mailbox, parse_path
from polarismail.values.envelope import LOCAL, DsnRequest, Envelope, Recipient, SessionFacts
from polarismail.values.errors import ConfigError, NoSuchName
from polarismail.values.reply import Reply, queued_as
from polarismail.wire.smtp_client import Finished, SendContent, SmtpClient, Transaction
from polarismail.wire.smtp_server import Rcpt, ServerSettings
from tests.dialogues.smtp_peer import EnginePeer
from tests.reactor import run
from tests.relay.scripted import Peer, Server
from tests.relay.test_session import message, no_read, send_once
from tests.serve.test_reception import END, incoming, reception
from tests.serve.test_reception import Draft as SpoolDraft
from tests.wire.test_smtp_client import begun, introduced

NAMED = {name: value for name, value in vars(replies).items() if isinstance(value, Reply)}
# RFC 5321 §4.2.3; RFC 3207, RFC 4954 (AUTH, STARTTLS); RFC 7504.
KNOWN_CODES = frozenset(
    {
        211,
        214,
        220,
        221,
        250,
        251,
        252,
        354,
        421,
        450,
        451,
        452,
        455,
        500,
        501,
        502,
        503,
        504,
        550,
        551,
        552,
        553,
        554,
        555,
    }
    | {235, 334, 454, 530, 534, 535, 538}
    | {521, 556}
)


# -- what we answer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
def test_replies_have_a_known_code_and_a_text(name: str) -> None:
    reply = NAMED[name]
    assert reply.code in KNOWN_CODES
    assert reply.text and reply.text.isascii(), "RFC 6531 §3.7.4.2 allows no more to who has not asked for it"
    assert reply.code not in (251, 551), "nobody's new address is told"


@pytest.mark.parametrize("name", NAMED)
def test_every_reply_that_may_have_an_enhanced_status_has_one_of_its_class(name: str) -> None:
    reply = NAMED[name]
    if reply.code == 354:
        assert reply.status is None
    else:
        assert reply.status is not None and reply.status[0] == reply.code // 100


@pytest.mark.parametrize("code", [0, 99, 150, 199, 600, 999, 1000])
def test_no_reply_can_have_another_first_digit(code: int) -> None:
    with pytest.raises(ValueError, match="no SMTP reply code"):
        Reply(code, None, "x")


def test_code_and_status_stand_in_each_line_of_a_reply() -> None:
    assert Reply(550, (5, 7, 1), "no\nand never").octets == b"550-5.7.1 no\r\n550 5.7.1 and never\r\n"
    with pytest.raises(ValueError, match=r"5\.x\.y"):
        Reply(550, (4, 7, 1), "no")
    assert all(len(line) <= 510 for line in Reply(550, (5, 7, 1), "x" * 9000).octets.split(b"\r\n"))
    assert queued_as("q1").octets == Reply(250, (2, 0, 0), "Queued as q1").octets


def test_enhanced_statuses_do_not_wait_for_ehlo() -> None:
    """RFC 2034 §4: before EHLO, and behind HELO, too."""
    peer = EnginePeer({})
    peer.read_line()
    for line, first in ((b"NOOP", b"250 2."), (b"FOO", b"500 5."), (b"DATA", b"503 5."), (b"HELO x", b"250 test")):
        peer.send(line + b"\r\n")
        assert (peer.read_line() or b"").startswith(first)
    peer.send(b"MAIL FROM:<a@b.example>\r\n")
    assert (peer.read_line() or b"").startswith(b"250 2.1.0 ")


def test_a_transaction_has_room_for_a_hundred_recipients() -> None:
    """RFC 5321 §4.5.3.1.8. A report has one recipient, so the null reverse-path has room for a few."""
    assert ServerSettings().max_recipients >= 100
    peer = EnginePeer({"max_recipients": "100"})
    peer.send(b"EHLO x\r\n")
    peer.send(b"MAIL FROM:<a@b.example>\r\n" + b"".join(b"RCPT TO:<%d@c.example>\r\n" % n for n in range(101)))
    assert sum(isinstance(event, Rcpt) for event in peer.events) == 100
    peer.send(b"DATA\r\n")
    peer.send(b".\r\n")
    assert peer.messages == [b""]


# -- what we wait for --------------------------------------------------------------------------------------------------


def test_waits_are_as_long_as_they_should_be() -> None:
    """RFC 5321 §4.5.3.2, but for the greeting, which has a row of its own in the table."""
    settings = Config()
    client = settings.relay.client
    assert client.mail_seconds >= 300 and client.rcpt_seconds >= 300
    assert client.data_seconds >= 120 and client.block_seconds >= 180 and client.final_seconds >= 600
    assert settings.session.command_seconds >= 300
    assert settings.spool.expires_seconds >= 4 * 86400


@pytest.mark.parametrize("table", ["client", "schedule"])
def test_each_wait_can_be_configured(tmp_path: Path, table: str) -> None:
    kind = type(getattr(Config().relay, table))
    waits = [field.name for field in attrs.fields(kind) if field.name.endswith("_seconds")]
    assert len(waits) >= 8
    path = tmp_path / "polarismail.toml"
    path.write_text(f"[relay.{table}]\n" + "".join(f"{name} = 7.0\n" for name in waits))
    read = getattr(load(str(path)).relay, table)
    assert {getattr(read, name) for name in waits} == {7.0}


# -- what we call ourselves --------------------------------------------------------------------------------------------


def test_a_host_without_a_name_may_go_by_its_address(tmp_path: Path) -> None:
    path = tmp_path / "polarismail.toml"
    path.write_text('hostname = "[192.0.2.25]"\n')
    hostname = load(str(path)).hostname
    client = SmtpClient(hostname)
    client.receive(b"220 hi\r\n")
    client.next_event()
    client.ehlo()
    assert client.output() == b"EHLO [192.0.2.25]\r\n"


@pytest.mark.parametrize("name", ["my_host.example.org", "host.exa_mple.org", "m\u00fcller.example"])
def test_our_own_name_has_letters_digits_and_hyphens_only(tmp_path: Path, name: str) -> None:
    path = tmp_path / "polarismail.toml"
    path.write_text(f'hostname = "{name}"\n')
    with pytest.raises(ConfigError, match="hostname: "):
        load(str(path))


# -- what we say to next hops ------------------------------------------------------------------------------------------


def test_nothing_is_said_before_the_greeting_has_come_whole() -> None:
    early: list[Any] = []

    def script(peer: Peer) -> None:
        early.append(select.select([peer._socket], [], [], 0.1)[0])
        peer.say(b"220-a moment\r\n")
        early.append(select.select([peer._socket], [], [], 0.1)[0])
        peer.greet(b"8BITMIME")
        peer.take()
        assert peer.line() == b"QUIT"

    with Server(script) as server:
        assert run(send_once, server, message(), no_read)[0].code == 250
    assert early == [[], []]


def test_quit_is_the_last_word_and_is_waited_for() -> None:
    said: list[bytes] = []

    def script(peer: Peer) -> None:
        peer.greet(b"8BITMIME")
        peer.take()
        said.append(peer.line())
        time.sleep(0.05)
        peer.say(b"221 bye\r\n")

    with Server(script) as server:
        run(send_once, server, message(), no_read)
    assert said == [b"QUIT"]


def test_keywords_are_read_in_any_case() -> None:
    client = introduced(b"250-mx\r\n250-Pipelining\r\n250-SmtpUTF8 and more\r\n250 size 1000\r\n")
    assert client.extensions == {"PIPELINING": "", "SMTPUTF8": "and more", "SIZE": "1000"}


def greets(*answers: bytes) -> Callable[[Peer], bytes]:
    """Answer the connection, EHLO, and what comes then; return what comes at last."""

    def script(peer: Peer) -> bytes:
        for answer in answers:
            peer.say(answer + b"\r\n")
            said = peer.line()
        return said

    return script


@pytest.mark.parametrize(
    ("answers", "options"),
    [
        ([b"554 no service here"], {}),
        ([b"451 not now"], {}),
        ([b"220 hi", b"550 not you", b"550 nor so"], {}),
        ([b"220 hi", b"250 mx"], {"tls": "required"}),
        ([b"220 hi", b"250 mx"], {"credentials": ("ann", "secret"), "tls": "none"}),
        ([b"220 hi", b"250-mx\r\n250 AUTH PLAIN", b"535 5.7.8 no"], {"credentials": ("ann", "secret"), "tls": "none"}),
    ],
)
def test_who_refuses_a_session_is_left_with_quit(answers: list[bytes], options: dict[str, Any]) -> None:
    """RFC 5321 §3.1, §4.1.1.10."""
    last: list[bytes] = []

    def script(peer: Peer) -> None:
        last.append(greets(*answers)(peer))
        peer.say(b"221 bye\r\n")

    with Server(script) as server, pytest.raises(ConnectFailed):
        run(send_once, server, message(), no_read, **options)
    assert last == [b"QUIT"]


@pytest.mark.parametrize(
    ("mail", "rcpt", "verdict"),
    [
        (b"299 what", b"250 ok", None),
        (b"250", b"250 ", None),
        (b"250 ok", b"259 what", None),
        (b"499 what", b"503 no", 499),
        (b"599 what", b"503 no", 599),
        (b"250 ok", b"498 what", 498),
        (b"250 ok", b"597", 597),
    ],
)
def test_a_code_that_nobody_knows_counts_by_its_first_digit(mail: bytes, rcpt: bytes, verdict: int | None) -> None:
    client, transaction = begun()
    client.receive(mail + b"\r\n" + rcpt + b"\r\n")
    if verdict is None:
        client.receive(b"354\r\n")
        assert client.next_event() == SendContent()
        assert client.end_content() == b".\r\n"
        client.receive(b"266\r\n")
        assert isinstance(client.next_event(), Finished)
        assert transaction.verdicts == [Reply(266, None, "")]
    else:
        client.receive(b"554 no\r\n")
        assert isinstance(client.next_event(), Finished)
        (reply,) = transaction.verdicts
        assert reply is not None and reply.code == verdict


def test_a_refused_sender_is_asked_again_with_the_next_message() -> None:
    client = introduced(b"250-mx\r\n250 8BITMIME\r\n")
    for _ in range(2):
        transaction = Transaction(b"<a@example.org>", [b"<b@example.net>"])
        client.begin(transaction)
        assert client.output() == b"MAIL FROM:<a@example.org>\r\n"
        client.receive(b"550 5.7.1 not you\r\n")
        assert isinstance(client.next_event(), Finished)


def test_paths_keep_their_case_and_are_quoted_as_little_as_possible() -> None:
    def path_of(text: str) -> bytes:
        mailbox = parse_path(text)
        assert mailbox is not None
        whole = QueuedMessage("q1", mailbox, 0.0, 3, inline=b"x\r\n")
        recipient = QueuedRecipient(whole, 0, mailbox, mailbox, mailbox.domain, None, 0, 0, 0, 1)
        (path,) = plan_recipients([recipient], [None])
        assert plan_sender(whole, {}, True) == path.octets
        return path.octets

    assert path_of("Ann.O'Neil@Example.NET") == b"<Ann.O'Neil@example.net>"
    assert path_of('"Ann.O\'Neil"@example.net') == b"<Ann.O'Neil@example.net>"
    assert path_of('"a\\b\\ c"@example.net') == b'<"ab c"@example.net>'
    assert path_of('"a\\"b"@example.net') == b'<"a\\"b"@example.net>'
    assert path_of("@one.test,@two.test:ann@example.net") == b"<ann@example.net>"
    assert path_of("ann@[IPv6:2001:DB8::1]") == b"<ann@[IPv6:2001:db8::1]>"


def test_a_null_reverse_path_stays_null() -> None:
    assert plan_sender(QueuedMessage("q1", None, 0.0, 3, inline=b"x\r\n"), {}, True) == b"<>"


@pytest.mark.parametrize("domain", ["mail", "example.org", "mail.example.org"])
def test_domains_are_asked_for_as_they_stand(domain: str) -> None:
    """RFC 5321 §5.1: nothing is put behind a name that looks incomplete."""
    asked: list[str] = []

    class Nobody:
        async def mx(self, domain: str) -> tuple[tuple[int, str], ...]:
            asked.append(domain)
            raise NoSuchName(domain)

        async def addresses(self, host: str) -> tuple[str, ...]:
            raise AssertionError(host)

    found = run(lambda: Deferred.fromCoroutine(find_exchangers(domain, Nobody(), MxSettings())))
    assert isinstance(found, Reply) and found.status == (5, 1, 2)
    assert asked == [domain]


# -- what we write into messages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("many", [1, 2])
def test_trace_fields_tell_of_one_recipient_or_of_none(many: int) -> None:
    """RFC 5321 §7.2: nobody learns who else got it."""
    recipients = [Mailbox(f"name{number}", "here.test") for number in range(many)]
    envelope = Envelope(None, tuple(Recipient(each, each, LOCAL, 1) for each in recipients))
    submitted: list[Submission] = []

    def commit(submission: Submission) -> Deferred[Any]:
        submitted.append(submission)
        return succeed(Refused(replies.NO_ROOM))

    made = reception(spool=SimpleNamespace(commit=commit))
    made.end_of_data(SessionFacts(client_address="192.0.2.1"), envelope, incoming(SpoolDraft()), END)
    assert (b"for <name0@here.test>" in submitted[0].trace) is (many == 1)
    assert (b"name" in submitted[0].trace) is (many == 1)


@pytest.mark.parametrize(
    "fields", [b"Resent-To: b@here.test\r\n", b"Resent-From: a@b.test\r\nResent-From: c@b.test\r\n"]
)
def test_resent_fields_need_not_match(fields: bytes) -> None:
    """RFC 5321 §3.3: not even on submission, where defects are refused."""
    assert inspect(b"From: a@b.test\r\n" + fields).defects == ()


def test_an_alias_with_one_target_passes_everything_on() -> None:
    """RFC 3461 §5.2.7.2: it reports nothing itself."""
    team, ann = Mailbox("team", "here.test"), Mailbox("ann", "there.test")
    wish = DsnRequest("SUCCESS,DELAY", "rfc822;a+2Bb@here.test")
    (only,) = expand_recipient(Resolution(True, (Target(ann),)), team, wish)
    assert (only.forward_path, only.original, only.next_hop, only.dsn) == (ann, team, "there.test", wish)
