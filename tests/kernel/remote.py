"""Single sockets in worker processes, moved a call at a time by the test."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import select
import socket
import struct
import subprocess
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.kernel.waiting import wait_until
from underpass.torture.content import Sink, content
from underpass.torture.patience import patient
from underpass.torture.plans import family_of
from underpass.torture.worker import CALL_DEADLINE, Worker

_SOCKETS: dict[int, socket.socket] = {}
_SENT: dict[int, int] = {}
_SINKS: dict[int, Sink] = {}
_DEADLINE = patient(20.0)
IN_SYN = 1000
"""Bytes that a fast open sends ahead."""
_CLONE_NEWNET = 0x40000000
_X86 = platform.machine() == "x86_64"
_RECVFROM, _SENDTO, _SHUTDOWN = ("45", "44", "48") if _X86 else ("207", "206", "210")
ROUND = 4096
"""Bytes that `exchange` sends each way in a round."""

Address = tuple[str, int]
Options = tuple[tuple[int, int, "int | bytes"], ...]
"""Level, option and value of each setsockopt."""


@dataclass(frozen=True)
class Remote:
    """A socket of a worker; every method runs there and raises what the call raised there."""

    worker: Worker
    number: int

    def accept(self) -> Remote:
        """Accept a connection within the deadline."""
        return Remote(self.worker, self.worker.call(_accept, self.number))

    def names(self) -> tuple[Address, Address]:
        """Its own and its peer's address and port."""
        return self.worker.call(_names, self.number)

    def send(self, stream: int, size: int, write: int = 16384) -> None:
        """Send the next `size` bytes of `stream` in writes of `write` bytes."""
        self.submit_send(stream, size, write).result(CALL_DEADLINE)

    def submit_send(self, stream: int, size: int, write: int = 16384) -> Future[None]:
        """Begin to send as `send` does."""
        return self.worker.submit(_send, self.number, stream, size, write)

    def fill(self, stream: int, write: int, most: int, quiet: float = 0.5) -> int:
        """Send without blocking until `most` bytes or until nothing is taken for `quiet` seconds.

        Returns the total of all bytes sent so far.
        """
        return self.worker.call(_fill, self.number, stream, write, most, quiet)

    def receive(self, stream: int, size: int, deadline: float = _DEADLINE) -> None:
        """Receive the next `size` bytes of `stream`.

        Raises WrongBytesError when they are not right, EOFError when the stream ends before,
        BlockingIOError when nothing comes for `deadline` seconds.
        """
        self.submit_receive(stream, size, deadline).result(CALL_DEADLINE)

    def submit_receive(self, stream: int, size: int, deadline: float = _DEADLINE) -> Future[None]:
        """Begin to receive as `receive` does."""
        return self.worker.submit(_receive, self.number, stream, size, deadline)

    def submit_read(self, stream: int, size: int, deadline: float, flags: int = 0) -> Future[None]:
        """Begin one single recv call that has to return all `size` next bytes of `stream`."""
        return self.worker.submit(_read, self.number, stream, size, deadline, flags)

    def sleeps_in_recv(self) -> bool:
        """Whether a thread of the worker is inside a recv call on this socket now."""
        return self._sleeps_in(_RECVFROM)

    def sleeps_in_send(self) -> bool:
        """Whether a thread of the worker is inside a send call on this socket now."""
        return self._sleeps_in(_SENDTO)

    def sleeps_in_shutdown(self) -> bool:
        """Whether a thread of the worker is inside a shutdown call on this socket now."""
        return self._sleeps_in(_SHUTDOWN)

    def _sleeps_in(self, call: str) -> bool:
        for task in Path(f"/proc/{self.worker.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                number, *arguments = (task / "syscall").read_text().split()
                if number == call and int(arguments[0], 16) == self.number:
                    return True
        return False

    def queues(self) -> tuple[int, int]:
        """Bytes that TCP has not had acknowledged, bytes that TCP holds for the reader; IPv4."""
        ports = tuple(port for _, port in self.names())
        for line in Path(f"/proc/{self.worker.pid}/net/tcp").read_text().splitlines()[1:]:
            _, local, remote, _, queues, *_ = line.split()
            if tuple(int(end.rpartition(":")[2], 16) for end in (local, remote)) == ports:
                unacknowledged, unread = queues.split(":")
                return int(unacknowledged, 16), int(unread, 16)
        text = f"no TCP socket with ports {ports}"
        raise AssertionError(text)

    def connect_again(self, to: Address) -> None:
        """Disconnect (connect to AF_UNSPEC) and connect to `to`; its streams begin anew."""
        self.worker.call(_connect_again, self.number, to)

    def listen_again(self) -> None:
        """Disconnect (connect to AF_UNSPEC) and listen on the port that it was bound to."""
        self.worker.call(_listen_again, self.number)

    def set_option(self, level: int, option: int, value: bytes | int) -> None:
        """Call setsockopt."""
        self.worker.call(_set_option, self.number, level, option, value)

    def option(self, level: int, option: int) -> int:
        """Call getsockopt for a number."""
        return self.worker.call(_option, self.number, level, option)

    def shut(self) -> None:
        """Half-close: shutdown(SHUT_WR)."""
        self.submit_shut().result(CALL_DEADLINE)

    def submit_shut(self) -> Future[None]:
        """Begin to half-close as `shut` does."""
        return self.worker.submit(_shut, self.number)

    def expect_eof(self) -> None:
        """Fail unless the next thing that comes is EOF."""
        self.worker.call(_expect_eof, self.number)

    def close(self, *, reset: bool = False) -> None:
        """Close it, with an RST if asked to."""
        self.worker.call(_close, self.number, reset=reset)


def listen(
    worker: Worker,
    address: Address,
    *,
    reuse_port: bool = False,
    fast_open: bool = False,
    protocol: int = socket.IPPROTO_TCP,
    backlog: int = 1024,
    options: Options = (),
) -> Remote:
    """Open a listening socket in the worker, with `options` set first; "::" takes IPv4 too."""
    number = worker.call(
        _listen,
        address,
        reuse_port=reuse_port,
        fast_open=fast_open,
        protocol=protocol,
        backlog=backlog,
        options=options,
    )
    return Remote(worker, number)


def connect(
    worker: Worker,
    to: Address,
    source: Address | None = None,
    *,
    deferred: bool = False,
    fast_open: int = 0,
    protocol: int = socket.IPPROTO_TCP,
    options: Options = (),
) -> Remote:
    """Connect a socket of the worker, with `options` set and bound to `source` first.

    `deferred` sets TCP_DEFER_ACCEPT; `fast_open` is a stream whose first bytes go in the SYN.
    """
    number = worker.call(
        _connect,
        to,
        source,
        deferred=deferred,
        fast_open=fast_open,
        protocol=protocol,
        options=options,
    )
    return Remote(worker, number)


def begin_connect(worker: Worker, to: Address) -> Remote:
    """Send a SYN to `to` and do not wait for its answer; the socket blocks again afterwards."""
    return Remote(worker, worker.call(_begin_connect, to))


def hide(worker: Worker, address: Address) -> tuple[Remote, Remote]:
    """A socket and a listener in a namespace that nothing but these two keeps alive."""
    near, listener = worker.call(_hide, address)
    return Remote(worker, near), Remote(worker, listener)


def accept_any(listeners: list[Remote]) -> Remote:
    """Accept the one connection that waits at one of the listeners."""

    def accept_one() -> Remote | None:
        for listener in listeners:
            if listener.worker.call(_waiting, listener.number):
                return listener.accept()
        return None

    found = wait_until(accept_one, "a connection at one of the listeners")
    assert found is not None
    return found


def couple(
    client: Worker,
    server: Worker,
    to: Address,
    source: Address | None = None,
    listen_on: Address | None = None,
) -> tuple[Remote, Remote]:
    """Listen on `listen_on` (or `to`), connect to `to`, accept, stop listening: both ends."""
    listener = listen(server, listen_on or to)
    near = connect(client, to, source)
    far = listener.accept()
    listener.close()
    return near, far


def exchange(
    near: Remote, far: Remote, stream: int, rounds: int = 4, deadline: float = _DEADLINE
) -> None:
    """Send and check `ROUND` bytes each way, `rounds` times: streams `stream` and the next."""
    for _ in range(rounds):
        near.send(stream, ROUND)
        far.receive(stream, ROUND, deadline)
        far.send(stream + 1, ROUND)
        near.receive(stream + 1, ROUND, deadline)


def _timeout(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))


def _keep(sock: socket.socket) -> int:
    left = _timeout(_DEADLINE)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, left)
    _SOCKETS[sock.fileno()] = sock
    return sock.fileno()


def _listen(
    address: Address,
    *,
    reuse_port: bool,
    fast_open: bool,
    protocol: int,
    backlog: int = 1024,
    options: Options = (),
) -> int:
    listener = socket.socket(family_of(address[0]), socket.SOCK_STREAM, protocol)
    for option in options:
        listener.setsockopt(*option)
    if fast_open:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse_port:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if listener.family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind(_scoped(address))
    listener.listen(backlog)
    return _keep(listener)


def _waiting(number: int) -> bool:
    return bool(select.select([_SOCKETS[number]], [], [], 0)[0])


def _connect(
    to: Address,
    source: Address | None,
    *,
    deferred: bool,
    fast_open: int,
    protocol: int,
    options: Options = (),
) -> int:
    sock = socket.socket(family_of(to[0]), socket.SOCK_STREAM, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if deferred:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
    for option in options:
        sock.setsockopt(*option)
    number = _keep(sock)
    if source is not None:
        sock.bind(source)
    if fast_open:
        first = content(fast_open, 0, IN_SYN)
        _SENT[number] = sock.sendto(first, socket.MSG_FASTOPEN, to)
    else:
        sock.connect(_scoped(to))
    return number


def _scoped(address: Address) -> tuple[Any, ...]:
    """With the number of the interface, if the address names one ("fe80::1%eth0")."""
    if "%" not in address[0]:
        return address
    return socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][4]


def _hide(address: Address) -> tuple[int, int]:
    """Enter a new namespace; the calling thread, which alone is in it, ends with the call."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    near = socket.socket(family_of(address[0]), socket.SOCK_STREAM)
    listener = _listen(address, reuse_port=False, fast_open=False, protocol=socket.IPPROTO_TCP)
    return _keep(near), listener


def _begin_connect(to: Address) -> int:
    sock = socket.socket(family_of(to[0]), socket.SOCK_STREAM)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        sock.connect(to)
    sock.setblocking(True)
    return _keep(sock)


def _disconnect(number: int) -> socket.socket:
    sock = _SOCKETS[number]
    nowhere = struct.pack("=H14x", socket.AF_UNSPEC)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.connect(sock.fileno(), nowhere, len(nowhere)):
        raise OSError(ctypes.get_errno(), "disconnect")
    for state in (_SENT, _SINKS):
        state.pop(number, None)
    return sock


def _connect_again(number: int, to: Address) -> None:
    _disconnect(number).connect(to)


def _listen_again(number: int) -> None:
    _disconnect(number).listen()


def _set_option(number: int, level: int, option: int, value: bytes | int) -> None:
    _SOCKETS[number].setsockopt(level, option, value)


def _option(number: int, level: int, option: int) -> int:
    return _SOCKETS[number].getsockopt(level, option)


def _accept(number: int) -> int:
    sock, _ = _SOCKETS[number].accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return _keep(sock)


def _names(number: int) -> tuple[Address, Address]:
    sock = _SOCKETS[number]
    mine, peer = sock.getsockname(), sock.getpeername()
    return (mine[0], mine[1]), (peer[0], peer[1])


def _send(number: int, stream: int, size: int, write: int) -> None:
    last = _SENT.get(number, 0) + size
    while (offset := _SENT.get(number, 0)) < last:
        taken = _SOCKETS[number].send(content(stream, offset, min(write, last - offset)))
        _SENT[number] = offset + taken


def _fill(number: int, stream: int, write: int, most: int, quiet: float) -> int:
    sock = _SOCKETS[number]
    poller = select.poll()
    poller.register(sock, select.POLLOUT)
    offset = _SENT.get(number, 0)
    while offset < most:
        try:
            part = content(stream, offset, min(write, most - offset))
            offset += sock.send(part, socket.MSG_DONTWAIT)
        except BlockingIOError:
            if not poller.poll(quiet * 1000):
                break
    _SENT[number] = offset
    return offset


def _receive(number: int, stream: int, size: int, deadline: float) -> None:
    _SOCKETS[number].setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeout(deadline))
    sink = _SINKS.setdefault(number, Sink(stream))
    last = sink.offset + size
    end = time.monotonic() + deadline
    while sink.offset < last:
        try:
            data = _SOCKETS[number].recv(min(65536, last - sink.offset))
        except BlockingIOError:
            # a reader in a sockmap that is woken for nothing gets EAGAIN
            if time.monotonic() > end:
                raise
            continue
        if not data:
            text = f"stream {stream:#x}: EOF at offset {sink.offset} of {last}"
            raise EOFError(text)
        sink.feed(data)


def _read(number: int, stream: int, size: int, deadline: float, flags: int) -> None:
    sock = _SOCKETS[number]
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeout(deadline))
    data = sock.recv(size, flags)
    _SINKS.setdefault(number, Sink(stream)).feed(data)
    if len(data) != size:
        text = f"{len(data)} bytes of {size}"
        raise EOFError(text)


def _shut(number: int) -> None:
    _SOCKETS[number].shutdown(socket.SHUT_WR)


def _expect_eof(number: int) -> None:
    data = _SOCKETS[number].recv(65536)
    if data:
        text = f"{len(data)} bytes instead of EOF"
        raise AssertionError(text)


def _close(number: int, *, reset: bool) -> None:
    sock = _SOCKETS.pop(number)
    for state in (_SENT, _SINKS):
        state.pop(number, None)
    if reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
