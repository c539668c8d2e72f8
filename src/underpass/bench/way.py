"""What may lie between the two namespaces: its names, addresses, rules and counters as text."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from underpass.errors import UnderpassError, Usage

CLIENT_ADDRESS, SERVER_ADDRESS = "10.99.0.1", "10.99.0.2"
CLIENT_ADDRESS6, SERVER_ADDRESS6 = "fd99::1", "fd99::2"
#: What the node answers for the pods of path iptables.
CLIENT_SERVICE, SERVER_SERVICE = "10.96.0.1", "10.96.0.2"
GATEWAY = "10.99.0.254"
MOST_RULES = 20_000

_KINDS = ("bridge", "ipv6", "ovs")
_SAY = "say bridge, ipv6, iptables:N or ovs"
#: Programs that a path needs beside iproute2, with their packages.
_NEEDS = {
    "iptables": {"iptables-restore": "iptables"},
    "ovs": {"ovs-vswitchd": "openvswitch-switch", "ethtool": "ethtool"},
}
_COUNTERS = {
    "bridge": "what the bridge's two ports took in",
    "ipv6": "IPv6 packets of the server's namespace",
    "iptables": "what passed all rules by a service address",
    "ovs": "packets of Open vSwitch's flows",
}


@dataclass(frozen=True)
class Reach:
    """How a workload's programs reach each other, and where it may write.

    Attributes:
        client, server: the address that one end uses for the other.
    """

    home: Path
    client: str = CLIENT_ADDRESS
    server: str = SERVER_ADDRESS

    @property
    def any(self) -> str:
        """The address of the same family at which a server listens on all others."""
        return "::" if ":" in self.server else "0.0.0.0"

    def listen(self, port: int) -> str:
        """The same with a port, as nginx has it."""
        return f"{host(self.any)}:{port}"

    def at(self, port: int) -> str:
        """The server's address with a port, as URLs have it."""
        return f"{host(self.server)}:{port}"


def host(address: str) -> str:
    """An address as it stands before a colon and a port."""
    return f"[{address}]" if ":" in address else address


@dataclass(frozen=True)
class Way:
    """What lies between the two namespaces: ``kind`` is bridge, ipv6, iptables or ovs."""

    kind: str = "bridge"
    rules: int = 0

    @classmethod
    def parse(cls, text: str) -> Way:
        """From the command line: ``bridge``, ``ipv6``, ``ovs`` or ``iptables:N``.

        Raises:
            Usage: it is none of them.
        """
        if text in _KINDS:
            return cls(text)
        found = re.fullmatch(r"iptables:([0-9]{1,9})", text)
        if not found:
            raise Usage("use", f"--path {text}", "no such path", _SAY)
        if not 0 < int(found[1]) <= MOST_RULES:
            cause = f"rules are 1 to {MOST_RULES}"
            raise Usage("use", f"--path {text}", cause, "say for example iptables:1000")
        return cls("iptables", int(found[1]))

    def __str__(self) -> str:
        if self.kind == "ovs":
            return "veth + Open vSwitch (user space)"
        if self.kind == "iptables":
            return f"veth + bridge + service address + {self.rules} iptables rules"
        return "veth + bridge, IPv6" if self.kind == "ipv6" else "veth + bridge"

    @property
    def counter(self) -> str:
        """What the path's own counter counts."""
        return _COUNTERS[self.kind]

    def reach(self, home: Path) -> Reach:
        """The addresses that programs use on this path."""
        if self.kind == "ipv6":
            return Reach(home, CLIENT_ADDRESS6, SERVER_ADDRESS6)
        if self.kind == "iptables":
            return Reach(home, CLIENT_SERVICE, SERVER_SERVICE)
        return Reach(home)

    def addresses(self) -> tuple[str, str]:
        """Of the client's and the server's interface, with their prefixes."""
        if self.kind == "ipv6":
            return f"{CLIENT_ADDRESS6}/64", f"{SERVER_ADDRESS6}/64"
        # A pod behind a node's rules has no neighbour but the node, else answers would pass it by.
        length = 32 if self.kind == "iptables" else 24
        return f"{CLIENT_ADDRESS}/{length}", f"{SERVER_ADDRESS}/{length}"

    def refuse_naive(self) -> None:
        """The naive bypass finds the peer by mirrored IPv4 addresses.

        Raises:
            Usage: on this path there is none.
        """
        causes = {"ipv6": "it knows IPv4 alone", "iptables": "it cannot see through NAT"}
        if self.kind in causes:
            raise Usage(
                "use --naive with", f"--path {self.kind}", causes[self.kind],
                "leave out one of the two"
            )  # fmt: skip

    def refuse_probe(self) -> None:
        """The calibration's probe opens IPv4 connections.

        Raises:
            Usage: on this path there are none.
        """
        if self.kind == "ipv6":
            raise Usage(
                "calibrate by", "--path ipv6", "its probe knows IPv4 alone", "say --path bridge"
            )

    def missing(self) -> None:
        """Check that what makes the path is here.

        Raises:
            UnderpassError: a program is not; names its package.
        """
        for program, package in _NEEDS.get(self.kind, {}).items():
            if not which(program):
                raise UnderpassError(
                    "use", f"--path {self.kind}", f"{program} is not here",
                    f"run `apt-get install {package}`"
                )  # fmt: skip


def which(program: str) -> str | None:
    """Where a program is; set-up programs are in directories that not every PATH has."""
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def rules_text(count: int) -> str:
    """Input for iptables-restore: a node that stands before ``count`` services and ours.

    In kube-proxy's shape: every new connection is looked for among the services, every packet that
    is forwarded is held against ``count`` rules in vain. The last rule of FORWARD counts what got
    so far by a service address.
    """
    own = ((CLIENT_SERVICE, CLIENT_ADDRESS), (SERVER_SERVICE, SERVER_ADDRESS))
    lines = [
        "*nat",
        ":UNDERPASS-SERVICES - [0:0]",
        "-A PREROUTING -j UNDERPASS-SERVICES",
        *(f"-A UNDERPASS-SERVICES {each} -j DNAT --to-destination 10.99.0.3:8080"
          for each in _others(count)),
        *(f"-A UNDERPASS-SERVICES -d {service}/32 -p tcp -j DNAT --to-destination {address}"
          for service, address in own),
        "COMMIT",
        "*filter",
        ":UNDERPASS-FORWARD - [0:0]",
        "-A FORWARD -j UNDERPASS-FORWARD",
        "-A FORWARD -m conntrack --ctstate DNAT -j ACCEPT",
        *(f"-A UNDERPASS-FORWARD {each} -j DROP" for each in _others(count)),
        "COMMIT",
    ]  # fmt: skip
    return "\n".join([*lines, ""])


def _others(count: int) -> Iterator[str]:
    """Matches of services that nobody here asks for, a different one each."""
    return (f"-d 10.97.{n >> 8}.{n & 255}/32 -p tcp -m tcp --dport 80" for n in range(count))


def forwarded(listing: str) -> int:
    """Packets of the counting rule, from ``iptables -nvxL FORWARD``."""
    return _number(r"^\s*(\d+) .* ctstate DNAT\s*$", listing, "iptables")


def flowed(said: str) -> int:
    """Packets of all flows, from ``ovs-ofctl dump-aggregate``."""
    return _number(r"\bpacket_count=(\d+)", said, "ovs-ofctl")


def switched(said: str) -> int:
    """Packets that the interfaces took in, from ``ip -j -s link show``.

    Raises:
        UnderpassError: it says nothing of them.
    """
    try:
        return sum(int(link["stats64"]["rx"]["packets"]) for link in json.loads(said))
    except (ValueError, KeyError, TypeError):
        raise _unread(said, "ip") from None


def of_ipv6(table: str) -> int:
    """Packets in and out, from ``/proc/net/snmp6``."""
    names = ("Ip6InReceives", "Ip6OutRequests")
    return sum(_number(rf"^{name}\s+(\d+)\s*$", table, "snmp6") for name in names)


def _number(pattern: str, text: str, source: str) -> int:
    found = re.search(pattern, text, re.MULTILINE)
    if not found:
        raise _unread(text, source)
    return int(found[1])


def _unread(text: str, source: str) -> UnderpassError:
    said = " ".join(text.split())[:120] or "nothing"
    return UnderpassError("read", f"the counters of {source}", f"it printed: {said}", "see why")
