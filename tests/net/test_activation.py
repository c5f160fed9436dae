# SPDX-License-Identifier: MIT
"""What systemd says in the environment is believed only where it makes sense."""

from __future__ import annotations

import os
import socket

import pytest

from polarismail.net.activation import InheritedSockets
from polarismail.values.errors import ConfigError

ME = str(os.getpid())


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({"LISTEN_PID": ME, "LISTEN_FDS": "3", "LISTEN_FDNAMES": "a:b:a"}, {3: "a", 4: "b", 5: "a"}),
        ({"LISTEN_PID": ME, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a"}, {3: "a", 4: "unknown"}),
        ({"LISTEN_PID": ME, "LISTEN_FDS": "1"}, {3: "unknown"}),
        ({"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "a"}, {}),
        ({"LISTEN_PID": ME, "LISTEN_FDS": "-1"}, {}),
        ({"LISTEN_PID": ME, "LISTEN_FDS": "99999"}, {}),
        ({"LISTEN_FDS": "1"}, {}),
        ({}, {}),
    ],
)
def test_names_of_descriptors(environment: dict[str, str], names: dict[int, str]) -> None:
    found = InheritedSockets.from_environment(environment)
    assert found.names == names
    assert bool(found.problem) is not bool(names)


def test_what_nobody_takes_is_a_fault_and_what_is_taken_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        number = os.dup(listening.fileno())
        inherited = InheritedSockets({number: "smtp"})
        with pytest.raises(ConfigError, match="which is the address of no listener"):
            inherited.check_all_taken()
        with pytest.raises(ConfigError, match=r'named "mx" .*: there are smtp'):
            inherited.named("x", "mx")
        (taken,) = inherited.named("x", "smtp")
        inherited.check_all_taken()
        with taken:
            assert not taken.getblocking()
            assert not taken.get_inheritable()


def test_a_descriptor_is_looked_at_before_it_is_believed() -> None:
    inherited = InheritedSockets({}, "systemd has handed over no sockets")
    with pytest.raises(
        ConfigError, match=r'listener "x": no socket .* named "mx" .*: systemd has handed over no sockets'
    ):
        inherited.named("x", "mx")
    reading, writing = os.pipe()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams, socket.socket() as idle:
        for number in (reading, datagrams.fileno(), idle.fileno()):
            with pytest.raises(ConfigError, match=f'listener "x": descriptor {number} is no '):
                inherited.numbered("x", number)
            os.fstat(number)  # it stays whose it is
        os.close(reading)
        os.close(writing)
        with pytest.raises(ConfigError, match=f'listener "x": descriptor {reading} is no socket'):
            inherited.numbered("x", reading)
