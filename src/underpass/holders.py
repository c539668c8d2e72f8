"""Which processes hold a socket, and where their threads are. Reads /proc, no BPF."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

_SAMPLE_SECONDS = 0.01
_KCMP = {"x86_64": 312, "aarch64": 272}
_KCMP_FILES = 2
_FIRST_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO


@dataclass
class Held:
    """A socket, as far as /proc shows.

    Attributes:
        pids: processes that have it open.
        descriptors: by which they have it open.
        threaded: each of them has several threads: then a call on it holds a reference to its file,
            which a single thread does not take (fdget()).
        clear: descriptors are shared by the threads of a process, and by nobody else.
    """

    pids: set[int] = field(default_factory=set)
    descriptors: int = 0
    threaded: bool = True
    clear: bool = True


def processes() -> set[int]:
    """Every process that there is."""
    return {int(entry.name) for entry in Path("/proc").glob("[0-9]*")}


def of_sockets(inodes: set[int], among: Iterable[int]) -> dict[int, Held]:
    """Socket inode -> who of ``among`` holds it, for those of ``inodes`` that one holds."""
    found: dict[int, Held] = defaultdict(Held)
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    for pid in among:
        held = [wanted[target] for target in _open_files(pid) if target in wanted]
        threads = _threads(pid) if held else []
        clear = all(_same_table(pid, tid) for tid in threads)
        for inode in held:
            found[inode].pids.add(pid)
            found[inode].descriptors += 1
            found[inode].threaded &= len(threads) > 1
            found[inode].clear &= clear
    for at in found.values():
        one, *others = sorted(at.pids)
        at.clear &= not any(_same_table(one, other) for other in others)
    return dict(found)


def _open_files(pid: int) -> Iterable[str]:
    directory = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):  # noqa: PTH208 - many thousands, where Path is slow
            with contextlib.suppress(OSError):
                yield os.readlink(f"{directory}/{name}")  # noqa: PTH115


def _same_table(one: int, other: int) -> bool | None:
    """Have two tasks one table of descriptors? None if the kernel does not tell (kcmp(2))."""
    number = _KCMP.get(platform.machine())
    if one == other or number is None:
        return one == other or None
    libc = ctypes.CDLL(None, use_errno=True)
    order = libc.syscall(number, one, other, _KCMP_FILES, 0, 0)
    return None if order < 0 else bool(order == 0)


def numbers_are_global() -> bool:
    """Are threads numbered here as the kernel numbers them? Not in a pid namespace of its own."""
    with contextlib.suppress(OSError):
        return Path("/proc/self/ns/pid").stat().st_ino == _FIRST_PID_NAMESPACE
    return False


def restless(pids: Iterable[int], patience: float, awake: Callable[[int], bool]) -> set[int]:
    """Wait until every thread of some processes has been seen asleep, or to begin a system call.

    A thread that sleeps is no longer on its way through a call to where it would sleep, unless it
    sleeps for a socket's lock on that way.

    Args:
        pids: processes; one that ends has no threads.
        patience: seconds to wait.
        awake: tells of a thread whether it has begun a system call since then.

    Returns:
        Those of ``pids`` of which a thread has done neither.
    """
    deadline = time.monotonic() + patience
    left = {pid: _threads(pid) for pid in set(pids)}
    while True:
        for pid, threads in left.items():
            left[pid] = [tid for tid in threads if not awake(tid) and not _asleep(pid, tid)]
        left = {pid: threads for pid, threads in left.items() if threads}
        if not left or time.monotonic() >= deadline:
            return set(left)
        time.sleep(_SAMPLE_SECONDS)


def _threads(pid: int) -> list[int]:
    own = threading.get_native_id()  # it is right here
    try:
        names = [entry.name for entry in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []
    return [tid for tid in map(int, names) if tid != own]


def _asleep(pid: int, tid: int) -> bool:
    """In a wait for something else than a socket's lock, stopped or gone."""
    task = f"/proc/{pid}/task/{tid}"
    text = _read(f"{task}/stat")
    state = text.rpartition(")")[2].split()[0] if text else "X"
    if state not in "SD":
        return state != "R"
    where = _read(f"{task}/wchan")  # "0" while it still runs, or has just been woken
    return where not in ("", "0") and "lock_sock" not in where


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
