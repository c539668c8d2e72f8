"""Many clients behind one address of the node: NAT's ports, which collide and come again."""

from __future__ import annotations

import pytest

from tests.kernel.bed import CLIENT4, ROUTER4, SERVER4, Bed
from tests.kernel.crowd import (
    crowd_accept,
    crowd_answer,
    crowd_ask,
    crowd_close,
    crowd_connect,
    crowd_peers,
)
from tests.kernel.fixtures import MakePlane
from tests.kernel.kube_proxy import OTHER4, make_node
from tests.kernel.remote import begin_connect, connect, couple, exchange, listen
from tests.kernel.verdicts import check_named, check_paired, check_plain
from tests.kernel.waiting import holds_for
from underpass.torture.patience import fewer

PORT = 8080
_CLIENTS = {"client": CLIENT4, "other": OTHER4}
_CROWD = 1000
_TURNS = 3
_TIMEOUTS = "net.netfilter.nf_conntrack_tcp_timeout_"


def _masquerade(bed: Bed, how: str) -> None:
    """All that pods send to the server's port leaves under the node's address."""
    make_node(bed)
    rule = f"-p tcp -d {SERVER4} --dport {PORT} -j MASQUERADE {how}"
    bed.within("router", "iptables", "-t", "nat", "-A", "POSTROUTING", *rule.split())
    bed.within("router", "sysctl", "-qw", f"{_TIMEOUTS}close=1")


@pytest.mark.parametrize(
    "how", ["", "--random-fully", "--to-ports 20000-21199 --random-fully"], ids=lambda how: how[:12]
)
def test_1000_clients_behind_one_address(bed: Bed, plane: MakePlane, how: str) -> None:
    """Claim: 1,000 at once from two pods that use the same ports, to one server: every byte right.

    Each is a pair of its own, and the server sees 1,000 ports of the one address.
    """
    _masquerade(bed, how)
    count = fewer(_CROWD // len(_CLIENTS))
    for where in _CLIENTS:  # so few that the two pods choose the same ones
        few = f"net.ipv4.ip_local_port_range=30000 {30000 + 2 * count}"
        bed.within(where, "sysctl", "-qw", few)
    underpass = plane()
    server = bed.worker("server")
    accepting = server.submit(crowd_accept, (SERVER4, PORT), count * len(_CLIENTS))
    clients = [bed.worker(where) for where in _CLIENTS]
    for connecting in [each.submit(crowd_connect, (SERVER4, PORT), count) for each in clients]:
        connecting.result(60)
    accepting.result(60)
    own = [(p.client.netns, p.client.address, p.client.port) for p in underpass.pairs()]
    for turn in range(_TURNS):
        answering = server.submit(crowd_answer, turn)
        asking = [each.submit(crowd_ask, n * count, turn) for n, each in enumerate(clients)]
        assert [each.result(60) for each in asking] == [count] * len(clients)
        assert answering.result(60) == count * len(clients)
    assert len(set(own)) == len(own) == count * len(clients)
    assert {address for _, address, _ in own} == set(_CLIENTS.values())
    assert len({port for _, _, port in own}) < len(own), "no port was used by both pods"
    seen = server.call(crowd_peers)
    assert {address for address, _ in seen} == {ROUTER4}
    assert len(set(seen)) == len(own)
    if "--to-ports" in how:
        assert all(20000 <= port < 21200 for _, port in seen)
    counters = underpass.counters()
    assert counters.pairs_total == len(own)
    # where a thousand wait for one reader, a busy machine keeps some on TCP
    assert counters.shortcut_messages_total > (_TURNS - 1) * len(own)
    for worker in (server, *clients):
        worker.call(crowd_close)


def test_ports_that_come_again(bed: Bed, plane: MakePlane) -> None:
    """Claim: what the server sees as one address and port is one pod's now and another's then.

    Two pods share three ports. Every connection is a pair of its own and hears its own bytes.
    """
    _masquerade(bed, "--to-ports 20000-20002 --random-fully")
    underpass = plane()
    listener = listen(bed.worker("server"), (SERVER4, PORT))
    clients = {where: bed.worker(where) for where in _CLIENTS}
    seen: set[tuple[str, int]] = set()
    turns = fewer(40)
    for turn in range(turns):
        ends = []
        for where, client in clients.items():
            near = connect(client, (SERVER4, PORT), (_CLIENTS[where], 30000))
            far = listener.accept()
            address, port = far.names()[1]
            assert address == ROUTER4
            seen.add((where, port))
            ends.append((near, far))
        for number, (near, far) in enumerate(ends):
            exchange(near, far, 4 * turn + 2 * number + 1, rounds=2)
        assert len(underpass.pairs()) == len(ends)
        for near, far in ends:
            near.close(reset=True)
            far.close()
    counters = underpass.counters()
    assert counters.pairs_total == turns * len(clients)
    assert len(seen) > len({port for _, port in seen}), "no port came again for another pod"
    assert counters.shortcut_messages_total >= 2 * counters.pairs_total


def test_a_client_that_waits_for_a_port_pairs(bed: Bed, plane: MakePlane) -> None:
    """Claim: where NAT has no port left its SYN is dropped; sent again, it gets one and pairs."""
    _masquerade(bed, "--to-ports 20000-20000")
    underpass = plane()
    listener = listen(bed.worker("server"), (SERVER4, PORT))
    near = connect(bed.worker("other"), (SERVER4, PORT))
    far = listener.accept()
    exchange(near, far, 1)
    waiting = begin_connect(bed.worker("client"), (SERVER4, PORT))
    assert holds_for(lambda: underpass.counters().pairs_total == 1, 1.5)
    exchange(near, far, 1)
    near.close(reset=True)
    far.close()
    served = listener.accept()
    assert served.names()[1] == (ROUTER4, 20000)
    exchange(waiting, served, 3)
    [pair] = underpass.pairs()
    assert {pair.client_to_server.path, pair.server_to_client.path} == {"shortcut"}
    check_named(bed, waiting, served)


@pytest.mark.parametrize("number", [40, 70])
def test_how_many_addresses_of_a_device_are_known(bed: Bed, plane: MakePlane, number: int) -> None:
    """Claim: SNAT to one of a device's first 64 addresses pairs; a later one is not found."""
    make_node(bed)
    adding = "for n in $(seq 70); do ip addr add 10.78.0.$n/32 dev br0; done"
    bed.within("router", "sh", "-ec", adding)
    rule = f"-p tcp -d {SERVER4} --dport {PORT} -j SNAT --to-source 10.78.0.{number}"
    bed.within("router", "iptables", "-t", "nat", "-A", "POSTROUTING", *rule.split())
    underpass = plane()
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, PORT))
    assert far.names()[1][0] == f"10.78.0.{number}"
    if number < 64:
        check_paired(underpass, near, far)
    else:
        check_plain(underpass, near, far, "address-mismatch")
