"""Which way packets go, and by which device a socket is bound, makes no difference to a pair."""

from __future__ import annotations

import socket

from tests.kernel.bed import CLIENT4, SERVER4, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.interfaces import SECOND, make_device, second_interface
from tests.kernel.remote import Options, connect, couple, listen
from tests.kernel.verdicts import check_all_paired, check_named, check_paired

PORT, OTHER_PORT = 8080, 8081


def bound_to(device: str) -> Options:
    """The option of a socket that belongs to one interface."""
    return ((socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode()),)


def _count(bed: Bed, where: str, chain: str, words: str) -> None:
    """Count TCP packets from now on that the chain sees by an interface, as in "-i eth0"."""
    bed.within(where, "iptables", "-A", chain, *words.split(), "-p", "tcp")


def _counted(bed: Bed, where: str, words: str) -> int:
    """How many there were."""
    saved = bed.within(where, "iptables-save", "-c").splitlines()
    [line] = [line for line in saved if f" {words} " in line]
    return int(line.partition(":")[0].removeprefix("["))


def test_asymmetric_routes_pair(bed: Bed, plane: MakePlane) -> None:
    """Claim: where requests leave by one interface and answers come by another, it pairs."""
    second_interface(bed, "veth")
    for where in SECOND:
        for name in ("all", "eth0", "eth1"):
            bed.within(where, "sysctl", "-qw", f"net.ipv4.conf.{name}.rp_filter=0")
    bed.within("server", "ip", "rule", "add", "from", SERVER4, "lookup", "100")
    back = f"route add {CLIENT4} via {SECOND['client']} dev eth1 table 100"
    bed.within("server", "ip", *back.split())
    ways = {"OUTPUT": ("-o eth0", "-o eth1"), "INPUT": ("-i eth0", "-i eth1")}
    for chain, each in ways.items():
        for words in each:
            _count(bed, "client", chain, words)
    underpass = plane()
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, PORT))
    check_paired(underpass, near, far)
    check_named(bed, near, far)
    assert _counted(bed, "client", "-o eth0") > 0
    assert _counted(bed, "client", "-i eth1") > 0
    assert _counted(bed, "client", "-o eth1") == 0
    assert _counted(bed, "client", "-i eth0") == 0


def test_direct_server_return_pairs(bed: Bed, plane: MakePlane) -> None:
    """Claim: an address that the server holds besides, reached by the node, answered directly."""
    virtual = "203.0.113.10"
    bed.within("server", "ip", "addr", "add", f"{virtual}/32", "dev", "lo")
    bed.within("router", "ip", "route", "add", virtual, "via", SERVER4)
    _count(bed, "router", "FORWARD", "-i br0")
    underpass = plane()
    near, far = couple(bed.worker("client"), bed.worker("server"), (virtual, PORT))
    assert far.names() == ((virtual, PORT), near.names()[0])
    check_paired(underpass, near, far)
    check_named(bed, near, far)
    assert _counted(bed, "router", "-i br0") > 0


def test_policy_routing_pairs(bed: Bed, plane: MakePlane) -> None:
    """Claim: where the port decides the interface and with it the source address, both pair."""
    second_interface(bed, "veth")
    rule = f"rule add to {SERVER4} ipproto tcp dport {OTHER_PORT} lookup 101"
    bed.within("client", "ip", *rule.split())
    way = f"route add default via {SECOND['server']} dev eth1 table 101"
    bed.within("client", "ip", *way.split())
    underpass = plane()
    client, server = bed.worker("client"), bed.worker("server")
    ends = [couple(client, server, (SERVER4, port)) for port in (PORT, OTHER_PORT)]
    assert [near.names()[0][0] for near, _ in ends] == [CLIENT4, SECOND["client"]]
    check_all_paired(underpass, ends)
    check_named(bed, *ends[1])


def test_listeners_of_one_port_by_device_pair(bed: Bed, plane: MakePlane) -> None:
    """Claim: two programs listen on one port, each bound to an interface: none gets the other's."""
    second_interface(bed, "veth")
    underpass = plane()
    client = bed.worker("client")
    listeners = {
        to: listen(bed.worker("server"), ("0.0.0.0", PORT), options=bound_to(device))
        for device, to in (("eth0", SERVER4), ("eth1", SECOND["server"]))
    }
    ends = []
    for _ in range(3):
        for to, listener in listeners.items():
            near = connect(client, (to, PORT))
            ends.append((near, listener.accept()))
    check_all_paired(underpass, ends)
    check_named(bed, *ends[0])


def test_a_client_bound_to_a_device_pairs(bed: Bed, plane: MakePlane) -> None:
    """Claim: clients bound to an interface each, from one port: both pair."""
    second_interface(bed, "veth")
    underpass = plane()
    client = bed.worker("client")
    listener = listen(bed.worker("server"), ("0.0.0.0", PORT))
    ends = []
    for device, source, to in (
        ("eth0", CLIENT4, SERVER4),
        ("eth1", SECOND["client"], SECOND["server"]),
    ):
        near = connect(client, (to, PORT), (source, 30000), options=bound_to(device))
        ends.append((near, listener.accept()))
    check_all_paired(underpass, ends)


def test_vrfs_pair(bed: Bed, plane: MakePlane) -> None:
    """Claim: in a VRF with the addresses that the pods have outside it, too: no byte strays."""
    second_interface(bed, "veth")
    for where, address in (("client", CLIENT4), ("server", SERVER4)):
        make_device(bed, where, "red type vrf table 10")
        bed.within(where, "ip", "link", "set", "red", "up")
        bed.within(where, "ip", "link", "set", "eth1", "master", "red")
        bed.within(where, "ip", "addr", "add", f"{address}/24", "dev", "eth1")
    underpass = plane()
    client, to, source = bed.worker("client"), (SERVER4, PORT), (CLIENT4, 30000)
    inner = listen(bed.worker("server"), ("0.0.0.0", PORT), options=bound_to("red"))
    outer = listen(bed.worker("server"), ("0.0.0.0", PORT), options=bound_to("eth0"))
    near = connect(client, to, source, options=bound_to("red"))
    ends = [(near, inner.accept())]
    near = connect(client, to, source, options=bound_to("eth0"))
    ends.append((near, outer.accept()))
    check_all_paired(underpass, ends)
