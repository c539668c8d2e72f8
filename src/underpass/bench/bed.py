"""Two pods without Kubernetes: two namespaces, veth, a switch in a third. All of our own."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from underpass.bench import switch
from underpass.bench.processes import (
    Group,
    alive,
    end_members,
    inside,
    members,
    remove_group,
    run_tool,
)
from underpass.bench.way import Way
from underpass.errors import UnderpassError

_POD_ADDRESS = "10.99.0.{}"
_CGROUP = "underpass-bench-{}"
_PINS = "/sys/fs/bpf/underpass-bench-{}"
_NETNS = "up-bench-{}-{}"
_DIRECTORY = "underpass-bench-{}"


@dataclass(frozen=True)
class Pod:
    """One network namespace and its address on the bed's bridge."""

    netns: str
    address: str


class Bed:
    """Namespaces, switch, cgroups and a directory, named after this process; a context manager.

    Attributes:
        shortcut: the cgroup to attach to; ``default``: beside it, never attached;
            ``naive``: beside both, for the naive bypass alone.
        pins: where the generation of the benchmark goes; not made here.
        reach: how programs in the two namespaces reach each other.
    """

    def __init__(self, cgroup_root: Path, way: Way) -> None:
        pid = os.getpid()
        self.way = way
        self.client_netns, self.server_netns, self._switch = (
            _NETNS.format(pid, part) for part in ("a", "b", "sw")
        )
        self.pins = pins()
        self.directory = Path(tempfile.gettempdir()) / _DIRECTORY.format(pid)
        self.reach = way.reach(self.directory)
        self.cgroup = cgroup_root / name()
        self._top = Group(self.cgroup)
        self.shortcut = Group(self.cgroup / "shortcut")
        self.default = Group(self.cgroup / "default")
        self.naive = Group(self.cgroup / "naive")
        self._aside = Group(self.cgroup / "aside")
        pods = (self.client_netns, self.server_netns)
        ground = switch.Ground(self._switch, pods, self.directory, self._aside)
        self._between = switch.choose(way, ground)
        self._pods: dict[str, Pod] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Bed:
        self.way.missing()
        self._pods.clear()
        with ExitStack() as undo:
            self.directory.mkdir(mode=0o755)
            undo.callback(shutil.rmtree, self.directory, ignore_errors=True)
            for group in (self._top, self.shortcut, self.default, self.naive, self._aside):
                undo.enter_context(group)
            for netns in (self.client_netns, self.server_netns, self._switch):
                undo.callback(delete_netns, netns)
                add_netns(netns)
            pods = (self.client_netns, self.server_netns)
            for port, netns, address in zip(switch.PORTS, pods, self.way.addresses(), strict=True):
                self._wire(port, netns, address)
            self._between.make()
            self._stack = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def netns(self) -> tuple[Path, Path]:
        """What opens the client's and the server's namespace."""
        return Path("/run/netns", self.client_netns), Path("/run/netns", self.server_netns)

    def cpu_seconds(self) -> float | None:
        """What everything in the bed has used so far, servers and a switch's programs included."""
        return self._top.cpu_seconds()

    def pod(self, name: str) -> Pod:
        """A further pod of this name on the bridge, made at first use and removed with the bed.

        Raises:
            UnderpassError: the way that was chosen is more than a bridge.
        """
        if name not in self._pods:
            if self.way.kind != "bridge":
                raise UnderpassError(
                    "add", f"pod {name}", "pods go on a bridge alone", "say --path bridge"
                )
            number = len(self._pods) + 1
            netns, port = _NETNS.format(os.getpid(), f"p{number}"), f"vp{number}"
            self._stack.callback(delete_netns, netns)
            add_netns(netns)
            pod = Pod(netns, _POD_ADDRESS.format(10 + number))
            self._wire(port, netns, f"{pod.address}/24")
            run_tool([*inside(self._switch), "ip", "link", "set", port, "master", "br0"])
            self._pods[name] = pod
        return self._pods[name]

    def passed(self) -> int:
        """Packets that took the path so far, by its own counter (see ``way.counter``)."""
        return self._between.passed()

    def _wire(self, port: str, netns: str, address: str) -> None:
        peer = ["peer", "name", "eth0", "netns", netns]
        run_tool([*inside(self._switch), "ip", "link", "add", port, "type", "veth", *peer])
        run_tool([*inside(self._switch), "ip", "link", "set", port, "up"])
        ready = ["nodad"] if ":" in address else []
        run_tool([*inside(netns), "ip", "addr", "add", address, "dev", "eth0", *ready])
        run_tool([*inside(netns), "ip", "link", "set", "eth0", "up"])


def name() -> str:
    """Of this process's cgroup."""
    return _CGROUP.format(os.getpid())


def pins() -> Path:
    """Where the generation of this process goes."""
    return Path(_PINS.format(os.getpid()))


def add_netns(name: str) -> None:
    """Add a namespace with a loopback that is up."""
    run_tool(["ip", "netns", "add", name])
    run_tool([*inside(name), "ip", "link", "set", "lo", "up"])


def delete_netns(name: str) -> None:
    """Delete a namespace if it is there."""
    if Path("/run/netns", name).exists():
        run_tool(["ip", "netns", "del", name])


def leftovers(names: list[str]) -> list[int]:
    """The dead processes whose benchmarks left one of these cgroups, namespaces or pins."""
    pattern = re.compile(r"(?:underpass-bench|up-bench)-(\d+)(?:-(?:a|b|sw|p\d+|lock|scratch))?")
    found = {int(m[1]) for m in map(pattern.fullmatch, names) if m}
    return sorted(pid for pid in found if pid == os.getpid() or not alive(pid))


def sweep(cgroup_root: Path) -> list[int]:
    """Remove what benchmarks that were killed left behind; their pids.

    Only what carries the pid of a process that no longer exists, or our own, is touched.
    """
    temporary = Path(tempfile.gettempdir())
    places = (cgroup_root, Path("/sys/fs/bpf"), Path("/run/netns"), temporary)
    names = [entry.name for place in places if place.is_dir() for entry in place.iterdir()]
    dead = leftovers(names)
    for pid in dead:
        cgroup = cgroup_root / _CGROUP.format(pid)
        groups = sorted(cgroup.glob("**/"), reverse=True)  # what is below comes first
        for group in groups:
            if members(group):
                end_members(group)
        # The last reference to the links goes with their pins; no socket of theirs is left.
        for tail in ("", "-lock", "-scratch"):
            shutil.rmtree(_PINS.format(pid) + tail, ignore_errors=True)
        for group in groups:
            remove_group(group)
        for netns in Path("/run/netns").glob(_NETNS.format(pid, "*")):
            delete_netns(netns.name)
        shutil.rmtree(temporary / _DIRECTORY.format(pid), ignore_errors=True)
    return dead
