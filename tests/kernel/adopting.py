"""What tests of `adopt` share: ends that it has to take in or to leave alone, and what it says."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator

from tests.kernel.bed import SERVER4, Bed
from tests.kernel.remote import _SOCKETS, Remote, exchange
from underpass.adoption import Outcome
from underpass.generation import Dataplane
from underpass.torture.plans import KIB, MIB
from underpass.torture.worker import Place

ADDRESS = (SERVER4, 8080)
#: That `exchange` sends.
MESSAGES = 8
_FLYING: list[socket.socket] = []


def reasons(outcomes: list[Outcome]) -> list[str]:
    """The words of a pass's reasons, in order."""
    return sorted(outcome.reason.word for outcome in outcomes)


def shortcut(underpass: Dataplane) -> int:
    """Messages that went by the shortcut so far."""
    return underpass.counters().shortcut_messages_total


def goes_by_the_shortcut(underpass: Dataplane, near: Remote, far: Remote) -> None:
    """Fail unless all that both ends say goes by the shortcut, and is right."""
    exchange(near, far, 1)  # whoever slept in a native read has woken
    before = shortcut(underpass)
    exchange(near, far, 1)
    assert shortcut(underpass) == before + MESSAGES


@contextlib.contextmanager
def in_flight(sock: Remote) -> Iterator[None]:
    """A reference to a socket's file that no process has open: it is on its way to one."""
    sock.worker.call(_send_descriptor, sock.number)
    yield
    sock.worker.call(_land)


def _land() -> None:
    _FLYING.clear()


def _send_descriptor(number: int) -> None:
    _FLYING.extend(socket.socketpair(socket.AF_UNIX))
    socket.send_fds(_FLYING[0], [b"x"], [_SOCKETS[number].fileno()])


@contextlib.contextmanager
def program(bed: Bed, where: str, code: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python program of its own in a namespace, given `ADDRESS` and `words`."""
    place = Place(bed.netns[where], bed.cgroup)
    command = [sys.executable, "-c", code, *map(str, ADDRESS), *words]
    with subprocess.Popen(
        command,
        preexec_fn=place.enter,  # noqa: PLW1509
        stdout=subprocess.PIPE,
    ) as running:
        try:
            yield running
        finally:
            running.kill()


# What workers do.


def pump(number: int, size: int) -> None:
    """Stream until the socket is shut."""
    data = bytes(size)
    with contextlib.suppress(OSError):
        while True:
            _SOCKETS[number].send(data)


def drink(number: int) -> None:
    """Read until the end; where two read, the kernel wakes one of them for nothing."""
    while True:
        with contextlib.suppress(BlockingIOError):
            if not _SOCKETS[number].recv(MIB):
                return


def say(number: int, data: bytes) -> None:
    """Send it all."""
    _SOCKETS[number].sendall(data)


def hear_once(number: int) -> int:
    """One recv call; how many bytes it brought."""
    return len(_SOCKETS[number].recv(4 * KIB))


def hear(number: int, size: int) -> bytes:
    """Receive until `size` bytes are there."""
    data = b""
    while len(data) < size:
        data += _SOCKETS[number].recv(size - len(data))
    return data


def hear_line(number: int) -> bytes:
    """Receive until a line is there."""
    data = b""
    while not data.endswith(b"\n"):
        data += _SOCKETS[number].recv(4 * KIB)
    return data
