"""Makes what lies between the two namespaces, in a third, and reads its own counters."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from underpass.bench import way
from underpass.bench.processes import Group, inside, run_tool, wait_for
from underpass.bench.way import GATEWAY, Way
from underpass.errors import UnderpassError

#: The ends of the two cables in the switch's namespace: the client's and the server's.
PORTS = ("va", "vb")

_SCHEMA = "/usr/share/openvswitch/vswitch.ovsschema"
#: A node that forwards from its bridge to its bridge, itself: where bridges call iptables by
#: themselves, it would depend on the machine who does.
_FORWARD = """echo 1 >/proc/sys/net/ipv4/ip_forward
for each in all br0; do echo 0 >/proc/sys/net/ipv4/conf/$each/send_redirects; done
bridge=/proc/sys/net/bridge/bridge-nf-call-iptables
[ ! -e $bridge ] || echo 0 >$bridge
"""


@dataclass(frozen=True)
class Ground:
    """Where a switch is made.

    Attributes:
        netns: the namespace that has :data:`PORTS`; of its own.
        pods: the client's and the server's namespace, each with an eth0.
        home: a directory that is removed afterwards.
        group: for programs that have to run; they are ended.
    """

    netns: str
    pods: tuple[str, str]
    home: Path
    group: Group


class Bridge:
    """The kernel's bridge."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground

    def make(self) -> None:
        """Make it; it goes with its namespace."""
        self._run("ip", "link", "add", "br0", "type", "bridge")
        self._run("ip", "link", "set", "br0", "up")
        for port in PORTS:
            self._run("ip", "link", "set", port, "master", "br0")

    def passed(self) -> int:
        """Packets that took the path so far, by its own counter."""
        return way.switched(self._run("ip", "-j", "-s", "link", "show", "type", "veth"))

    def _run(self, *argv: str, stdin: str | None = None) -> str:
        return run_tool([*inside(self._ground.netns), *argv], stdin=stdin)


class Bridge6(Bridge):
    """The same under pods that have IPv6 alone."""

    def passed(self) -> int:
        """Packets that took the path so far, by its own counter."""
        server = self._ground.pods[1]
        return way.of_ipv6(run_tool([*inside(server), "cat", "/proc/net/snmp6"]))


class Rules(Bridge):
    """A node: the bridge's pods reach each other through its address and its rules."""

    def __init__(self, ground: Ground, count: int) -> None:
        super().__init__(ground)
        self._count = count

    def make(self) -> None:
        """Make it; it goes with its namespace."""
        super().make()
        self._run("ip", "addr", "add", f"{GATEWAY}/24", "dev", "br0")
        self._run("sh", "-ec", _FORWARD)
        self._run("iptables-restore", stdin=way.rules_text(self._count))
        for pod in self._ground.pods:
            run_tool([*inside(pod), "ip", "route", "add", GATEWAY, "dev", "eth0"])
            run_tool([*inside(pod), "ip", "route", "add", "default", "via", GATEWAY])

    def passed(self) -> int:
        """Packets that took the path so far, by its own counter."""
        return way.forwarded(self._run("iptables", "-w", "-nvxL", "FORWARD"))


class OpenVSwitch(Bridge):
    """An Open vSwitch of our own: database, sockets and pid files in our directory."""

    def __init__(self, ground: Ground) -> None:
        super().__init__(ground)
        self._home = ground.home / "ovs"

    def make(self) -> None:
        """Start it; its programs run in the ground's group."""
        home = self._home
        home.mkdir()
        base, at = home / "conf.db", home / "db.sock"
        run_tool(["ovsdb-tool", "create", str(base), _SCHEMA])
        serve = ["ovsdb-server", f"--remote=punix:{at}", f"--unixctl={home}/db.ctl", str(base)]
        self._spawn(serve, at)
        control = ["ovs-vsctl", f"--db=unix:{at}", "--timeout=20"]
        run_tool([*control, "--no-wait", "init"])
        forward = ["ovs-vswitchd", f"--unixctl={home}/sw.ctl", f"unix:{at}"]
        self._spawn(forward, home / "sw.ctl")
        bridge = ["add-br", "br0", "--", "set", "bridge", "br0", "datapath_type=netdev"]
        ports = [word for port in PORTS for word in ("--", "add-port", "br0", port)]
        run_tool([*control, *bridge, *ports])
        for netns in self._ground.pods:
            # User-space OVS does not finish the checksums that veth leaves to the hardware.
            run_tool([*inside(netns), "ethtool", "-K", "eth0", "tx", "off"])

    def passed(self) -> int:
        """Packets that took the path so far, by its own counter."""
        # Flows learn what their cache has passed on when the revalidator has been round.
        run_tool(["ovs-appctl", "-t", f"{self._home}/sw.ctl", "revalidator/wait"])
        return way.flowed(run_tool(["ovs-ofctl", "dump-aggregate", f"unix:{self._home}/br0.mgmt"]))

    def _spawn(self, argv: list[str], at: Path) -> None:
        home = self._home
        env = {"OVS_RUNDIR": str(home), "OVS_LOGDIR": str(home), "OVS_DBDIR": str(home)}
        everywhere, log = sorted(os.sched_getaffinity(0)), home / "log"
        # Not a word of it belongs into the node's own log.
        quiet = ["-vsyslog:off", "-vconsole:warn"]
        child = self._ground.group.spawn(
            [argv[0], *quiet, *argv[1:]], self._ground.netns, everywhere, log, env
        )
        wait_for(lambda: child.poll() is not None or _answers(at), 10)
        if child.poll() is not None or not _answers(at):
            said = " ".join(log.read_text(errors="replace").split())[-200:] or "it said nothing"
            raise UnderpassError("start", " ".join(argv), said, "run it by hand to see")


def _answers(at: Path) -> bool:
    """Does somebody listen at this UNIX socket? It is there a moment before that."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(at)) == 0


def choose(between: Way, ground: Ground) -> Bridge:
    """What makes this way."""
    if between.kind == "iptables":
        return Rules(ground, between.rules)
    kinds = {"bridge": Bridge, "ipv6": Bridge6, "ovs": OpenVSwitch}
    return kinds[between.kind](ground)
