# SPDX-License-Identifier: MIT
"""Submits mail as clients do: for each message a connection, a full TLS handshake, and a login.

Several processes of several threads, one connection each at a time; no session is resumed. What the generator can do by
itself is measured against a responder that does no more than the handshake and canned replies:

    python -m benchmarks.submit --alone
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence

PROCESSES = 4
_MESSAGE = b"From: user@lab.test\r\nSubject: submitted\r\n\r\n" + (b"x" * 78 + b"\r\n") * 51  # 4 KB
_SECONDS = 60


def submit(
    port: int, count: int, *, sessions: int, users: Sequence[str], password: str, recipient: str
) -> tuple[float, float, float]:
    """Send `count` messages from PROCESSES processes, in turn as each of `users`. Returns when the first connection began,
    when the last message was accepted (time.time), and the CPU seconds of the generator. Raises RoundFailed."""
    from benchmarks.load import RoundFailed  # late: the children do without what it needs

    order = {"port": port, "users": list(users), "password": password, "recipient": recipient}
    command = [sys.executable, "-m", "benchmarks.submit", "--child"]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(PROCESSES)
    ]
    try:
        for at, child in enumerate(children):
            part = {**order, "count": _share(count, at), "sessions": max(1, sessions // PROCESSES)}
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write(json.dumps(part) + "\n")
            child.stdin.flush()
            child.stdout.readline()  # it has started, and waits
        began = time.time()
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        answers = [json.loads(child.communicate(timeout=600)[0] or "{}") for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    if faults := [fault for answer in answers for fault in answer.get("faults", ["the generator ended"])]:
        raise RoundFailed(f"submission to port {port}: {len(faults)} failed: {faults[0]}")
    return began, max(answer["ended"] for answer in answers), sum(answer["cpu"] for answer in answers)


def _share(count: int, at: int) -> int:
    return count // PROCESSES + (at < count % PROCESSES)


class _Child:
    """One process: threads that take messages from one counter until none is left, or one fails."""

    def __init__(self, order: dict[str, object]) -> None:
        self._port, self._recipient = int(str(order["port"])), str(order["recipient"])
        self._left, self._sessions = int(str(order["count"])), int(str(order["sessions"]))
        users = order["users"]
        assert isinstance(users, list)
        self._logins = [(user, _plain(user, str(order["password"]))) for user in users]
        self._lock = threading.Lock()
        self._faults: list[str] = []
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.check_hostname = False
        self._context.verify_mode = ssl.CERT_NONE

    def run(self) -> dict[str, object]:
        threads = [threading.Thread(target=self._work) for _ in range(self._sessions)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"ended": time.time(), "faults": self._faults}

    def _work(self) -> None:
        while not self._faults:
            with self._lock:
                if self._left == 0:
                    return
                self._left -= 1
                user, login = self._logins[self._left % len(self._logins)]
            try:
                self._send(user, login)
            except (OSError, AssertionError) as problem:
                self._faults.append(f"{type(problem).__name__}: {problem}")

    def _send(self, user: str, login: bytes) -> None:
        with (
            socket.create_connection(("127.0.0.1", self._port), _SECONDS) as plain,
            self._context.wrap_socket(plain) as peer,
        ):
            dialogue = (
                (b"", b"220"),
                (b"EHLO client.test\r\n", b"250"),
                (b"AUTH PLAIN " + login + b"\r\n", b"235"),
                (f"MAIL FROM:<{user}>\r\n".encode(), b"250"),
                (f"RCPT TO:<{self._recipient}>\r\n".encode(), b"250"),
                (b"DATA\r\n", b"354"),
                (_MESSAGE + b".\r\n", b"250"),
                (b"QUIT\r\n", b"221"),
            )
            for command, expected in dialogue:
                if command:
                    peer.sendall(command)
                reply = _read_reply(peer)
                assert reply.startswith(expected), f"{command[:20]!r} was answered with {reply!r}"


def _plain(user: str, password: str) -> bytes:
    return base64.b64encode(f"\0{user}\0{password}".encode())


def _read_reply(peer: ssl.SSLSocket) -> bytes:
    """A whole reply, also one of several lines."""
    octets = b""
    while True:
        piece = peer.recv(4096)
        if not piece:
            raise OSError(f"the connection was closed after {octets!r}")
        octets += piece
        last = octets.rstrip(b"\r\n").rpartition(b"\n")[2]
        if octets.endswith(b"\n") and last[3:4] == b" ":
            return octets


def _respond(listener: socket.socket, context: ssl.SSLContext) -> None:
    """The other side of a measurement of the generator alone: TLS, and what the client waits for."""

    def serve(plain: socket.socket) -> None:
        with plain, context.wrap_socket(plain, server_side=True) as peer:
            peer.sendall(b"220 here\r\n")
            for reply in (b"250 here", b"235 yes", b"250 yes", b"250 yes", b"354 go on"):
                peer.recv(65536)
                peer.sendall(reply + b"\r\n")
            octets = b""
            while not octets.endswith(b"\r\n.\r\n"):
                octets += peer.recv(65536)
            peer.sendall(b"250 yes\r\n")
            peer.recv(65536)
            peer.sendall(b"221 bye\r\n")

    while True:
        plain, _ = listener.accept()
        threading.Thread(target=serve, args=(plain,), daemon=True).start()


def measure_alone(count: int = 2000, sessions: int = 20) -> tuple[float, float]:
    """The generator against the responder, in two processes of its own: messages a second, and the generator's CPU seconds
    for each."""
    from polarismail.net.tls import make_self_signed

    with tempfile.TemporaryDirectory() as name:
        chain, key = f"{name}/chain.pem", f"{name}/key.pem"
        make_self_signed("lab.test", chain, key, ca_path=f"{name}/ca.pem")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain, key)
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            _respond(listener, context)
        children.append(child)
    try:
        began, ended, cpu = submit(
            listener.getsockname()[1], count, sessions=sessions, users=["a@b.test"], password="x", recipient="c@d.test"
        )
    finally:
        for child in children:
            os.kill(child, 9)
            os.waitpid(child, 0)
        listener.close()
    return count / (ended - began), cpu / count


def main() -> None:
    """The child of `submit`, or the measurement of the generator alone."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--child", action="store_true", help="internal: take an order from stdin")
    parser.add_argument("--alone", action="store_true", help="measure the generator against a responder")
    arguments = parser.parse_args()
    if arguments.child:
        child = _Child(json.loads(sys.stdin.readline()))
        print("ready", flush=True)
        sys.stdin.readline()
        before = time.process_time()
        answer = child.run()
        print(json.dumps({**answer, "cpu": time.process_time() - before}))
    else:
        rate, cpu = measure_alone()
        print(
            f"the generator alone, against canned replies on the same cores: {rate:.0f}/s, {cpu * 1e6:.0f} us CPU each"
        )


if __name__ == "__main__":
    main()
