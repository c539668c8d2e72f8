"""Services as a node has them: whatever kube-proxy rewrites, both ends of a connection pair."""

from __future__ import annotations

import contextlib
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel.backends import CONNECTIONS, backends_of, check_spread
from tests.kernel.bed import CLIENT4, CLIENT6, ROUTER4, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.kube_proxy import (
    BEYOND,
    MODES,
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
from tests.kernel.remote import Address, connect, couple, listen
from tests.kernel.verdicts import check_all_paired, check_named, check_paired, same

EACH_MODE = pytest.mark.parametrize("mode", MODES)
BOTH_TABLES = pytest.mark.parametrize("mode", ["iptables-nft", "nft"])
EACH_FAMILY = pytest.mark.parametrize(
    "service", [pytest.param(SERVICE4, id="IPv4"), pytest.param(SERVICE6, id="IPv6")]
)


@EACH_MODE
@EACH_FAMILY
def test_cluster_ip_pairs(bed: Bed, plane: MakePlane, service: Service, mode: str) -> None:
    """Claim: from a pod to a service's address, whichever of two pods answers: all pair."""
    make_node(bed, mode).serve(service)
    underpass = plane()
    backends, client = backends_of(bed, service), bed.worker("client")
    to = (service.address, service.port)
    ends = [backends.couple(client, to) for _ in range(CONNECTIONS)]
    for near, far in ends:
        assert near.names()[1] == to
        assert far.names()[0][0] in service.endpoints
        assert far.names()[1] == near.names()[0]
    check_spread(service, ends)
    check_all_paired(underpass, ends)
    check_named(bed, *ends[0])


def test_cluster_ip_on_a_bridge_pairs(bed: Bed, plane: MakePlane) -> None:
    """Claim: where the pods are ports of one bridge, which calls iptables, it is the same."""
    if not Path("/proc/sys/net/bridge").exists():
        pytest.skip("br_netfilter is not loaded; services of pods on a bridge need it")
    make_node(bed, bridged=True).serve(SERVICE4)
    underpass = plane()
    backends, client = backends_of(bed, SERVICE4), bed.worker("client")
    ends = [backends.couple(client, (SERVICE4.address, SERVICE4.port)) for _ in range(4)]
    assert {far.names()[1][0] for _, far in ends} == {CLIENT4}
    check_all_paired(underpass, ends)
    check_named(bed, *ends[0])


def test_cluster_ip_of_a_dual_stack_server_pairs(bed: Bed, plane: MakePlane) -> None:
    """Claim: a server that listens on AF_INET6 for both families pairs behind both services."""
    node = make_node(bed)
    underpass = plane()
    backends, client = backends_of(bed, SERVICE4, any_address="::"), bed.worker("client")
    ends = []
    for service in (SERVICE4, SERVICE6):
        node.serve(service)
        ends += [backends.couple(client, (service.address, service.port)) for _ in range(4)]
    for _, far in ends[:4]:
        assert far.names()[1][0] == f"::ffff:{CLIENT4}"
    for _, far in ends[4:]:
        assert far.names()[1][0] == CLIENT6
    check_all_paired(underpass, ends)
    check_named(bed, *ends[0])
    check_named(bed, *ends[4])


@BOTH_TABLES
@EACH_FAMILY
def test_node_port_pairs(bed: Bed, plane: MakePlane, service: Service, mode: str) -> None:
    """Claim: from a pod to a port of the node, masqueraded on the way: all pair."""
    make_node(bed, mode).serve(service)
    underpass = plane()
    backends, client = backends_of(bed, service), bed.worker("client")
    host = ROUTER6 if service.six else ROUTER4
    ends = [backends.couple(client, (host, service.node_port)) for _ in range(CONNECTIONS)]
    for _, far in ends:
        assert far.names()[1][0] == host
    check_spread(service, ends)
    check_all_paired(underpass, ends)
    check_named(bed, *ends[0])


@pytest.mark.parametrize(
    ("service", "to", "seen"),
    [
        pytest.param(SERVICE4, (SERVICE4.address, SERVICE4.port), ROUTER4, id="ClusterIP"),
        pytest.param(SERVICE6, (SERVICE6.address, SERVICE6.port), ROUTER6, id="ClusterIP, IPv6"),
        pytest.param(SERVICE4, (ROUTER4, SERVICE4.node_port), ROUTER4, id="NodePort"),
        pytest.param(SERVICE4, ("127.0.0.1", SERVICE4.node_port), ROUTER4, id="NodePort, loopback"),
    ],
)
def test_host_to_service_pairs(
    bed: Bed, plane: MakePlane, service: Service, to: Address, seen: str
) -> None:
    """Claim: from the host itself (hostNetwork) to a service, rewritten in OUTPUT: all pair."""
    make_node(bed).serve(service)
    underpass = plane()
    backends, host = backends_of(bed, service), bed.worker("router")
    ends = [backends.couple(host, to) for _ in range(CONNECTIONS)]
    for near, far in ends:
        assert near.names()[1] == to
        assert same(far.names()[1][0], seen)
    check_all_paired(underpass, ends)
    check_named(bed, *ends[0])


@BOTH_TABLES
@pytest.mark.parametrize(
    ("service", "own", "seen"),
    [
        pytest.param(SERVICE4, CLIENT4, ROUTER4, id="IPv4"),
        pytest.param(SERVICE6, CLIENT6, ROUTER6, id="IPv6"),
    ],
)
def test_a_pod_behind_its_own_service_pairs(
    bed: Bed, plane: MakePlane, service: Service, own: str, seen: str, mode: str
) -> None:
    """Claim: a pod that reaches itself through its service, masqueraded for that, pairs."""
    make_node(bed, mode).serve(replace(service, endpoints=(own,)))
    underpass = plane()
    listener = listen(bed.worker("client"), (own, TARGET))
    near = connect(bed.worker("client"), (service.address, service.port))
    far = listener.accept()
    assert far.names() == ((own, TARGET), (seen, far.names()[1][1]))
    check_paired(underpass, near, far)
    check_named(bed, near, far)


def test_one_source_port_to_two_services_pairs(bed: Bed, plane: MakePlane) -> None:
    """Claim: from one port to one pod by two services at once: two pairs that do not mix."""
    make_node(bed).serve(replace(SERVICE4, endpoints=(OTHER4,)))
    underpass = plane()
    listener = listen(bed.worker("other"), (OTHER4, TARGET))
    client, source = bed.worker("client"), (CLIENT4, 30000)
    ends = []
    for to in ((SERVICE4.address, SERVICE4.port), (ROUTER4, SERVICE4.node_port)):
        near = connect(client, to, source)
        ends.append((near, listener.accept()))
    assert [far.names()[1][0] for _, far in ends] == [CLIENT4, ROUTER4]
    check_all_paired(underpass, ends)


def test_masqueraded_traffic_pairs(bed: Bed, plane: MakePlane) -> None:
    """Claim: a pod's traffic that leaves under the node's address (CNI's ipMasq) pairs here."""
    add_outside(bed)
    rule = "-s 10.77.0.0/24 ! -d 10.77.0.0/24 -j MASQUERADE"
    bed.within("router", "iptables", "-t", "nat", "-A", "POSTROUTING", *rule.split())
    underpass = plane()
    near, far = couple(bed.worker("client"), bed.worker("beyond"), (BEYOND[0], TARGET))
    assert far.names()[1][0] == UPLINK[0]
    check_paired(underpass, near, far)
    check_named(bed, near, far)


def test_ipvs_pairs(bed: Bed, plane: MakePlane) -> None:
    """Claim: behind IPVS, as in kube-proxy's third mode, connections pair."""
    with contextlib.suppress(OSError):  # a kernel with all built in may have no modprobe
        subprocess.run(["modprobe", "-q", "ip_vs_rr"], check=False)
    make_node(bed)
    service = SERVICE4
    try:
        bed.within("router", "cat", "/proc/net/ip_vs")
    except AssertionError:
        pytest.skip("this kernel has no IPVS (CONFIG_IP_VS)")
    virtual = f"{service.address}:{service.port}"
    bed.within("router", "ip", "addr", "add", f"{service.address}/32", "dev", "br0")
    bed.within("router", "sysctl", "-qw", "net.ipv4.vs.conntrack=1")
    bed.within("router", "ipvsadm", "-A", "-t", virtual, "-s", "rr")
    for endpoint in service.endpoints:
        bed.within("router", "ipvsadm", "-a", "-t", virtual, "-r", service.at(endpoint), "-m")
    masquerade = f"-p tcp --dport {TARGET} -j MASQUERADE"
    bed.within("router", "iptables", "-t", "nat", "-A", "POSTROUTING", *masquerade.split())
    underpass = plane()
    backends, client = backends_of(bed, service), bed.worker("client")
    ends = [backends.couple(client, (service.address, service.port)) for _ in range(4)]
    check_spread(service, ends)
    check_all_paired(underpass, ends)
    check_named(bed, *ends[0])
