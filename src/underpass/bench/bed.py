"""Two pods without Kubernetes: two namespaces, veth, a switch in a third. All of our own."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from underpass.bench.processes import (
    Group,
    alive,
    end_members,
    members,
    run_tool,
    wait_for,
)
from underpass.errors import Usage

CLIENT_ADDRESS, SERVER_ADDRESS = "10.99.0.1", "10.99.0.2"
_CGROUP = "underpass-bench-{}"
_PINS = "/sys/fs/bpf/underpass-bench-{}"
_NETNS = "up-bench-{}-{}"
_DIRECTORY = "underpass-bench-{}"
_SCHEMA = "/usr/share/openvswitch/vswitch.ovsschema"


@dataclass(frozen=True)
class Way:
    """What lies between the two namespaces: ``kind`` is "bridge", "iptables" or "ovs"."""

    kind: str = "bridge"
    rules: int = 0

    @classmethod
    def parse(cls, text: str) -> Way:
        """From the command line: ``bridge``, ``ovs`` or ``iptables:N``.

        Raises:
            Usage: it is none of them.
        """
        if text in ("bridge", "ovs"):
            return cls(text)
        found = re.fullmatch(r"iptables:(\d{1,5})", text)
        if found and int(found[1]) > 0:
            return cls("iptables", int(found[1]))
        raise Usage("use", f"--path {text}", "no such path", "say bridge, iptables:N or ovs")

    def __str__(self) -> str:
        if self.kind == "ovs":
            return "veth + Open vSwitch (user space)"
        rules = f" + {self.rules} iptables rules" if self.rules else ""
        return f"veth + bridge{rules}"


def rules_text(count: int) -> str:
    """Input for iptables-restore: ``count`` rules that every packet is held against in vain."""
    never = (
        f"-A INPUT -s 192.0.2.{n % 256}/32 -p tcp -m tcp --dport {n % 65535 + 1} -j DROP"
        for n in range(count)
    )
    return "\n".join(["*filter", *never, "COMMIT", ""])


class Bed:
    """Namespaces, switch, cgroups and a directory, named after this process; a context manager.

    Attributes:
        shortcut: the cgroup to attach to; ``default``: beside it, never attached;
            ``naive``: beside both, for the naive bypass alone.
        pins: where the generation of the benchmark goes; not made here.
    """

    def __init__(self, cgroup_root: Path, way: Way) -> None:
        pid = os.getpid()
        self.way = way
        self.client_netns, self.server_netns, self._switch = (
            _NETNS.format(pid, part) for part in ("a", "b", "sw")
        )
        self.pins = Path(_PINS.format(pid))
        self.directory = Path(tempfile.gettempdir()) / _DIRECTORY.format(pid)
        self.cgroup = cgroup_root / _CGROUP.format(pid)
        self._top = Group(self.cgroup)
        self.shortcut = Group(self.cgroup / "shortcut")
        self.default = Group(self.cgroup / "default")
        self.naive = Group(self.cgroup / "naive")
        self._aside = Group(self.cgroup / "aside")
        self._stack = ExitStack()

    def __enter__(self) -> Bed:
        with ExitStack() as undo:
            self.directory.mkdir(mode=0o755)
            undo.callback(shutil.rmtree, self.directory, ignore_errors=True)
            for group in (self._top, self.shortcut, self.default, self.naive, self._aside):
                undo.enter_context(group)
            for netns in (self.client_netns, self.server_netns, self._switch):
                undo.callback(delete_netns, netns)
                run_tool(["ip", "netns", "add", netns])
                run_tool([*inside(netns), "ip", "link", "set", "lo", "up"])
            self._wire("va", self.client_netns, CLIENT_ADDRESS)
            self._wire("vb", self.server_netns, SERVER_ADDRESS)
            if self.way.kind == "ovs":
                self._switch_by_ovs()
            else:
                self._switch_by_bridge()
            if self.way.rules:
                self._add_rules()
            self._stack = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def cpu_seconds(self) -> float | None:
        """What everything in the bed has used so far, servers and a switch's programs included."""
        return self._top.cpu_seconds()

    def _wire(self, port: str, netns: str, address: str) -> None:
        peer = ["peer", "name", "eth0", "netns", netns]
        run_tool([*inside(self._switch), "ip", "link", "add", port, "type", "veth", *peer])
        run_tool([*inside(self._switch), "ip", "link", "set", port, "up"])
        run_tool([*inside(netns), "ip", "addr", "add", f"{address}/24", "dev", "eth0"])
        run_tool([*inside(netns), "ip", "link", "set", "eth0", "up"])

    def _switch_by_bridge(self) -> None:
        run_tool([*inside(self._switch), "ip", "link", "add", "br0", "type", "bridge"])
        run_tool([*inside(self._switch), "ip", "link", "set", "br0", "up"])
        for port in ("va", "vb"):
            run_tool([*inside(self._switch), "ip", "link", "set", port, "master", "br0"])

    def _add_rules(self) -> None:
        for netns in (self.client_netns, self.server_netns):
            restore = [*inside(netns), "iptables-restore"]
            run_tool(restore, stdin=rules_text(self.way.rules))

    def _switch_by_ovs(self) -> None:
        """An Open vSwitch of our own: database, sockets and pid files in our directory."""
        home = self.directory / "ovs"
        home.mkdir()
        base, socket = home / "conf.db", home / "db.sock"
        env = {"OVS_RUNDIR": str(home), "OVS_LOGDIR": str(home), "OVS_DBDIR": str(home)}
        run_tool(["ovsdb-tool", "create", str(base), _SCHEMA])
        everywhere = sorted(os.sched_getaffinity(0))
        serve = ["ovsdb-server", f"--remote=punix:{socket}", f"--unixctl={home}/db.ctl", str(base)]
        self._aside.spawn(serve, self._switch, everywhere, home / "log", env)
        wait_for(socket.exists, 10)
        control = ["ovs-vsctl", f"--db=unix:{socket}", "--timeout=20"]
        run_tool([*control, "--no-wait", "init"])
        forward = ["ovs-vswitchd", f"--unixctl={home}/sw.ctl", f"unix:{socket}"]
        self._aside.spawn(forward, self._switch, everywhere, home / "log", env)
        bridge = ["add-br", "br0", "--", "set", "bridge", "br0", "datapath_type=netdev"]
        ports = ["--", "add-port", "br0", "va", "--", "add-port", "br0", "vb"]
        run_tool([*control, *bridge, *ports])
        for netns in (self.client_netns, self.server_netns):
            # User-space OVS does not finish the checksums that veth leaves to the hardware.
            run_tool([*inside(netns), "ethtool", "-K", "eth0", "tx", "off"])


def inside(netns: str) -> list[str]:
    """Words that run a command in a namespace; `ip -n` would remount /, which a chroot forbids."""
    return ["nsenter", f"--net=/run/netns/{netns}"]


def delete_netns(name: str) -> None:
    """Delete a namespace if it is there."""
    if Path("/run/netns", name).exists():
        run_tool(["ip", "netns", "del", name])


def leftovers(names: list[str]) -> list[int]:
    """The dead processes whose benchmarks left one of these cgroups, namespaces or pins."""
    pattern = re.compile(r"(?:underpass-bench|up-bench)-(\d+)(?:-(?:a|b|sw))?")
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
        for group in (*cgroup.glob("*/"), cgroup):
            if members(group):
                end_members(group)
        # The last reference to the links goes with their pins; no socket of theirs is left.
        shutil.rmtree(_PINS.format(pid), ignore_errors=True)
        for group in (*cgroup.glob("*/"), cgroup):
            with suppress(OSError):
                group.rmdir()
        for part in ("a", "b", "sw"):
            delete_netns(_NETNS.format(pid, part))
        shutil.rmtree(temporary / _DIRECTORY.format(pid), ignore_errors=True)
    return dead
