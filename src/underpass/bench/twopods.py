"""Two pods and a bridge for `calibrate`, made without a program and without a name: for containers.

The namespaces are held by files of this process, so they go with it however it ends.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from underpass import namespaces
from underpass.bench import bed, links
from underpass.bench.processes import Group
from underpass.bench.way import CLIENT_ADDRESS, SERVER_ADDRESS
from underpass.errors import KernelError, UnderpassError

_PREFIX = 24


@dataclass(frozen=True)
class TwoPods:
    """Where streams are measured; a ``calibrate.Place``.

    Attributes:
        pins: of the generation to measure by; not made here.
        shortcut: cgroup to attach to; ``default``: beside it.
        netns: what opens the client's and the server's network namespace.
    """

    pins: Path
    shortcut: Group
    default: Group
    netns: tuple[Path, Path]


@contextmanager
def made(cgroup_root: Path) -> Iterator[TwoPods]:
    """Make them; names that remain after a kill are those of ``bed.sweep``.

    Raises:
        UnderpassError: cgroups, namespaces or interfaces cannot be made here.
    """
    cgroup = cgroup_root / bed.name()
    with ExitStack() as undo:
        groups = [Group(cgroup), Group(cgroup / "shortcut"), Group(cgroup / "default")]
        for group in groups:
            undo.enter_context(group)
        switch, client, server = (_namespace(undo) for _ in range(3))
        _within(switch, partial(links.add_bridge, "br0"))
        for port, pod, address in (("va", client, CLIENT_ADDRESS), ("vb", server, SERVER_ADDRESS)):
            _within(switch, partial(links.add_veth, port, "br0", "eth0", pod))
            _within(pod, partial(_wire, address))
        here = f"/proc/{os.getpid()}/fd"
        netns = (Path(here, str(client)), Path(here, str(server)))
        yield TwoPods(bed.pins(), groups[1], groups[2], netns)


def _wire(address: str) -> None:
    links.set_up("lo")
    links.add_address("eth0", address, _PREFIX)
    links.set_up("eth0")


def _namespace(undo: ExitStack) -> int:
    """A new network namespace: a file that holds it."""
    made: list[int] = []
    libc = ctypes.CDLL(None, use_errno=True)

    def make() -> None:
        if libc.unshare(namespaces.CLONE_NEWNET):
            made.append(-ctypes.get_errno())
        else:
            made.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if not made or made[0] < 0:
        code = -made[0] if made else 0
        raise KernelError("make", "a network namespace", code, "run as root, with CAP_SYS_ADMIN")
    undo.callback(os.close, made[0])
    return made[0]


def _within(netns: int, action: Callable[[], None]) -> None:
    inode = os.fstat(netns).st_ino
    place = namespaces.NetNamespace(inode, f"/proc/self/fd/{netns}", None)

    def done() -> bool:
        action()
        return True

    if not namespaces.in_namespace(place, done):
        raise UnderpassError("enter", place.label, "it has gone", "run it again")
