"""Services with traffic policy, affinity, addresses from outside, and DNAT by maps."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

import pytest

from tests.kernel.backends import CONNECTIONS, Ends, backends_of, check_spread, served_by
from tests.kernel.bed import CLIENT4, CLIENT6, ROUTER4, SERVER4, SERVER6, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.kube_proxy import (
    BEFORE_1_24,
    BEYOND,
    OTHER4,
    ROUTER6,
    SERVICE4,
    SERVICE6,
    TARGET,
    UPLINK,
    Service,
    add_outside,
    make_node,
)
from tests.kernel.remote import Address
from tests.kernel.verdicts import check_all_paired, check_named

OUTSIDE4 = replace(SERVICE4, balancers=("203.0.113.10",), externals=("198.51.100.10",))
OUTSIDE6 = replace(SERVICE6, balancers=("2001:db8:ffff::10",), externals=("2001:db8:eeee::10",))
LOCAL4, LOCAL6 = replace(OUTSIDE4, local=(SERVER4,)), replace(OUTSIDE6, local=(SERVER6,))
EACH_FAMILY = pytest.mark.parametrize("six", [False, True], ids=["IPv4", "IPv6"])


def _entrances(service: Service) -> list[Address]:
    """Where outsiders meet the service: a port of the node, and addresses that only NAT knows."""
    node = UPLINK[service.six], service.node_port
    return [node, *((address, service.port) for address in service.outside)]


@pytest.mark.parametrize(
    ("mode", "service"),
    [
        pytest.param("iptables-nft", LOCAL4, id="KUBE-EXT"),
        pytest.param(BEFORE_1_24, LOCAL4, id="KUBE-XLB"),
        pytest.param("nft", LOCAL4, id="nftables"),
        pytest.param("nft", LOCAL6, id="nftables, IPv6"),
    ],
)
def test_local_traffic_policy_pairs(
    bed: Bed, plane: MakePlane, service: Service, mode: str
) -> None:
    """Claim: under externalTrafficPolicy: Local, from a pod, the node and outside: all pair.

    By the node's port, a load balancer's address and an externalIP. A pod and who is outside are
    seen by their own addresses, the node by the one that it is masqueraded to. Pods and the node
    reach every pod behind the service, who is outside the local one alone.
    """
    node = make_node(bed, mode)
    add_outside(bed)
    node.serve(service)
    underpass = plane()
    backends = backends_of(bed, service)
    everything: list[Ends] = []
    inside: list[Ends] = []
    for where in ("client", "router", "beyond"):
        client, entrances = bed.worker(where), _entrances(service)
        if where == "router" and mode == BEFORE_1_24:
            entrances.pop()  # its rules for externalIPs left out the node itself
        if where == "router" and not service.six:
            entrances.append(("127.0.0.1", service.node_port))
        ends = [backends.couple(client, to) for to in entrances for _ in range(9 // len(entrances))]
        for near, far in ends:
            seen = far.names()[1]
            if where == "router":
                assert seen[0] == (ROUTER6 if service.six else ROUTER4)
            else:
                assert seen == near.names()[0]
        if where == "beyond":
            assert ends[0][0].names()[0][0] in BEYOND
            assert served_by(ends) == {bed.netns["server"]}
        else:
            inside += ends
        everything += ends
    check_spread(service, inside)
    check_all_paired(underpass, everything)
    for near, far in (everything[0], everything[-1]):
        check_named(bed, near, far)


@pytest.mark.parametrize("mode", ["iptables-nft", "nft"])
def test_addresses_that_nobody_holds_pair(bed: Bed, plane: MakePlane, mode: str) -> None:
    """Claim: to a load balancer's address or an externalIP, from wherever: all pair."""
    node = make_node(bed, mode)
    add_outside(bed)
    node.serve(OUTSIDE4)
    underpass = plane()
    backends = backends_of(bed, OUTSIDE4)
    everything: list[Ends] = []
    for where in ("client", "router", "beyond"):
        client = bed.worker(where)
        for to in _entrances(OUTSIDE4):
            near, far = backends.couple(client, to)
            assert near.names()[1] == to
            assert far.names()[1][0] == ROUTER4
            everything.append((near, far))
    check_all_paired(underpass, everything)
    for near, far in (everything[0], everything[-1]):
        check_named(bed, near, far)


@EACH_FAMILY
@pytest.mark.parametrize("mode", ["iptables-nft", "nft"])
def test_session_affinity_pairs(bed: Bed, plane: MakePlane, mode: str, *, six: bool) -> None:
    """Claim: under sessionAffinity: ClientIP every client keeps its pod, and all pair."""
    service = replace(SERVICE6 if six else SERVICE4, affinity=True)
    make_node(bed, mode).serve(service)
    underpass = plane()
    backends, to = backends_of(bed, service), (service.address, service.port)
    everything: list[Ends] = []
    for where in ("client", "router"):
        client = bed.worker(where)
        ends = [backends.couple(client, to) for _ in range(CONNECTIONS)]
        assert len(served_by(ends)) == 1
        everything += ends
    check_all_paired(underpass, everything)
    check_named(bed, *everything[0])
    if mode == "iptables-nft":
        known = bed.within("router", "sh", "-c", "cat /proc/net/xt_recent/KUBE-SEP-*")
        assert ipaddress.ip_address(CLIENT6 if six else CLIENT4).exploded in known


_BOTH = f"map {{ 0 : {SERVER4} . {TARGET}, 1 : {OTHER4} . {TARGET} }}"
_MAPS = {
    "turns": f"numgen inc mod 2 {_BOTH}",
    "hash": f"jhash ip saddr . tcp sport mod 2 seed 7 {_BOTH}",
    "address": f"ip daddr . tcp dport map {{ {SERVICE4.address} . 80 : {SERVER4} . {TARGET}, "
    f"{SERVICE4.address} . 81 : {OTHER4} . {TARGET} }}",
}


@pytest.mark.parametrize("choice", _MAPS)
def test_nftables_maps_pair(bed: Bed, plane: MakePlane, choice: str) -> None:
    """Claim: DNAT to what a map of nftables says, by turns, by hash or by address: all pair."""
    node = make_node(bed)
    hook = "type nat hook prerouting priority dstnat;"
    rule = f"ip daddr {SERVICE4.address} meta l4proto tcp dnat ip to {_MAPS[choice]}"
    text = f"table ip balance {{\n chain pre {{\n {hook}\n {rule}\n }}\n}}\n"
    node.feed(text, "nft", "-f", "-")
    underpass = plane()
    backends, client = backends_of(bed, SERVICE4), bed.worker("client")
    ends = [
        backends.couple(client, (SERVICE4.address, 80 + (choice == "address" and number % 2)))
        for number in range(CONNECTIONS)
    ]
    check_spread(SERVICE4, ends)
    check_all_paired(underpass, ends)
    check_named(bed, *ends[0])
