# SPDX-License-Identifier: MIT
"""recv and send without letting go of the interpreter, and writing at once: what our sockets, in and out, have in common.

The sockets never block, so nothing is gained by letting go; but each time a thread that waits for the interpreter is woken,
only to be put to sleep again, which costs more than the call. What is large is copied while others may run.
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Callable
from errno import EAGAIN, EINTR, ENOBUFS, EWOULDBLOCK
from typing import Any

from twisted.internet import main
from twisted.internet.abstract import FileDescriptor

_OCTETS = FileDescriptor.bufferSize
_SMALL_OCTETS = 16384
_AGAIN = frozenset({EAGAIN, EWOULDBLOCK, EINTR, ENOBUFS})

# PyDLL, unlike CDLL, keeps the interpreter during the call.
_libc = ctypes.PyDLL(None, use_errno=True)
_recv, _send = _libc.recv, _libc.send
_recv.argtypes, _recv.restype = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_ssize_t
_send.argtypes, _send.restype = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_ssize_t
# One buffer for all sockets of the reactor's thread: what was read is copied out before anything else happens.
_buffer = ctypes.create_string_buffer(_OCTETS)
_address = ctypes.addressof(_buffer)
_take = ctypes.string_at
_errno = ctypes.get_errno


def receive(descriptor: int, received: Callable[[bytes], Any]) -> Any:
    """What IReadDescriptor's `doRead` does, and returns: `received` is called with what has come, if anything has."""
    octets = _recv(descriptor, _address, _OCTETS, 0)
    if octets > 0:
        return received(_take(_address, octets))
    if octets == 0:
        return main.CONNECTION_DONE
    return None if _errno() in _AGAIN else main.CONNECTION_LOST


def send(transport: Any, data: Any, otherwise: Callable[[Any, Any], Any]) -> Any:
    """What FileDescriptor's `writeSomeData` does, and returns: how many octets were taken, or an exception. `otherwise` is
    Twisted's own, for what is large."""
    if type(data) is not bytes or len(data) > _SMALL_OCTETS:
        return otherwise(transport, data)
    taken = _send(transport.fileno(), data, len(data), socket.MSG_NOSIGNAL)
    if taken >= 0:
        return taken
    return 0 if _errno() in _AGAIN else main.CONNECTION_LOST


def write_at_once(transport: Any, data: bytes) -> None:
    """Write below any TLS: to the kernel where nothing waits before it, and what it does not take to the buffer.

    An error shows again when the reactor writes, and is reported from there: never inside a call of the protocol's.
    """
    if (
        data
        and transport.connected
        and not (
            transport.dataBuffer
            or transport._tempDataBuffer
            or transport.disconnecting
            or transport._writeDisconnecting
        )
    ):
        taken = transport.writeSomeData(data)
        if taken == len(data):
            return
        if type(taken) is int and taken > 0:
            data = data[taken:]
    FileDescriptor.write(transport, data)
