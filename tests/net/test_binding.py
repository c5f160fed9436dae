# SPDX-License-Identifier: MIT
"""Binding: what is somebody else's is left alone, and what is ours is removed as what it is."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from polarismail.net import binding
from polarismail.net.listeners import Listener
from polarismail.values.errors import ConfigError


def at(path: Path, **settings: str) -> Listener:
    return Listener("door", role="mx", address=f"unix:{path}", **settings)  # type: ignore[arg-type]


def test_a_socket_of_another_server_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mx.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(ConfigError, match=f'listener "door" cannot listen on {path}: another server') as caught:
            binding.bind(at(path))
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.EADDRINUSE  # which a start waits for a little
        assert path.exists()
    (bound,) = binding.bind(at(path))  # it was killed, and its file is there still
    bound.close()


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mx.sock"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="something that is no socket is there"):
        binding.bind(at(path))
    assert path.read_text() == "precious"


def test_a_group_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='there is no group "no-such" on this machine'):
        binding.bind(at(tmp_path / "mx.sock", socket_group="no-such"))
    assert not (tmp_path / "mx.sock").exists()


def test_only_our_own_file_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "mx.sock"
    files = binding.SocketFiles()
    (bound,) = binding.bind(at(path))
    files.note(str(path))
    with bound:
        path.rename(tmp_path / "aside")
        path.write_text("somebody else's by now")
        files.remove()
        assert path.exists()
    (bound,) = binding.bind(at(tmp_path / "other"))
    files.note(str(tmp_path / "other"))
    with bound:
        files.remove()
        files.remove()
        assert not os.path.lexists(tmp_path / "other")


def test_endpoints_are_what_the_sockets_say(tmp_path: Path) -> None:
    bound = [*binding.bind(Listener("x", 0, "mx", address="127.0.0.1")), *binding.bind(at(tmp_path / "mx.sock"))]
    try:
        assert binding.endpoints(bound) == {("127.0.0.1", bound[0].getsockname()[1])}
    finally:
        for each in bound:
            each.close()
