"""Address plans without services: hosts and pods, several interfaces, the same addresses twice."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest

from tests.kernel.bed import CLIENT4, ROUTER4, SERVER4, SERVER6, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.interfaces import KINDS, second_interface
from tests.kernel.kube_proxy import OTHER4, ROUTER6, make_node
from tests.kernel.lookalikes import BLOCK, Crowd
from tests.kernel.remote import connect, couple, exchange, listen
from tests.kernel.verdicts import (
    ROUNDS,
    check_all_paired,
    check_named,
    check_paired,
    explained,
)
from underpass.model import Fault
from underpass.torture.patience import patient

PORT = 8080
_LOOKALIKES = 64
_TURNS = 3


@pytest.mark.parametrize(
    ("client", "server", "to"),
    [
        pytest.param("router", "server", SERVER4, id="host to pod"),
        pytest.param("router", "server", SERVER6, id="host to pod, IPv6"),
        pytest.param("client", "router", ROUTER4, id="pod to host"),
        pytest.param("client", "router", ROUTER6, id="pod to host, IPv6"),
        pytest.param("router", "router", ROUTER4, id="host to host"),
    ],
)
def test_the_host_and_pods_pair(
    bed: Bed, plane: MakePlane, client: str, server: str, to: str
) -> None:
    """Claim: a process on the host (hostNetwork) and one in a pod, or both on the host, pair."""
    make_node(bed)
    underpass = plane()
    ends = couple(bed.worker(client), bed.worker(server), (to, PORT))
    check_paired(underpass, *ends)
    check_named(bed, *ends)


@pytest.mark.parametrize("to", [SERVER4, SERVER6], ids=["IPv4", "IPv6"])
def test_routed_pods_pair(bed: Bed, plane: MakePlane, to: str) -> None:
    """Claim: pods without a common subnet, each on an address of its own behind routes, pair."""
    make_node(bed)
    underpass = plane()
    ends = couple(bed.worker("client"), bed.worker("server"), (to, PORT))
    check_paired(underpass, *ends)
    check_named(bed, *ends)


@pytest.mark.parametrize("kind", KINDS)
def test_pods_with_two_interfaces_pair(bed: Bed, plane: MakePlane, kind: str) -> None:
    """Claim: over either of two interfaces, and from one's address over the other: all pair."""
    second_interface(bed, kind)
    underpass = plane()
    client = bed.worker("client")
    listener = listen(bed.worker("server"), ("0.0.0.0", PORT))
    ends = []
    for source, to in (
        (CLIENT4, SERVER4),
        ("10.99.0.1", "10.99.0.2"),
        (CLIENT4, "10.99.0.2"),
        ("10.99.0.1", SERVER4),
    ):
        near = connect(client, (to, PORT), (source, 0))
        far = listener.accept()
        assert far.names() == ((to, PORT), near.names()[0])
        ends.append((near, far))
    check_all_paired(underpass, ends)
    check_named(bed, *ends[1])


def test_link_local_addresses_pair(bed: Bed, plane: MakePlane) -> None:
    """Claim: addresses of IPv6 that only their interface gives a meaning pair."""
    for where, address in (("client", "fe80::77:1"), ("server", "fe80::77:2")):
        bed.within(where, "ip", "addr", "add", f"{address}/64", "dev", "eth0", "nodad")
    underpass = plane()
    ends = couple(bed.worker("client"), bed.worker("server"), ("fe80::77:2%eth0", PORT))
    check_paired(underpass, *ends)
    check_named(bed, *ends)


def test_one_source_port_to_many_destinations_pairs(bed: Bed, plane: MakePlane) -> None:
    """Claim: from one address and port to five servers at once: five pairs that do not mix."""
    make_node(bed)
    underpass = plane()
    client, source = bed.worker("client"), (CLIENT4, 30000)
    targets = [
        ("server", (SERVER4, PORT)),
        ("server", (SERVER4, PORT + 1)),
        ("other", (OTHER4, PORT)),
        ("router", (ROUTER4, PORT)),
        ("client", (CLIENT4, PORT)),
    ]
    ends = [couple(client, bed.worker(where), to, source) for where, to in targets]
    check_all_paired(underpass, ends)
    assert Counter(near.names()[0] for near, _ in ends) == {source: len(targets)}
    for number, (near, far) in enumerate(ends):
        exchange(near, far, 2 * number + 1, rounds=1 + 10 * number)
        for finding in explained(bed, near):
            went = re.findall(r"(\d+) messages? by the shortcut, (\d+) by TCP", finding["sentence"])
            assert sum(map(int, went[0])) == ROUNDS + 1 + 10 * number


def test_loopback_addresses_inside_a_pod_pair(bed: Bed, plane: MakePlane) -> None:
    """Claim: from and to any address of 127.0.0.0/8, and ::1, inside one pod: all pair."""
    underpass = plane()
    workers = bed.worker("client"), bed.worker("client")
    ways = [("127.0.0.6", "127.0.0.1"), ("127.0.0.1", "127.8.9.10"), (CLIENT4, "127.0.0.1")]
    ends = [couple(*workers, (to, PORT), (source, 0)) for source, to in (*ways, ("::1", "::1"))]
    check_all_paired(underpass, ends)
    check_named(bed, *ends[0])
    check_named(bed, *ends[-1])


def test_64_namespaces_with_the_same_addresses(bed: Bed, plane: MakePlane) -> None:
    """Claim: 64 pods and their servers, all with the same addresses and ports: no byte strays."""
    underpass = plane()
    crowd = Crowd(bed, _LOOKALIKES)
    count = crowd.connect()
    for turn in range(_TURNS):
        for tally in crowd.talk(turn, patient(20)):
            assert (tally.right, tally.misdelivered) == (count, 0), tally
    assert underpass.counters().pairs_total == count
    places = [(pair.client.netns, pair.server.netns) for pair in underpass.pairs()]
    veth, loopback = crowd.names, [(client, client) for client, _ in crowd.names]
    assert Counter(places) == Counter(dict.fromkeys(veth + loopback, count // 128))
    ways = [way for p in underpass.pairs() for way in (p.client_to_server, p.server_to_client)]
    assert {way.path for way in ways} == {"shortcut"}
    assert all(way.shortcut_messages >= _TURNS - 1 for way in ways)


def test_the_check_of_64_namespaces_catches_address_keys(
    bed: Bed, plane: MakePlane, measured: Callable[[str], None]
) -> None:
    """Claim: keyed by addresses alone, blocks come out of other pods' sockets: it is seen."""
    plane(faults=Fault.ADDRESS_KEYS)
    crowd = Crowd(bed, _LOOKALIKES)
    count = crowd.connect()
    [to_clients, _] = crowd.talk(0, patient(3))
    assert to_clients.right < count
    assert to_clients.misdelivered > 0
    strayed = f"{to_clients.misdelivered} of {count * BLOCK} bytes strayed"
    measured(f"64 namespaces, paired by addresses alone: {strayed}; {to_clients.first}")
