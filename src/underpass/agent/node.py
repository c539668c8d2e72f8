"""What the loop asks of the node, and does to it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from underpass import abi, dataplane, libbpf, namespaces
from underpass.agent.plan import Seen
from underpass.errors import NotLoaded
from underpass.generation import Dataplane


def stamp(path: Path | None) -> tuple[int, int] | None:
    """What changes when another file is put in the place of this one."""
    with contextlib.suppress(OSError):
        found = path.stat() if path else None
        return (found.st_ino, found.st_mtime_ns) if found else None
    return None


def look(pins: Path) -> Seen:
    """What is pinned there.

    Raises:
        UnderpassError: it cannot be told, as one of another version's ABI.
    """
    try:
        with Dataplane.open(pins) as plane:
            return Seen(plane.state, plane.number, plane.attached)
    except NotLoaded:
        return Seen("absent")


class Planes:
    """The generations that hold pairs, open from one turn of the loop to the next: opening is dear.

    For one thread. It does not keep alive for long what `underpass down` has taken away.
    """

    def __init__(self, pins: Path) -> None:
        self._pins = pins
        self._open = contextlib.ExitStack()
        self._planes: list[Dataplane] = []
        self._known: list[tuple[Path, int]] = []

    def get(self) -> list[Dataplane]:
        """The one in charge first.

        Raises:
            NotLoaded: there is none any more.
            UnderpassError: it is none of ours.
        """
        now = [(path, _inode(path)) for path in dataplane.generations(self._pins)]
        if now != self._known or not self._planes:
            self.close()
            self._planes = self._open.enter_context(dataplane.opened(self._pins))
            self._known = now
        return self._planes

    def look(self) -> Seen:
        """What is pinned; see :func:`look`."""
        try:
            plane = self.get()[0]
        except NotLoaded:
            return Seen("absent")
        return Seen(plane.state, plane.number, plane.attached)

    def close(self) -> None:
        """Hold nothing open."""
        self._open.close()
        self._planes, self._known = [], []


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def arm(plane: Dataplane, places: list[namespaces.NetNamespace]) -> int:
    """Arm the listeners of some namespaces; how many were not armed before."""
    walk, fresh = plane.fd("up_arm"), 0
    for each in places:
        data = namespaces.in_namespace(each, lambda: libbpf.iterate(walk))
        fresh += sum(not record.armed for record in abi.records(data or b""))
    if fresh:
        plane.arm_listeners()  # rare: who listens there, the guard has to be told
    return fresh
