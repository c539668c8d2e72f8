"""Listeners in network namespaces that nobody could see as the agent came up."""

from __future__ import annotations

import ctypes
import fcntl
import os
from pathlib import Path

from tests.agent.conftest import StartAgent
from tests.kernel.bed import NETNS, Bed, remove_netns
from tests.kernel.remote import _SOCKETS, hide
from tests.kernel.waiting import wait_until
from underpass.generation import Dataplane

_SIOCGSKNS = 0x894C
_MS_BIND = 4096


def _show(number: int, path: str) -> int:
    """Give the namespace of a socket a name, as `ip netns` would have; its inode."""
    fd = fcntl.ioctl(_SOCKETS[number], _SIOCGSKNS)
    Path(path).touch()
    libc = ctypes.CDLL(None, use_errno=True)
    source = f"/proc/self/fd/{fd}".encode()
    if libc.mount(source, path.encode(), None, _MS_BIND, None):
        raise OSError(ctypes.get_errno(), "bind mount")
    inode = os.fstat(fd).st_ino
    os.close(fd)
    return inode


def _armed(bed: Bed, inode: int) -> list[bool]:
    """Whether the listeners of a namespace are armed."""
    with Dataplane.open(bed.pins) as plane:
        records = plane.everywhere("up_sockets")
        return [bool(r.armed) for r in records if r.netns == inode and r.state == 10]


def test_listeners_of_new_namespaces_are_armed(bed: Bed, agent: StartAgent) -> None:
    """Claim: a listener that stood unseen is armed as soon as its namespace shows.

    The twin, an agent that does not look, leaves it as it was.
    """
    worker = bed.worker("client")
    _, listener = hide(worker, ("127.0.0.1", 8099))
    name = f"{bed.name.replace('underpass-', 'up-')}-shown"
    blind = agent(scan="0")
    blind.wait_ready()
    bed.undo.callback(remove_netns, name)
    inode = worker.call(_show, listener.number, str(NETNS / name))
    assert _armed(bed, inode) == [False]
    assert blind.end() == 0
    assert _armed(bed, inode) == [False]
    remove_netns(name)
    seeing = agent()
    seeing.wait_ready()
    assert worker.call(_show, listener.number, str(NETNS / name)) == inode
    wait_until(lambda: _armed(bed, inode) == [True], "it is armed")
    # other tests' namespaces may come meanwhile; no listener there is in our cgroup
    wait_until(lambda: seeing.events("namespaces"), "it tells")
    assert sum(event["listeners_armed"] for event in seeing.events("namespaces")) == 1
    assert not seeing.events("error")
