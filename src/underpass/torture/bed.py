"""Pods to torture: namespaces joined by a bridge in one more, a cgroup, a place for pins.

All is named after this process, and removed when it ends; the next run sweeps what a
dead one left.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from underpass import dataplane, namespaces, pinning
from underpass.bench.bed import delete_netns
from underpass.bench.processes import alive, end_members, inside, run_tool
from underpass.errors import UnderpassError
from underpass.torture.schedule import ADDRESS4, ADDRESS6, LOCAL_PORTS, PODS, TCP_BUFFER
from underpass.torture.worker import Place, Worker

_NAME = "underpass-torture-"
_NETNS = "up-torture-"
_SWITCH = "switch"
_SYSCTLS = {
    # many short connections need the ports
    "ipv4/ip_local_port_range": f"{LOCAL_PORTS[0]} {LOCAL_PORTS[1]}",
    "ipv4/tcp_tw_reuse": "1",
    "ipv4/tcp_rmem": f"4096 131072 {TCP_BUFFER}",
    "ipv4/tcp_wmem": f"4096 16384 {TCP_BUFFER}",
}


class Bed:
    """The surroundings of one run; a context manager.

    Attributes:
        cgroup: what the generation is attached to; all workers live there.
        pins: where the generation goes; not made here.
    """

    def __init__(self) -> None:
        self.name = f"{_NAME}{os.getpid()}"
        self.cgroup = namespaces.find_cgroup2() / self.name
        self.pins = namespaces.BPFFS / self.name
        self._stack = contextlib.ExitStack()

    def netns(self, pod: str) -> str:
        """Name under /run/netns of a pod's namespace."""
        return f"{_NETNS}{os.getpid()}-{pod}"

    def __enter__(self) -> Bed:
        with contextlib.ExitStack() as undo:
            undo.callback(_remove_cgroup, self.cgroup)
            try:
                self.cgroup.mkdir()
            except OSError as error:
                cause = error.strerror or str(error)
                raise UnderpassError("make", self.cgroup, cause, "run as root") from None
            for pod in (_SWITCH, *PODS):
                undo.callback(delete_netns, self.netns(pod))
                run_tool(["ip", "netns", "add", self.netns(pod)])
                self._run(pod, "ip", "link", "set", "lo", "up")
                for key, value in _SYSCTLS.items():
                    self._run(pod, "sh", "-c", f"echo {value} >/proc/sys/net/{key}")
            self._run(_SWITCH, "ip", "link", "add", "br0", "type", "bridge")
            self._run(_SWITCH, "ip", "link", "set", "br0", "up")
            for pod in PODS:
                self._plug(pod)
            undo.callback(end_members, self.cgroup)
            self._stack = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def worker(self, pod: str) -> Worker:
        """A new process in the pod; it ends with the calling thread."""
        return Worker(Place(self.netns(pod), self.cgroup))

    def _run(self, pod: str, *command: str) -> None:
        run_tool([*inside(self.netns(pod)), *command])

    def _plug(self, pod: str) -> None:
        port = f"port-{pod}"
        peer = ("peer", "name", "eth0", "netns", self.netns(pod))
        self._run(_SWITCH, "ip", "link", "add", port, "type", "veth", *peer)
        self._run(_SWITCH, "ip", "link", "set", port, "master", "br0", "up")
        self._run(pod, "ip", "addr", "add", f"{ADDRESS4[pod]}/24", "dev", "eth0")
        self._run(pod, "ip", "addr", "add", f"{ADDRESS6[pod]}/64", "dev", "eth0", "nodad")
        self._run(pod, "ip", "link", "set", "eth0", "up")


def _remove_cgroup(cgroup: Path) -> None:
    if cgroup.is_dir():
        end_members(cgroup)
        cgroup.rmdir()


def leftovers(pid: int | None = None) -> list[Path]:
    """What the run of process ``pid`` left behind; without one, what all dead runs did."""
    pattern = re.compile(rf"(?:{_NAME}|{_NETNS})(\d+)(?:-.*)?")
    found = []
    for place in (namespaces.BPFFS, Path("/run/netns"), namespaces.find_cgroup2()):
        for entry in sorted(place.iterdir()) if place.is_dir() else []:
            match = pattern.fullmatch(entry.name)
            if match and (int(match[1]) == pid or (pid is None and not alive(int(match[1])))):
                found.append(entry)
    return found


def sweep() -> None:
    """Remove what dead runs left behind."""
    left = leftovers()
    groups = [path for path in left if path.parent == namespaces.find_cgroup2()]
    for cgroup in groups:
        end_members(cgroup)
    for path in left:
        if path.parent == namespaces.BPFFS:
            remove_pins(path)
        elif path.parent != namespaces.find_cgroup2():
            delete_netns(path.name)
    for cgroup in groups:
        cgroup.rmdir()


def remove_pins(pins: Path) -> None:
    """Take down a generation that no process uses any more, drained or not."""
    with contextlib.suppress(UnderpassError):
        dataplane.down(pins, 5.0)
    pinning.remove(pins)
