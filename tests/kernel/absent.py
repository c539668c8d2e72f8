"""A page of a worker's memory that is not there until the test says so, by userfaultfd(2).

A system call that copies to it sleeps in the page fault, with every lock that it holds.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import select
import struct
from concurrent.futures import Future
from dataclasses import dataclass

from tests.kernel import remote
from tests.kernel.remote import Remote
from underpass.torture.content import Sink
from underpass.torture.patience import patient
from underpass.torture.worker import Worker

_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_API, _UFFDIO_API = 0xAA, 0xC018AA3F
_MODE_MISSING, _UFFDIO_REGISTER = 1, 0xC020AA00
_EVENT_BYTES = 32
_PAGES: dict[int, mmap.mmap] = {}


@dataclass(frozen=True)
class AbsentPage:
    """A page of the worker's; the kernel alone may touch it before it is provided."""

    worker: Worker
    number: int

    def submit_read(self, end: Remote, stream: int, size: int) -> Future[None]:
        """Begin one single recv call of `size` next bytes of `stream` into the page."""
        return self.worker.submit(_read, self.number, end.number, stream, size)

    def wait_touched(self, deadline: float = patient(20.0)) -> None:
        """Wait until somebody sleeps for the page; TimeoutError after `deadline`."""
        self.worker.call(_wait_touched, self.number, deadline)

    def provide(self) -> None:
        """Let the page be there, as any other is: who sleeps for it goes on."""
        self.worker.call(_provide, self.number)


def absent_page(worker: Worker) -> AbsentPage:
    """Make such a page in the worker; it ends with the worker at the latest."""
    return AbsentPage(worker, worker.call(_make))


def why_not() -> str | None:
    """Why this machine cannot have such pages, if it cannot."""
    try:
        os.close(_open())
    except OSError as error:
        return f"userfaultfd: {error.strerror}"
    return None


def _open() -> int:
    number = _USERFAULTFD.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"its number on {platform.machine()} is not known here")
    libc = ctypes.CDLL(None, use_errno=True)
    opened: int = libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK)
    if opened < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return opened


def _make() -> int:
    number = _open()
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    at = ctypes.addressof(ctypes.c_char.from_buffer(page))
    fcntl.ioctl(number, _UFFDIO_API, struct.pack("=QQQ", _API, 0, 0))
    wanted = struct.pack("=QQQQ", at, mmap.PAGESIZE, _MODE_MISSING, 0)
    fcntl.ioctl(number, _UFFDIO_REGISTER, wanted)
    _PAGES[number] = page
    return number


def _read(number: int, sock: int, stream: int, size: int) -> None:
    page = _PAGES[number]
    taken = remote._SOCKETS[sock].recv_into(page, size)
    remote._SINKS.setdefault(sock, Sink(stream)).feed(page[:taken])
    if taken != size:
        text = f"{taken} bytes of {size}"
        raise EOFError(text)


def _wait_touched(number: int, deadline: float) -> None:
    poller = select.poll()
    poller.register(number, select.POLLIN)
    if not poller.poll(deadline * 1000):
        text = f"nobody touched the page for {deadline:g} s"
        raise TimeoutError(text)
    os.read(number, _EVENT_BYTES)


def _provide(number: int) -> None:
    os.close(number)  # unregisters the page and wakes who sleeps for it
