"""Descriptors that go from one worker to another, as socket activation hands them on."""

from __future__ import annotations

import ctypes
import os
import socket

from tests.kernel import remote
from tests.kernel.remote import Remote
from underpass.torture.worker import Worker

_PIDFD_GETFD = 438  # the same on every architecture


def hand_on(held: Remote, to: Worker) -> Remote:
    """A socket of one worker, held by another, too."""
    fd = held.worker.call(_descriptor, held.number)
    return Remote(to, to.call(_take, held.worker.pid, fd))


def _descriptor(number: int) -> int:
    return remote._SOCKETS[number].fileno()


def _take(pid: int, fd: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(pid)
    try:
        taken = libc.syscall(_PIDFD_GETFD, process, fd, 0)
    finally:
        os.close(process)
    if taken < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return remote._keep(socket.socket(fileno=taken))
