"""Many short connections in a row: connect, request, response, close."""

from __future__ import annotations

import contextlib
import errno
import itertools
import multiprocessing
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from underpass.bench.processes import wait_for
from underpass.torture.content import Sink, WrongBytesError, content
from underpass.torture.patience import patient
from underpass.torture.plans import family_of
from underpass.torture.worker import die_with

_NUMBER = struct.Struct("!Q")
_LIMIT = 20.0
_TIMEOUT = struct.pack("ll", int(patient(_LIMIT)), 0)
_LINGER_NONE = struct.pack("ii", 1, 0)
_ENOUGH = 20
_READ = 64 << 10
_ABANDONED = threading.Event()
"""Set: the server's process is dead."""


@dataclass(frozen=True)
class Churn:
    """A run of short connections between two workers.

    Attributes:
        address: where the server listens and the client connects to.
        count: how many connections.
        first: number of the first; the numbers of runs that go on at once differ.
        processes: forked processes that share the listener; 0: two threads do.
        reuse_ports: each of the processes has a listener of its own, by SO_REUSEPORT.
        source_port: every connection is bound to this port and closed with an RST; 0: any.
        deferred: clients set TCP_DEFER_ACCEPT.
    """

    address: tuple[str, int]
    count: int
    first: int = 0
    processes: int = 0
    reuse_ports: bool = False
    source_port: int = 0
    deferred: bool = False

    @property
    def size(self) -> int:
        """Bytes that all connections carry together."""
        numbers = range(self.first, self.first + self.count)
        return sum(_request(n) + _response(n) + _NUMBER.size for n in numbers)


def _request(number: int) -> int:
    return 1 + number * 37 % 400


def _response(number: int) -> int:
    return 32 << 10 if number % 100 == 0 else 1 + number * 61 % 1500


def churn_serve(churn: Churn) -> list[str]:
    """In a worker: answer the connections; what was wrong, at most some lines."""
    shares = churn.processes or 2
    parts = [churn.count // shares + (i < churn.count % shares) for i in range(shares)]
    listeners = [_listen(churn) for _ in range(shares if churn.reuse_ports else 1)]
    with contextlib.ExitStack() as closing:
        for listener in listeners:
            closing.enter_context(listener)
        if churn.reuse_ports:  # which of them gets a connection is the kernel's choice
            return _answer_any(listeners, churn)
        if churn.processes:
            return _accept_forked(listeners[0], parts, churn)
        with ThreadPoolExecutor(shares) as threads:
            jobs = [threads.submit(_accept_all, listeners[0], part, churn) for part in parts]
            return [*itertools.chain(*(job.result() for job in jobs))]


def _listen(churn: Churn) -> socket.socket:
    listener = socket.socket(family_of(churn.address[0]), socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if churn.reuse_ports:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    # accepted sockets inherit both
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEOUT)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # the children of a server that was killed before us may be on their way out
    if not wait_for(lambda: _bound(listener, churn.address), _LIMIT):
        raise OSError(errno.EADDRINUSE, f"bind to {churn.address}")
    listener.listen(4096)
    return listener


def _bound(listener: socket.socket, address: tuple[str, int]) -> bool:
    try:
        listener.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True


def _answer_any(listeners: list[socket.socket], churn: Churn) -> list[str]:
    """The client is one thread: one connection at a time, at one of the listeners."""
    complaints: list[str] = []
    for _ in range(churn.count):
        ready, _, _ = select.select(listeners, [], [], _LIMIT)
        if not ready:
            complaints.append("server: HungError: no connection at any listener")
            break
        complaints += _accept_all(ready[0], 1, churn)
    return complaints


def _accept_forked(listener: socket.socket, parts: list[int], churn: Churn) -> list[str]:
    fork = multiprocessing.get_context("fork")
    results, parent = fork.SimpleQueue(), os.getpid()

    def serve(count: int) -> None:
        die_with(parent)
        results.put(_accept_all(listener, count, churn))

    children = [fork.Process(target=serve, args=(part,)) for part in parts]
    for child in children:
        child.start()
    complaints = [line for _ in children for line in results.get()]
    for child in children:
        child.join()
    return complaints


def churn_connect(churn: Churn) -> list[str]:
    """In a worker: make the connections; what was wrong, at most some lines."""
    numbers = range(churn.first, churn.first + churn.count)
    return _each("client", numbers, lambda number: _connect_once(churn, number))


def churn_abandon() -> None:
    """In the client's worker, for good: the server is dead, make no more connections."""
    _ABANDONED.set()


def _each(side: str, numbers: range, act: Callable[[int], None]) -> list[str]:
    """What was wrong with the connections of an end, at most some lines."""
    complaints: list[str] = []
    for number in numbers:
        if _ABANDONED.is_set():
            break
        try:
            act(number)
        except (OSError, EOFError, WrongBytesError) as error:
            complaints.append(f"{side}, connection {number}: {type(error).__name__}: {error}")
            if len(complaints) >= _ENOUGH:
                break
    return complaints


def _connect_once(churn: Churn, number: int) -> None:
    with socket.socket(family_of(churn.address[0]), socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEOUT)
        if churn.deferred:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
        if churn.source_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
            sock.bind(("", churn.source_port))
        # refused as long as the other worker does not listen yet
        wait_for(lambda: _ABANDONED.is_set() or _connected(sock, churn.address), _LIMIT)
        sock.sendall(_NUMBER.pack(number) + bytes(content(2 * number, 0, _request(number))))
        _take(sock, 2 * number + 1, _response(number))


def _connected(sock: socket.socket, address: tuple[str, int]) -> bool:
    code = sock.connect_ex(address)
    if code not in (0, errno.ECONNREFUSED):
        raise OSError(code, f"connect: {errno.errorcode.get(code)}")
    return code == 0


def _accept_all(listener: socket.socket, count: int, churn: Churn) -> list[str]:
    return _each("server", range(count), lambda _: _answer(listener, churn))


def _answer(listener: socket.socket, churn: Churn) -> None:
    sock, _ = listener.accept()
    with sock:
        head = b""
        while len(head) < _NUMBER.size:
            got = _receive(sock, _NUMBER.size - len(head))
            if not got:
                raise EOFError
            head += got
        [number] = _NUMBER.unpack(head)
        _take(sock, 2 * number, _request(number))
        sock.sendall(content(2 * number + 1, 0, _response(number)))
        # the client closes first, so that its side keeps the TIME_WAIT
        try:
            more = _receive(sock, 1)
        except ConnectionResetError:
            if not churn.source_port:
                raise
            return
        if more or churn.source_port:
            text = f"{len(more)} bytes instead of the end of {number}"
            raise EOFError(text)


def _take(sock: socket.socket, stream: int, size: int) -> None:
    sink = Sink(stream)
    while sink.offset < size:
        data = _receive(sock, min(size - sink.offset, _READ))
        if not data:
            text = f"EOF at offset {sink.offset} of {size} of stream {stream}"
            raise EOFError(text)
        sink.feed(data)


def _receive(sock: socket.socket, size: int) -> bytes:
    """One blocking read. A reader in a sockmap that is woken for nothing gets EAGAIN."""
    end = time.monotonic() + _LIMIT - 1
    while True:
        try:
            return sock.recv(size)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
