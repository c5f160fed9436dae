# SPDX-License-Identifier: MIT
"""The outside world for tests: a DNS server on loopback whose zone is a plain dict, and a remote SMTP server that does
as its script says. Real sockets, real protocols, no policy; never part of a server that carries mail.

A zone maps folded names to what they hold; names that are absent (and match no `*.parent`) are NXDOMAIN:

    {"example.org":  {"MX": [[10, "mx1.example.org"], [20, "mx2.example.org"]], "TTL": 60},
     "mx1.example.org": {"A": ["127.0.0.2"], "AAAA": ["::1"]},
     "www.example.org": {"CNAME": "mx1.example.org"},
     "nomail.example":  {"MX": [[0, "."]]},          null MX, RFC 7505
     "broken.example":  "SERVFAIL",                  or "TIMEOUT" (no answer), "REFUSED", "NXDOMAIN"
     "half.example":    {"A": ["127.0.0.3"], "AAAA": "SERVFAIL"}}

From the command line (each prints "ready PORT" once it listens):

    python -m polarismail.testing dns  --port N --zone FILE.json
    python -m polarismail.testing sink --port N [--address A] [--script FILE.json] [--out FILE.jsonl]

Zone and script are read again when their file changes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from attrs import define, field, frozen
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.error import CannotListenError
from twisted.internet.protocol import Factory, connectionDone
from twisted.names import dns, server
from twisted.protocols.basic import LineReceiver

Zone = dict[str, Any]
_FAULTS = {"SERVFAIL": dns.ESERVER, "REFUSED": dns.EREFUSED, "NXDOMAIN": dns.ENAME}
_PATH = re.compile(rb"<([^>]*)>")


class DnsServer(server.DNSServerFactory):
    """Answers from `zone`, which may be changed while it runs. UDP and TCP on one port; `queries` keeps what was asked."""

    noisy = False

    def __init__(self, zone: Zone | None = None, *, before_query: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.zone: Zone = {} if zone is None else zone
        self.queries: list[tuple[str, str, str]] = []  # name, type, "udp" or "tcp"
        self.port = 0
        self._before_query = before_query
        self._ports: list[Any] = []

    def listen(self, reactor: Any, address: str = "127.0.0.1", port: int = 0) -> int:
        """Bind UDP and TCP to the same port (0: any free one); returns it."""
        for attempt in range(20):
            stream = reactor.listenTCP(port, self, interface=address)
            number: int = stream.getHost().port
            try:
                datagrams = reactor.listenUDP(number, dns.DNSDatagramProtocol(self, reactor), interface=address)
            except CannotListenError:
                stream.stopListening()
                if port or attempt == 19:
                    raise
                continue
            self._ports, self.port = [stream, datagrams], number
            return number
        raise AssertionError("unreachable")

    def stop(self) -> Deferred[Any]:
        """Close both sockets and every open stream."""
        for connection in list(self.connections):
            connection.transport.abortConnection()
        ports, self._ports = self._ports, []
        return gatherResults([Deferred.fromCoroutine(_stop(port)) for port in ports])

    def handleQuery(self, message: Any, protocol: Any, address: Any) -> None:
        """Called by names for each query."""
        if self._before_query is not None:
            self._before_query()
        query = message.queries[0]
        name, kind = query.name.name.decode("ascii", "replace").lower().rstrip("."), query.type
        self.queries.append((name, dns.QUERY_TYPES.get(kind, str(kind)), "tcp" if address is None else "udp"))
        rcode, answers = self._find(name, kind)
        if rcode is None:
            return
        soa = dns.RRHeader("test", dns.SOA, payload=dns.Record_SOA("ns.test", "root.test", minimum=60, ttl=60), ttl=60)
        reply = dns.Message(message.id, answer=1, recDes=message.recDes, recAv=1, rCode=rcode)
        reply.queries, reply.answers = [query], answers
        reply.authority = [] if answers or rcode not in (dns.OK, dns.ENAME) else [soa]
        if address is None:
            reply.maxSize = 0
            protocol.writeMessage(reply)
        else:
            protocol.writeMessage(reply, address)  # cut at 512 octets, with the TC bit, by the codec

    def _find(self, name: str, kind: int) -> tuple[int | None, list[dns.RRHeader]]:
        """(rcode, answers); the rcode is None where no answer shall go out."""
        answers: list[dns.RRHeader] = []
        for _ in range(20):
            entry = self._entry(name)
            if isinstance(entry, str):
                return (None if entry == "TIMEOUT" else _FAULTS[entry]), answers
            if entry is None:
                return dns.ENAME, answers
            ttl = int(entry.get("TTL", 300))
            if "CNAME" in entry:
                target = entry["CNAME"].lower().rstrip(".")
                answers.append(_record(name, dns.CNAME, dns.Record_CNAME(target, ttl), ttl))
                if not entry.get("chase", True):
                    return dns.OK, answers
                name = target
                continue
            values = entry.get(dns.QUERY_TYPES.get(kind, ""), [])
            if isinstance(values, str):
                return (None if values == "TIMEOUT" else _FAULTS[values]), answers
            return dns.OK, answers + [_record(name, kind, _payload(kind, value, ttl), ttl) for value in values]
        return dns.OK, answers

    def _entry(self, name: str) -> Any:
        found = self.zone.get(name)
        if found is None and "." in name:
            found = self.zone.get("*." + name.partition(".")[2])
        return found


async def _stop(port: Any) -> None:
    await _as_deferred(port.stopListening())


def _as_deferred(value: Any) -> Deferred[Any]:
    if isinstance(value, Deferred):
        return value
    done: Deferred[Any] = Deferred()
    done.callback(value)
    return done


def _record(name: str, kind: int, payload: Any, ttl: int) -> dns.RRHeader:
    return dns.RRHeader(name, kind, payload=payload, ttl=ttl)


def _payload(kind: int, value: Any, ttl: int) -> Any:
    if kind == dns.MX:
        preference, host = value
        return dns.Record_MX(preference, "" if host == "." else host, ttl)
    if kind == dns.A:
        return dns.Record_A(value, ttl)
    if kind == dns.AAAA:
        return dns.Record_AAAA(value, ttl)
    raise ValueError(f"the test zone cannot hold {dns.QUERY_TYPES.get(kind, kind)}")


@frozen
class Received:
    """One message that the sink took with its final 250."""

    reverse_path: str
    recipients: tuple[str, ...]
    content: bytes
    session: int  # which connection, from 1
    helo: str


@define
class SmtpSink:
    """A remote SMTP server. `script` says what it answers instead of yes; it may be changed while it runs.

    Keys: "BANNER", "EHLO", "STAR", "MAIL", "DATA", "DOT", "RSET", "QUIT" with a reply line; "RCPT" with a reply line for
    every recipient, or a mapping from address to reply line; "max_messages" for each connection (then 421).
    The reply "DROP" closes the connection instead, "SILENCE" says nothing from then on.
    """

    script: dict[str, Any] = field(factory=dict)
    hostname: str = "sink.test"
    extensions: tuple[str, ...] = ("PIPELINING", "8BITMIME", "SIZE 52428800", "ENHANCEDSTATUSCODES")
    received: list[Received] = field(factory=list)
    commands: list[str] = field(factory=list)
    sessions: int = 0
    open_sessions: int = 0
    most_open: int = 0
    port: int = 0
    on_message: Callable[[Received], None] | None = None
    before_command: Callable[[], None] | None = None
    _listening: Any = field(default=None, init=False)
    _protocols: set[SinkProtocol] = field(factory=set, init=False)

    def listen(self, reactor: Any, address: str = "127.0.0.1", port: int = 0) -> int:
        """Bind; returns the port."""
        sink = self

        class SinkFactory(Factory):
            noisy = False

            def buildProtocol(self, addr: Any) -> SinkProtocol:
                return SinkProtocol(sink)

        self._listening = reactor.listenTCP(port, SinkFactory(), interface=address)
        self.port = self._listening.getHost().port
        return self.port

    def stop(self) -> Deferred[Any]:
        """Stop listening and abort what is open."""
        for protocol in list(self._protocols):
            protocol.transport.abortConnection()
        port, self._listening = self._listening, None
        return _as_deferred(port.stopListening() if port is not None else None)


class SinkProtocol(LineReceiver):
    """The sink's side of one connection: obedient, not strict."""

    MAX_LENGTH = 1 << 20
    transport: Any

    def __init__(self, sink: SmtpSink) -> None:
        self.sink = sink
        self.number = 0
        self.messages = 0
        self.helo = ""
        self._in_data = self._is_silent = False
        self._reset()

    def _reset(self) -> None:
        self.reverse_path = ""
        self.recipients: list[str] = []
        self.lines: list[bytes] = []

    def connectionMade(self) -> None:
        if self.sink.before_command is not None:
            self.sink.before_command()
        self.sink.sessions += 1
        self.sink.open_sessions += 1
        self.sink.most_open = max(self.sink.most_open, self.sink.open_sessions)
        self.sink._protocols.add(self)
        self.number = self.sink.sessions
        self._say("BANNER", f"220 {self.sink.hostname} ESMTP sink")

    def connectionLost(self, reason: Any = connectionDone) -> None:
        self.sink.open_sessions -= 1
        self.sink._protocols.discard(self)

    def _say(self, stage: str, default: str, scripted: Any = None) -> str:
        reply = scripted if scripted is not None else self.sink.script.get(stage)
        reply = default if not isinstance(reply, str) else reply
        if reply == "DROP":
            self.transport.abortConnection()
        elif reply == "SILENCE" or self._is_silent:
            self._is_silent = True
        else:
            self.transport.write(reply.replace("\n", "\r\n").encode() + b"\r\n")
        return reply

    def lineReceived(self, line: bytes) -> None:
        if self._in_data and line != b".":
            self.lines.append(line[1:] if line.startswith(b".") else line)
            return
        if self.sink.before_command is not None:
            self.sink.before_command()
        if self._in_data:
            self._end_of_data()
            return
        text = line.decode("utf-8", "replace")
        self.sink.commands.append(text)
        verb = text[:4].upper()
        if verb in ("EHLO", "HELO"):
            self.helo = text[5:]
            lines = (self.sink.hostname, *self.sink.extensions) if verb == "EHLO" else (self.sink.hostname,)
            last = len(lines) - 1
            self._say("EHLO", "\n".join(f"250{' ' if at == last else '-'}{one}" for at, one in enumerate(lines)))
        elif verb == "MAIL":
            if self.sink.script.get("max_messages", 1 << 30) <= self.messages:
                self._say("", "421 4.7.0 too many messages on this connection")
                self.transport.loseConnection()
                return
            self._reset()
            found = _PATH.search(line)
            self.reverse_path = found[1].decode("utf-8", "replace") if found else ""
            self._say("MAIL", "250 2.1.0 ok")
        elif verb == "RCPT":
            self._recipient(line)
        elif verb == "DATA":
            if not self.recipients:
                self._say("", "554 5.5.1 no valid recipients")
            else:
                self._in_data = self._say("DATA", "354 go ahead").startswith("354")
        elif verb == "QUIT":
            self._say("QUIT", "221 2.0.0 bye")
            self.transport.loseConnection()
        elif verb in ("RSET", "NOOP"):
            self._reset()
            self._say(verb, "250 2.0.0 ok")
        elif self._say(verb, "502 5.5.1 not implemented").startswith("220"):
            self.transport.loseConnection()  # "go ahead" to STARTTLS, from one who cannot do TLS

    def _recipient(self, line: bytes) -> None:
        found = _PATH.search(line)
        address = found[1].decode("utf-8", "replace") if found else ""
        scripted = self.sink.script.get("RCPT")
        if isinstance(scripted, Mapping):
            scripted = scripted.get(address)
        if self._say("RCPT", "250 2.1.5 ok", scripted).startswith("250"):
            self.recipients.append(address)

    def _end_of_data(self) -> None:
        self._in_data = False
        content = b"".join(one + b"\r\n" for one in self.lines)
        message = Received(self.reverse_path, tuple(self.recipients), content, self.number, self.helo)
        self.messages += 1
        # Recorded before the reply: a test that drops the connection here has a message that was taken all the same.
        wanted = self.sink.script.get("DOT")
        if wanted is None or str(wanted).startswith("250") or wanted in ("DROP", "SILENCE"):
            self.sink.received.append(message)
            if self.sink.on_message is not None:
                self.sink.on_message(message)
        self._reset()
        self._say("DOT", "250 2.0.0 taken")


def _reload(path: str, into: dict[str, Any]) -> Callable[[], None]:
    """A callable that refreshes `into` from the JSON file whenever that has changed."""
    last: list[Any] = [None]

    def look() -> None:
        stat = os.stat(path)
        if last[0] != (stat.st_mtime_ns, stat.st_size):
            last[0] = (stat.st_mtime_ns, stat.st_size)
            with open(path, encoding="utf-8") as source:
                fresh = json.load(source)
            into.clear()
            into.update(fresh)

    look()
    return look


def main(arguments: list[str] | None = None) -> None:
    """`python -m polarismail.testing dns|sink ...`"""
    parser = argparse.ArgumentParser(prog="python -m polarismail.testing", description="servers for tests, on loopback")
    parser.add_argument("what", choices=("dns", "sink"))
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--zone", help="JSON file: the zone of the DNS server")
    parser.add_argument("--script", help="JSON file: what the sink answers")
    parser.add_argument("--out", help="file to which the sink appends each message as a JSON line")
    chosen = parser.parse_args(arguments)

    from twisted.internet import reactor

    data: dict[str, Any] = {}
    if chosen.what == "dns":
        look = _reload(chosen.zone, data) if chosen.zone else None
        port = DnsServer(data, before_query=look).listen(reactor, chosen.address, chosen.port)
    else:
        port = _listen_sink(reactor, chosen, data)
    print(f"ready {port}", flush=True)
    reactor.run()


def _listen_sink(reactor: Any, chosen: argparse.Namespace, script: dict[str, Any]) -> int:
    look = _reload(chosen.script, script) if chosen.script else None

    def write(message: Received) -> None:
        row = {
            "reverse_path": message.reverse_path,
            "recipients": message.recipients,
            "content": message.content.decode("latin-1"),
            "session": message.session,
            "helo": message.helo,
        }
        with open(chosen.out, "a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")

    sink = SmtpSink(script=script, on_message=write if chosen.out else None, before_command=look)
    return sink.listen(reactor, chosen.address, chosen.port)


if __name__ == "__main__":
    main()
