"""Very many connections at once between workers, each checked byte by byte."""

from __future__ import annotations

import contextlib
import socket
import struct

from tests.kernel.content import content
from tests.kernel.waiting import wait_until

SAID = 64
"""Bytes that every end says in a round, behind the number of its connection."""
_NUMBER = struct.Struct("!Q")
_TIMEOUT = struct.pack("ll", 60, 0)
_ENDS: list[socket.socket] = []


def crowd_accept(address: tuple[str, int], count: int) -> None:
    """In a worker: listen on `address`, accept `count` connections and keep them."""
    with socket.create_server(address, backlog=4096) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEOUT)
        _ENDS.extend(_ready(listener.accept()[0]) for _ in range(count))


def crowd_connect(address: tuple[str, int], count: int) -> None:
    """In a worker: make `count` connections to `address` and keep them."""
    for _ in range(count):
        _ENDS.append(_ready(socket.socket()))
        # refused as long as the other worker does not listen yet
        wait_until(lambda: _ENDS[-1].connect_ex(address) == 0, f"{address} listens")


def crowd_ask(first: int, turn: int) -> int:
    """In a worker: say its number on every connection and check the answers.

    Connections are numbered from `first` on. Returns how many were right.
    """
    for number, sock in enumerate(_ENDS, first):
        sock.sendall(_NUMBER.pack(number) + content(2 * number, turn * SAID, SAID))
    for number, sock in enumerate(_ENDS, first):
        _check(_take(sock, SAID), 2 * number + 1, turn)
    return len(_ENDS)


def crowd_answer(turn: int) -> int:
    """In a worker: check what every connection says and answer; returns how many were right."""
    numbers = set()
    for sock in _ENDS:
        [number] = _NUMBER.unpack(_take(sock, _NUMBER.size))
        _check(_take(sock, SAID), 2 * number, turn)
        sock.sendall(content(2 * number + 1, turn * SAID, SAID))
        numbers.add(number)
    return len(numbers)


def crowd_close() -> None:
    """In a worker: close every connection."""
    while _ENDS:
        with contextlib.suppress(OSError):
            _ENDS.pop().close()


def _ready(sock: socket.socket) -> socket.socket:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEOUT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _take(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def _check(data: bytes, stream: int, turn: int) -> None:
    assert data == content(stream, turn * SAID, SAID), f"wrong bytes on stream {stream}"
