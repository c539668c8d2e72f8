"""A node's services: the chains that kube-proxy writes, in the router's namespace of a bed.

Rules and names are those of kube-proxy's iptables and nftables modes, as far as traffic meets them.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from tests.kernel.bed import CLIENT4, CLIENT6, ROUTER4, SERVER4, SERVER6, Bed, inside, join

OTHER4, OTHER6 = "10.77.0.3", "fd77::3"
ROUTER6 = "fd77::fe"
UPLINK, BEYOND = ("192.0.2.1", "2001:db8::1"), ("192.0.2.2", "2001:db8::2")
"""The node's addresses on its way out, and those of somebody out there; IPv4, IPv6."""
PODS4, PODS6 = "10.77.0.0/24", "fd77::/64"
TARGET = 8080
"""Port of the pods."""
MODES = ("iptables-nft", "iptables-legacy", "nft")
"""What writes the rules: both kinds of iptables, or kube-proxy's nftables mode."""
BEFORE_1_24 = "iptables-nft before 1.24"
"""As the first of them, with the chains for outside traffic that Kubernetes had up to 1.23."""
_MARK = "0x4000"
_TOOLS = ("iptables", "ip6tables")


@dataclass(frozen=True)
class Service:
    """A service and the addresses of the pods behind it, all of one family."""

    address: str = "10.96.0.10"
    endpoints: tuple[str, ...] = (SERVER4, OTHER4)
    port: int = 80
    node_port: int = 30080
    balancers: tuple[str, ...] = ()
    """Its load balancer's addresses."""
    externals: tuple[str, ...] = ()
    """Its externalIPs."""
    local: tuple[str, ...] | None = None
    """externalTrafficPolicy: Local, with the endpoints that are on this node; None = Cluster."""
    affinity: bool = False
    """sessionAffinity: ClientIP."""

    @property
    def outside(self) -> tuple[str, ...]:
        """Addresses that NAT alone knows; kube-proxy treats both kinds alike since 1.24."""
        return self.balancers + self.externals

    @property
    def six(self) -> bool:
        """Whether it is of IPv6."""
        return ":" in self.address

    @property
    def pods(self) -> str:
        """The addresses that are pods: others are masqueraded."""
        return PODS6 if self.six else PODS4

    def at(self, endpoint: str) -> str:
        """An endpoint with its port."""
        return f"[{endpoint}]:{TARGET}" if self.six else f"{endpoint}:{TARGET}"


SERVICE4 = Service()
SERVICE6 = Service("fd96::10", (SERVER6, OTHER6))


def iptables_text(service: Service, *, old: bool = False) -> str:
    """Input for iptables-restore, as kube-proxy's iptables mode writes it; `old`: up to 1.23."""
    whole = 128 if service.six else 32
    port = f"-p tcp -m tcp --dport {service.port}"
    to = f"-d {service.address}/{whole} {port}"
    portals = '-m comment --comment "kubernetes service portals" -j KUBE-SERVICES'
    own, external = f"-p tcp -m tcp --dport {service.node_port}", "KUBE-EXT-WEB"
    node_port = [f"-A KUBE-NODEPORTS {own} -j {external}"]
    ips = [f"-A KUBE-SERVICES -d {each}/{whole} {port} -j {external}" for each in service.outside]
    if old and service.local is not None:
        external, loopback = "KUBE-XLB-WEB", "::1/128" if service.six else "127.0.0.0/8"
        node_port = [
            f"-A KUBE-NODEPORTS -s {loopback} {own} -j KUBE-MARK-MASQ",
            f"-A KUBE-NODEPORTS {own} -j {external}",
        ]
        ips = [f"-A KUBE-FW-WEB -j {external}"]
        ips += [f"-A KUBE-SERVICES -d {each} {port} -j KUBE-FW-WEB" for each in service.balancers]
        ips += [
            f"-A KUBE-SERVICES -d {each} {port} {who} -j {external}"
            for each in service.externals
            for who in (
                "-m physdev ! --physdev-is-in -m addrtype ! --src-type LOCAL",
                "-m addrtype --dst-type LOCAL",
            )
        ]
    rules = [
        f"-A PREROUTING {portals}",
        f"-A OUTPUT {portals}",
        "-A POSTROUTING -j KUBE-POSTROUTING",
        f"-A KUBE-MARK-MASQ -j MARK --or-mark {_MARK}",
        f"-A KUBE-POSTROUTING -m mark ! --mark {_MARK}/{_MARK} -j RETURN",
        f"-A KUBE-POSTROUTING -j MARK --xor-mark {_MARK}",
        "-A KUBE-POSTROUTING -j MASQUERADE --random-fully",
        f'-A KUBE-SERVICES {to} -m comment --comment "test/web cluster IP" -j KUBE-SVC-WEB',
        *ips,
        "-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS",
        *node_port,
        *_from_outside(service, external),
        f"-A KUBE-SVC-WEB ! -s {service.pods} {to} -j KUBE-MARK-MASQ",
        *_picks("KUBE-SVC-WEB", service, service.endpoints),
    ]
    chains = ["KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ"]
    chains += [external, "KUBE-FW-WEB", "KUBE-SVL-WEB", "KUBE-SVC-WEB"]
    for number, endpoint in enumerate(service.endpoints):
        chain = f"KUBE-SEP-{number}"
        chains.append(chain)
        recent = f"-m recent --name {chain} --set " if service.affinity else ""
        rules += [
            f"-A {chain} -s {endpoint}/{whole} -j KUBE-MARK-MASQ",
            f"-A {chain} -p tcp -m tcp {recent}-j DNAT --to-destination {service.at(endpoint)}",
        ]
    return "\n".join(["*nat", *(f":{chain} - [0:0]" for chain in chains), *rules, "COMMIT", ""])


def _from_outside(service: Service, chain: str) -> list[str]:
    """What becomes of traffic to a port of the node, an external address or a load balancer's."""
    if service.local is None:
        return [f"-A {chain} -j KUBE-MARK-MASQ", f"-A {chain} -j KUBE-SVC-WEB"]
    here = "-m addrtype --src-type LOCAL"
    rules = [
        f"-A {chain} -s {service.pods} -j KUBE-SVC-WEB",
        f"-A {chain} {here} -j KUBE-MARK-MASQ",
        f"-A {chain} {here} -j KUBE-SVC-WEB",
    ]
    if chain == "KUBE-XLB-WEB":
        return rules + _picks(chain, service, service.local)
    return [*rules, f"-A {chain} -j KUBE-SVL-WEB", *_picks("KUBE-SVL-WEB", service, service.local)]


def _picks(chain: str, service: Service, among: tuple[str, ...]) -> list[str]:
    """One of these endpoints: the one that the client's address had before, or any."""
    ends = [f"KUBE-SEP-{service.endpoints.index(endpoint)}" for endpoint in among]
    again = "-m recent --name {0} --rcheck --seconds 10800 --reap -j {0}"
    rules = [f"-A {chain} {again.format(end)}" for end in ends] if service.affinity else []
    for left, end in zip(range(len(ends), 0, -1), ends, strict=True):
        chance = f"-m statistic --mode random --probability {1 / left:.10f} " if left > 1 else ""
        rules.append(f"-A {chain} {chance}-j {end}")
    return rules


def nft_text(service: Service) -> str:
    """Input for `nft -f`, as kube-proxy's nftables mode writes it."""
    ip, kind = ("ip6", "ipv6_addr") if service.six else ("ip", "ipv4_addr")
    numbers = range(len(service.endpoints))
    to_ips = [
        (service.address, "service-web"),
        *((each, "external-web") for each in service.outside),
    ]
    ips = ", ".join(f"{each} . tcp . {service.port} : goto {chain}" for each, chain in to_ips)
    external = "jump mark-for-masquerade; goto service-web;"
    if service.local is not None:
        external = f"""
        {ip} saddr {service.pods} goto service-web
        fib saddr type local jump mark-for-masquerade
        fib saddr type local goto service-web
        {_nft_picks(service, service.local)}
    """
    sets, again = "", ""
    if service.affinity:
        flags = f"type {kind}; flags dynamic,timeout; timeout 10800s;"
        sets = "".join(f"\n    set affinity-{number} {{ {flags} }}" for number in numbers)
        again = "".join(f"\n        {ip} saddr @affinity-{n} goto endpoint-{n}" for n in numbers)
    ends = "".join(
        f"""
    chain endpoint-{number} {{
        {ip} saddr {endpoint} jump mark-for-masquerade
        {f"update @affinity-{number} {{ {ip} saddr }}" if service.affinity else ""}
        meta l4proto tcp dnat to {service.at(endpoint)}
    }}"""
        for number, endpoint in enumerate(service.endpoints)
    )
    return f"""
table {ip} kube-proxy {{
    chain mark-for-masquerade {{ meta mark set meta mark or {_MARK}; }}
    chain masquerading {{
        meta mark & {_MARK} == 0 return
        meta mark set meta mark ^ {_MARK}
        masquerade fully-random
    }}{sets}{ends}
    chain service-web {{
        {ip} daddr {service.address} tcp dport {service.port} {ip} saddr != {service.pods} \
jump mark-for-masquerade{again}
        {_nft_picks(service, service.endpoints)}
    }}
    chain external-web {{ {external} }}
    map service-ips {{
        type {kind} . inet_proto . inet_service : verdict
        elements = {{ {ips} }}
    }}
    map service-nodeports {{
        type inet_proto . inet_service : verdict
        elements = {{ tcp . {service.node_port} : goto external-web }}
    }}
    chain services {{
        {ip} daddr . meta l4proto . th dport vmap @service-ips
        fib daddr type local meta l4proto . th dport vmap @service-nodeports
    }}
    chain nat-prerouting {{ type nat hook prerouting priority dstnat; jump services; }}
    chain nat-output {{ type nat hook output priority -100; jump services; }}
    chain nat-postrouting {{ type nat hook postrouting priority srcnat; jump masquerading; }}
}}
"""


def _nft_picks(service: Service, among: tuple[str, ...]) -> str:
    numbers = [service.endpoints.index(endpoint) for endpoint in among]
    picks = ", ".join(f"{n} : goto endpoint-{end}" for n, end in enumerate(numbers))
    return f"numgen random mod {len(numbers)} vmap {{ {picks} }}"


@dataclass
class Node:
    """The router's namespace as a node with three pods: client, server and other."""

    bed: Bed
    mode: str = MODES[0]

    def serve(self, service: Service) -> None:
        """Write the service's rules."""
        if self.mode == "nft":
            self.feed(nft_text(service), "nft", "-f", "-")
            return
        old, mode = self.mode == BEFORE_1_24, self.mode.partition(" ")[0]
        tool = mode.replace("iptables", "ip6tables") if service.six else mode
        self.feed(iptables_text(service, old=old), f"{tool}-restore", "--noflush")

    def feed(self, text: str, *command: str) -> None:
        """Give a program in the node's namespace `text` on its stdin."""
        into = [*inside(self.bed.netns["router"]), *command]
        done = subprocess.run(into, input=text, check=False, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}\n{text}"


def make_node(bed: Bed, mode: str = MODES[0], *, bridged: bool = False) -> Node:
    """Let the router be a node: a third pod, IPv6, and the settings that kube-proxy makes.

    Pods are routed, each on a veth with the node's address, as CNI's ptp makes them; or they stay
    on the bridge, which then has to call iptables: a node's br_netfilter.
    """
    bed.add_netns("other")
    join(bed, "other", OTHER4, OTHER6)
    settings = ["net.ipv6.conf.all.forwarding=1", "net.ipv4.conf.all.route_localnet=1"]
    settings += [f"net.bridge.bridge-nf-call-{tool}=1" for tool in _TOOLS if bridged]
    for setting in settings:
        bed.within("router", "sysctl", "-qw", setting)
    pods = {"client": (CLIENT4, CLIENT6), "server": (SERVER4, SERVER6), "other": (OTHER4, OTHER6)}
    if bridged:
        bed.within("router", "ip", "addr", "add", f"{ROUTER6}/64", "dev", "br0", "nodad")
        for where in pods:
            bed.within(where, "ip", "route", "add", "default", "via", ROUTER6)
    else:
        for where, addresses in pods.items():
            _route(bed, where, addresses)
    # what the node itself sends to a service has to have a way before its address is rewritten
    for family in ("-4", "-6"):
        way = "br0" if bridged else "port-client"
        bed.within("router", "ip", family, "route", "add", "default", "dev", way)
    return Node(bed, mode)


def _route(bed: Bed, where: str, addresses: tuple[str, str]) -> None:
    """Take a pod off the bridge: all that it sends and gets is routed by the node."""
    port = f"port-{where}"
    bed.within("router", "ip", "link", "set", port, "nomaster")
    bed.within(where, "ip", "addr", "flush", "dev", "eth0", "scope", "global")
    for address, gateway, whole in zip(addresses, (ROUTER4, ROUTER6), ("/32", "/128"), strict=True):
        nodad = ["nodad"] if ":" in address else []
        bed.within("router", "ip", "addr", "add", gateway + whole, "dev", port, *nodad)
        bed.within("router", "ip", "route", "add", address + whole, "dev", port)
        bed.within(where, "ip", "addr", "add", address + whole, "dev", "eth0", *nodad)
        bed.within(where, "ip", "route", "add", gateway + whole, "dev", "eth0")
        bed.within(where, "ip", "route", "add", "default", "via", gateway)


def add_outside(bed: Bed) -> None:
    """A namespace "beyond" that is neither the node nor a pod of it, on an uplink of the node's.

    It stands for who comes from outside the cluster; the node's way to it is `UPLINK`.
    """
    bed.add_netns("beyond")
    veth = "link add uplink type veth peer name eth0 netns"
    bed.within("router", "ip", *veth.split(), bed.netns["beyond"])
    ends = (("router", "uplink", UPLINK), ("beyond", "eth0", BEYOND))
    for where, name, (address4, address6) in ends:
        bed.within(where, "ip", "addr", "add", f"{address4}/24", "dev", name)
        bed.within(where, "ip", "addr", "add", f"{address6}/64", "dev", name, "nodad")
        bed.within(where, "ip", "link", "set", name, "up")
    for gateway in UPLINK:
        bed.within("beyond", "ip", "route", "add", "default", "via", gateway)
