"""Very many connections between workers, at once or in a row, each checked byte by byte."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import time

from tests.kernel.waiting import wait_until
from underpass.torture.content import content

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
        _connect(_ENDS[-1], address)


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


def crowd_peers() -> list[tuple[str, int]]:
    """In a worker: the address and port at the other end of each connection, as seen here."""
    return [sock.getpeername() for sock in _ENDS]


def crowd_close() -> None:
    """In a worker: close every connection."""
    while _ENDS:
        with contextlib.suppress(OSError):
            _ENDS.pop().close()


def _connect(sock: socket.socket, address: tuple[str, int]) -> None:
    # refused as long as the other worker does not listen yet
    wait_until(lambda: sock.connect_ex(address) != errno.ECONNREFUSED, f"{address} listens")


def _ready(sock: socket.socket) -> socket.socket:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEOUT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _receive(sock: socket.socket, size: int) -> bytes:
    end = time.monotonic() + 60
    while True:
        try:
            return sock.recv(size)
        except BlockingIOError:
            # a reader in a sockmap that a reset wakes gets EAGAIN first
            if time.monotonic() > end:
                raise


def _take(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = _receive(sock, size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def _check(data: bytes, stream: int, turn: int) -> None:
    assert data == content(stream, turn * SAID, SAID), f"wrong bytes on stream {stream}"


def incarnations_serve(address: tuple[str, int], count: int) -> list[str]:
    """In a worker: accept `count` connections in turn; each has to be of one incarnation alone.

    An incarnation says its number and bytes of its own and is answered, then its client resets it,
    unread bytes or not. Returns what was wrong.
    """
    wrong = []
    last = -1
    with socket.create_server(address, backlog=64) as listener:
        listener.settimeout(60)
        while last < count - 1:
            sock, _ = listener.accept()
            with _ready(sock):
                try:
                    [number] = _NUMBER.unpack(_take(sock, _NUMBER.size))
                    if number <= last:
                        wrong.append(f"{number} after {last}")
                    last = number
                    _check(_take(sock, SAID), 2 * number, 0)
                    # twice as much as the client reads: the rest is unread when it resets
                    sock.sendall(content(2 * number + 1, 0, 2 * SAID))
                    if _receive(sock, 1):
                        wrong.append(f"bytes behind those of {number}")
                except (ConnectionResetError, BrokenPipeError):
                    continue
                except (AssertionError, EOFError, struct.error) as error:
                    wrong.append(f"server, after {last}: {error!r}")
    return wrong


def incarnations_connect(address: tuple[str, int], source: tuple[str, int], count: int) -> None:
    """In a worker: connect from one port `count` times, each time as soon as the last is reset."""
    for number in range(count):
        with _ready(socket.socket()) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.bind(source)
            _connect(sock, address)
            sock.sendall(_NUMBER.pack(number) + content(2 * number, 0, SAID))
            _check(_take(sock, SAID), 2 * number + 1, 0)
