"""Many short connections in a row: connect, request, response, close."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import socket
import struct
from concurrent.futures import ThreadPoolExecutor

from tests.kernel.content import Sink, WrongBytesError, content
from tests.kernel.plans import family_of
from tests.kernel.waiting import patient, wait_until

_REQUEST, _RESPONSE = 100, 400
_NUMBER = struct.Struct("!Q")
_TIMEOUT = struct.pack("ll", int(patient(20)), 0)
_ENOUGH = 20


def churn_serve(address: tuple[str, int], count: int, processes: int = 0) -> list[str]:
    """In a worker: answer `count` connections; what was wrong, at most some lines.

    With `processes`, that many forked ones share the listener, else two threads do.
    """
    listener = socket.socket(family_of(address[0]), socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # accepted sockets inherit both
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEOUT)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.bind(address)
    listener.listen(4096)
    shares = processes or 2
    parts = [count // shares + (i < count % shares) for i in range(shares)]
    with listener:
        if processes:
            return _accept_forked(listener, parts)
        with ThreadPoolExecutor(shares) as threads:
            return [*itertools.chain(*threads.map(_accept_all, [listener] * shares, parts))]


def _accept_forked(listener: socket.socket, parts: list[int]) -> list[str]:
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    children = [
        fork.Process(target=lambda count=part: results.put(_accept_all(listener, count)))
        for part in parts
    ]
    for child in children:
        child.start()
    complaints = [line for _ in children for line in results.get()]
    for child in children:
        child.join()
    return complaints


def churn_connect(address: tuple[str, int], count: int, first: int) -> list[str]:
    """In a worker: make `count` connections whose numbers begin at `first`; what was wrong."""
    complaints: list[str] = []
    for number in range(first, first + count):
        try:
            _connect_once(address, number)
        except (OSError, EOFError, WrongBytesError) as error:
            complaints.append(f"client of {number}: {type(error).__name__}: {error}")
            if len(complaints) >= _ENOUGH:
                break
    return complaints


def _connect_once(address: tuple[str, int], number: int) -> None:
    with socket.socket(family_of(address[0]), socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEOUT)
        # refused as long as the other worker does not listen yet
        wait_until(lambda: sock.connect_ex(address) != errno.ECONNREFUSED, f"{address} listens")
        sock.sendall(_NUMBER.pack(number) + bytes(content(2 * number, 0, _REQUEST)))
        _take(sock, 2 * number + 1, _RESPONSE)


def _accept_all(listener: socket.socket, count: int) -> list[str]:
    complaints: list[str] = []
    for _ in range(count):
        try:
            _answer(listener)
        except (OSError, EOFError, WrongBytesError) as error:
            complaints.append(f"server: {type(error).__name__}: {error}")
            if len(complaints) >= _ENOUGH:
                break
    return complaints


def _answer(listener: socket.socket) -> None:
    sock, _ = listener.accept()
    with sock:
        head = sock.recv(_NUMBER.size, socket.MSG_PEEK)
        while len(head) < _NUMBER.size:
            if not head:
                raise EOFError
            head = sock.recv(_NUMBER.size, socket.MSG_PEEK)
        [number] = _NUMBER.unpack(sock.recv(_NUMBER.size))
        _take(sock, 2 * number, _REQUEST)
        sock.sendall(content(2 * number + 1, 0, _RESPONSE))
        # the client closes first, so that its side keeps the TIME_WAIT
        if sock.recv(1):
            text = f"bytes behind the request of {number}"
            raise EOFError(text)


def _take(sock: socket.socket, stream: int, size: int) -> None:
    sink = Sink(stream)
    while sink.offset < size:
        data = sock.recv(size - sink.offset)
        if not data:
            text = f"EOF at offset {sink.offset} of {size} of stream {stream}"
            raise EOFError(text)
        sink.feed(data)
