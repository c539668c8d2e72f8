"""The cgroup-v2 hierarchy as pods are found in it. Reads the file system, no BPF."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from underpass import pod

# <sys/inotify.h>
_CREATE, _DELETE, _MOVED, _DELETE_SELF, _ONLY_DIRECTORIES = 0x100, 0x200, 0xC0, 0x400, 0x1000000
#: Levels below the root at which the pods' own cgroup is looked for ("kubelet/kubepods").
_DEPTH = 2


@dataclass(frozen=True)
class Found:
    """What a look at the hierarchy shows; paths are below its root, numbers the kernel's ids.

    Attributes:
        pods: uid -> path and id.
        keeping: path -> id of the cgroups that pods are made in.
        others: path -> id of cgroups beside those; what is below them is in no pod.
    """

    pods: dict[str, tuple[str, int]] = field(default_factory=dict)
    keeping: dict[str, int] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)


def find(root: Path) -> Found:
    """Look at the hierarchy.

    Args:
        root: where cgroup v2 is mounted.
    """
    found = Found()
    _look(root, "", _DEPTH, found)
    return found


def _look(root: Path, path: str, depth: int, found: Found) -> bool:
    """Take in what is in one cgroup; True if pods are made in it or below."""
    has, beside = pod.keeps_pods(path), {}
    for name, number in _children(root / path):
        below = f"{path}/{name}" if path else name
        if uid := pod.place(below).uid:
            found.pods[uid] = below, number
        elif pod.keeps_pods(below):
            found.keeping[below] = number
            has = True
            _look(root, below, 0, found)
        elif depth and _look(root, below, depth - 1, found):
            has = True
        else:
            beside[below] = number
    if has or not path:
        found.others.update(beside)
    return has


def _children(directory: Path) -> Iterator[tuple[str, int]]:
    with contextlib.suppress(OSError), os.scandir(directory) as entries:  # it may have gone
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield entry.name, entry.inode()


class Births:
    """Tells when a cgroup is made or removed right in some others (inotify).

    Raises:
        OSError: the kernel has no more of these to give.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def watch(self, paths: Iterable[str]) -> None:
        """Watch these, too; one that has gone and come again is to be named again."""
        for path in paths:
            flags = _CREATE | _DELETE | _MOVED | _DELETE_SELF | _ONLY_DIRECTORIES
            self._libc.inotify_add_watch(self._fd, os.fsencode(self._root / path), flags)

    def fileno(self) -> int:
        """Readable when something has happened; :meth:`drain` makes it wait again."""
        return int(self._fd)

    def drain(self) -> None:
        """See :meth:`fileno`."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._fd, 1 << 16):
                pass

    def close(self) -> None:
        """Watch no more."""
        os.close(self._fd)


def number(root: Path, path: str) -> int:
    """The kernel's id of a cgroup; 0 if there is none of this name."""
    try:
        status = (root / path).stat()
    except OSError:
        return 0
    return status.st_ino


def lineage(root: Path, path: str) -> tuple[int, ...]:
    """Ids of a cgroup and of those above it, the nearest first, without the root."""
    parts = path.split("/") if path else []
    every = ("/".join(parts[:depth]) for depth in range(len(parts), 0, -1))
    return tuple(number(root, above) for above in every)


def processes(root: Path, path: str) -> Iterator[tuple[int, str]]:
    """Processes in a cgroup and below, with the path of the one that each is in."""
    for directory, _, _ in os.walk(root / path):
        with contextlib.suppress(OSError):
            at = str(Path(directory).relative_to(root))
            for word in Path(directory, "cgroup.procs").read_text().split():
                if word != "0":  # one that cannot be seen from this pid namespace
                    yield int(word), at


def of_process(pid: int | str) -> str:
    """The path of a process's cgroup-v2; empty at the root, or if it has gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                return line[3:].strip("/")
    return ""


def net_namespace(pid: int | str) -> int:
    """Inode of a process's network namespace; 0 if it has gone."""
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino
    except OSError:
        return 0
