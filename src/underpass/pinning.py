"""A pin directory's life: the lock beside it, the scratch directory that it is made in, its end."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from underpass import libbpf
from underpass.errors import KernelError, UnderpassError

_AT_FDCWD, _EXCHANGE = -100, 2
#: Pins that hold a program attached: sock_ops, sk_msg, cgroup_skb; by program, the watchers.
LINK, MAP_LINK, LATE_LINK = "link_handshake", "link_steer", "link_late"
WATCH_LINKS = {"up_watch": "link_watch", "up_uring": "link_uring"}
#: Without this pin a directory is no generation.
ABOUT = "about"


def scratch(pins: Path) -> Path:
    """Where the pins are made before they are renamed."""
    return pins.with_name(f"{pins.name}-scratch")  # bpffs refuses names with a dot


def lock(pins: Path) -> Path:
    """The directory that :func:`locked` locks."""
    return pins.with_name(f"{pins.name}-lock")


def remove(directory: Path) -> None:
    """Unpin all that is in ``directory`` and remove it; nothing there is no error.

    What is attached goes first, then what makes it a generation: cut short in between, it steers
    nothing, and the next command sees that it is to be cleared.

    Raises:
        KernelError: something in it is a directory, or it cannot be written.
    """
    if not directory.is_dir():
        return
    at = directory
    try:
        for at in sorted(directory.iterdir(), key=_order):
            at.unlink()
        directory.rmdir()
    except OSError as error:
        raise KernelError("unpin", at, error.errno or 0, "remove it by hand") from None


def _order(pin: Path) -> int:
    first = (LINK, LATE_LINK, *WATCH_LINKS.values(), ABOUT)
    return first.index(pin.name) if pin.name in first else len(first)


@contextlib.contextmanager
def locked(pins: Path, seconds: float = 60.0) -> Iterator[None]:
    """One ``up`` or ``down`` at a time for ``pins``: a lock.

    It is on a directory beside it, which goes with the last holder.
    """
    path = lock(pins)
    deadline = time.monotonic() + seconds
    while True:
        try:
            path.mkdir(mode=0o700, exist_ok=True)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # its last holder has just removed it
        except OSError as error:
            step = "run as root" if isinstance(error, PermissionError) else "check bpffs"
            raise KernelError("lock", pins, error.errno or 0, step) from None
        with libbpf.Fd(fd):
            if not _flock(fd):
                if time.monotonic() > deadline:
                    cause = "another up or down is at work on it"
                    raise UnderpassError("lock", pins, cause, "try again when it has finished")
                time.sleep(0.02)
                continue
            if not path.exists() or path.stat().st_ino != os.fstat(fd).st_ino:
                continue  # removed before we had it
            try:
                yield
            finally:
                path.rmdir()
            return


@contextlib.contextmanager
def alone(pins: Path) -> Iterator[None]:
    """One pass of ``adopt`` at a time; it does not keep ``up`` and ``down`` waiting."""
    fd = os.open(pins, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with libbpf.Fd(fd):
        if not _flock(fd):
            step = "try again when it has finished"
            raise UnderpassError("adopt for", pins, "another pass is at work", step)
        yield


def _flock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def exchange(one: Path, other: Path) -> None:
    """Let two pin directories swap names in one step (``RENAME_EXCHANGE``, bpffs since 5.16)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE):
        raise KernelError("exchange", one, ctypes.get_errno(), "check bpffs")
