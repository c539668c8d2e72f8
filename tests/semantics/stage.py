"""Where a row is played: connections on the loopback of one process, and words for what happens."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.kernel.waiting import wait_until
from underpass.dataplane import Dataplane

LOCALHOST = "127.0.0.1"
BLOCKS = "blocks"
MIB = 1 << 20


def said(call: Callable[[], object]) -> str:
    """What a call gave, in words: bytes, a number, nothing, or the name of its error."""
    try:
        result = call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    if isinstance(result, bytes):
        return f"{len(result)} bytes" if result else "end of file"
    return "done" if result is None else str(result)


class Call(threading.Thread):
    """A call that may block, under way in a thread."""

    def __init__(self, call: Callable[[], object], patience: float) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._patience = patience
        self._outcome = ""
        self.start()

    def run(self) -> None:
        self._outcome = said(self._call)

    def asleep(self) -> Call:
        """Wait until it sleeps in the kernel, and not for Python's own lock."""
        where = Path(f"/proc/self/task/{self.native_id}/wchan")

        def sleeps() -> bool:
            assert self.is_alive(), f"it does not block: {self._outcome}"
            at = where.read_text()
            return at != "0" and "futex" not in at

        wait_until(sleeps, "the call sleeps", 5)
        return self

    def outcome(self) -> str:
        """What it gave, or that it blocks."""
        self.join(self._patience)
        return BLOCKS if self.is_alive() else self._outcome


class Stage:
    """One row's surroundings."""

    def __init__(self, plane: Dataplane | None, patience: float) -> None:
        self._plane = plane
        self._before = self._total()
        self.patience = patience
        """Seconds after which a call that has not returned counts as blocked."""

    def _total(self) -> int:
        return self._plane.counters().shortcut_bytes_total if self._plane else 0

    def carried(self) -> int:
        """Bytes that went by the shortcut since the row's connection was settled."""
        return self._total() - self._before

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """A client and its server, both on the shortcut already where there is one."""
        with socket.create_server((LOCALHOST, 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            server, _ = listener.accept()
        for sock in (client, server):  # or small writes wait for an acknowledgement
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.settle(client, server)
        return client, server

    def settle(self, client: socket.socket, server: socket.socket) -> None:
        """Bring both directions to the shortcut: what is carried counts from here."""

        def carries() -> bool:
            before = self._total()
            for one, other in ((client, server), (server, client)):
                one.sendall(b"?")
                other.recv(1)
            return not self._plane or self._total() == before + 2

        wait_until(carries, "both directions take the shortcut", 5)
        self._before = self._total()

    @contextlib.contextmanager
    def by_tcp(self) -> Iterator[None]:
        """What is sent meanwhile goes by TCP, though the pair stays one."""
        if self._plane:
            self._plane.set_paused(True)
        try:
            yield
        finally:
            if self._plane:
                self._plane.set_paused(False)

    def begin(self, call: Callable[[], object]) -> Call:
        """Start a call that may block."""
        return Call(call, self.patience)

    def told(self, call: Callable[[], object]) -> str:
        """What a call that may block gave, or that it blocks."""
        return self.begin(call).outcome()

    def polled(self, sock: socket.socket, events: int, patience: float | None = None) -> str:
        """The events that poll tells of within `patience` seconds."""
        poller = select.poll()
        poller.register(sock, events)
        found = poller.poll((self.patience if patience is None else patience) * 1000)
        return events_said(found[0][1] if found else 0)


def events_said(events: int) -> str:
    """Names of poll or epoll events."""
    names = ("IN", "PRI", "OUT", "ERR", "HUP", "RDHUP")
    masks = (getattr(select, f"EPOLL{name}") for name in names)
    found = [name for name, mask in zip(names, masks, strict=True) if events & mask]
    return " ".join(found) or "nothing"


def read_all(sock: socket.socket, size: int) -> bytes:
    """The next `size` bytes, or fewer if the stream ends."""
    data = bytearray()
    while len(data) < size and (part := sock.recv(min(size - len(data), MIB))):
        data += part
    return bytes(data)


def fill(sock: socket.socket, most: int = 64 * MIB) -> int:
    """Write without blocking until no more is taken, or `most` bytes; returns the number taken."""
    block, sent = bytes(64 << 10), 0
    with contextlib.suppress(BlockingIOError):
        while sent < most:
            sent += sock.send(block, socket.MSG_DONTWAIT)
    return sent


def reset(sock: socket.socket) -> None:
    """Close with an RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def set_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    """Set SO_RCVTIMEO or SO_SNDTIMEO."""
    packed = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, option, packed)


def forked(body: Callable[[], object]) -> int:
    """Run `body` in a child process; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            body()
        finally:
            os._exit(0)
    return child


def set_up(*command: str) -> None:
    """Run a command inside the row's network namespace; raises CalledProcessError."""
    subprocess.run(command, check=True, capture_output=True)
