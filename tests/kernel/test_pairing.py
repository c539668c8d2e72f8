"""Which connections pair: every one whose two ends are here, and no other."""

from __future__ import annotations

import json

import pytest

from tests.kernel.bed import CLIENT4, ROUTER4, SERVER4, SERVER6, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import ROUND, Address, connect, couple, exchange, hide, listen
from tests.kernel.verdicts import check_paired, check_plain
from underpass.dataplane import Dataplane
from underpass.model import Fault

SERVICE = "10.96.0.10"
PORT = 8080


@pytest.mark.parametrize(
    ("to", "listen_on"),
    [
        pytest.param((SERVER4, PORT), None, id="IPv4"),
        pytest.param((SERVER6, PORT), None, id="IPv6"),
        pytest.param((SERVER4, PORT), ("::", PORT), id="dual stack"),
        pytest.param((f"::ffff:{SERVER4}", PORT), None, id="IPv4-mapped"),
    ],
)
def test_plain_connections_pair(
    bed: Bed, plane: MakePlane, to: Address, listen_on: Address | None
) -> None:
    """Claim: a connection between two namespaces pairs, in every address family."""
    underpass = plane()
    ends = couple(bed.worker("client"), bed.worker("server"), to, listen_on=listen_on)
    check_paired(underpass, *ends)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", CLIENT4])
def test_connections_inside_a_namespace_pair(bed: Bed, plane: MakePlane, address: str) -> None:
    """Claim: a connection over loopback or to an own address pairs."""
    underpass = plane()
    ends = couple(bed.worker("client"), bed.worker("client"), (address, PORT))
    check_paired(underpass, *ends)


def test_dnat_pairs(bed: Bed, plane: MakePlane) -> None:
    """Claim: a connection to a service address that is rewritten to the server's pairs."""
    _redirect(bed, "client", "OUTPUT", f"{SERVER4}:{PORT}")
    underpass = plane()
    workers = bed.worker("client"), bed.worker("server")
    near, far = couple(*workers, (SERVICE, 80), listen_on=(SERVER4, PORT))
    assert near.names()[1] == (SERVICE, 80)
    assert far.names()[1] == near.names()[0]
    check_paired(underpass, near, far)


def test_dnat_with_snat_pairs(bed: Bed, plane: MakePlane) -> None:
    """Claim: a connection pairs although the server sees the router's address as the client's."""
    _redirect(bed, "router", "PREROUTING", f"{SERVER4}:{PORT}")
    _masquerade(bed)
    underpass = plane()
    workers = bed.worker("client"), bed.worker("server")
    near, far = couple(*workers, (SERVICE, 80), listen_on=(SERVER4, PORT))
    assert far.names()[1][0] == ROUTER4
    check_paired(underpass, near, far)


def test_hairpin_pairs(bed: Bed, plane: MakePlane) -> None:
    """Claim: a connection that leaves a namespace and comes back to it through a service pairs."""
    _redirect(bed, "router", "PREROUTING", f"{CLIENT4}:{PORT}")
    _masquerade(bed)
    underpass = plane()
    workers = bed.worker("client"), bed.worker("client")
    near, far = couple(*workers, (SERVICE, 80), listen_on=(CLIENT4, PORT))
    assert far.names()[1][0] == ROUTER4
    check_paired(underpass, near, far)


def test_an_address_that_nobody_here_holds_does_not_pair(bed: Bed, plane: MakePlane) -> None:
    """Claim: where the server sees an address that no namespace holds, it stays TCP."""
    foreign = "10.77.0.77"
    rule = f"-p tcp --dport {PORT} -j SNAT --to-source {foreign}"
    bed.within("router", "iptables", "-t", "nat", "-A", "POSTROUTING", *rule.split())
    _redirect(bed, "router", "PREROUTING", f"{SERVER4}:{PORT}")
    link = json.loads(bed.within("router", "ip", "-j", "link", "show", "br0"))[0]["address"]
    bed.within("server", "ip", "neigh", "add", foreign, "lladdr", link, "dev", "eth0")
    underpass = plane()
    workers = bed.worker("client"), bed.worker("server")
    near, far = couple(*workers, (SERVICE, 80), listen_on=(SERVER4, PORT))
    assert far.names()[1][0] == foreign
    check_plain(underpass, near, far, "address-mismatch")


def _half_elsewhere(bed: Bed, underpass: Dataplane, *, client: bool) -> None:
    """One end is outside the cgroup, as on another node: the other never enters the map."""
    workers = bed.worker("client", outside=client), bed.worker("server", outside=not client)
    near, far = couple(*workers, (SERVER4, PORT))
    assert underpass.endpoints() == []
    check_plain(underpass, near, far, "remote-client" if client else "not-local")


def test_a_server_elsewhere_never_enters(bed: Bed, plane: MakePlane) -> None:
    """Claim: a client whose server is outside the cgroup, as on another node, stays untouched."""
    _half_elsewhere(bed, plane(), client=False)


def test_a_client_elsewhere_never_enters(bed: Bed, plane: MakePlane) -> None:
    """Claim: a server whose client is outside the cgroup, as on another node, stays untouched."""
    _half_elsewhere(bed, plane(), client=True)


def test_the_check_catches_a_missing_proof(bed: Bed, plane: MakePlane) -> None:
    """Claim: when every client enters without proof, the check above fails."""
    underpass = plane(faults=Fault.NO_PROOF)
    with pytest.raises(AssertionError):
        _half_elsewhere(bed, underpass, client=False)


def test_a_socket_connected_to_itself_stays_tcp(bed: Bed, plane: MakePlane) -> None:
    """Claim: a self-connected socket works and never enters the map."""
    underpass = plane()
    own = (CLIENT4, 30000)
    both = connect(bed.worker("client"), own, own)
    for _ in range(5):
        both.send(1, ROUND)
        both.receive(1, ROUND)
    assert underpass.endpoints() == []
    assert underpass.counters().shortcut_messages_total == 0


def test_listeners_that_stood_before_pair(bed: Bed, plane: MakePlane) -> None:
    """Claim: a server that listened before `up`, in another namespace, is armed by it."""
    places = {"server": SERVER4, "client": CLIENT4}
    listeners = [listen(bed.worker(at), (address, PORT)) for at, address in places.items()]
    underpass = plane()
    for listener, address in zip(listeners, places.values(), strict=True):
        near = connect(bed.worker("client"), (address, PORT))
        exchange(near, listener.accept(), 1)
    assert underpass.counters().pairs_total == 2


def test_a_listener_that_no_iterator_reaches_pairs(bed: Bed, plane: MakePlane) -> None:
    """Claim: a listener that stood before `up` and was not armed has its connections proven too."""
    here = ("127.0.0.1", PORT)
    near, listener = hide(bed.worker("client"), here)
    underpass = plane()
    near.connect_again(here)
    exchange(near, listener.accept(), 1)
    counters = underpass.counters()
    assert counters.pairs_total == 1
    assert counters.shortcut_messages_total > 0


def test_connections_that_stood_before_stay_tcp(bed: Bed, plane: MakePlane) -> None:
    """Claim: a connection made before `up` goes on undisturbed."""
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, PORT))
    exchange(near, far, 1)
    underpass = plane()
    exchange(near, far, 1)
    assert underpass.counters().shortcut_messages_total == 0


def _redirect(bed: Bed, where: str, chain: str, to: str) -> None:
    rule = f"-d {SERVICE} -p tcp --dport 80 -j DNAT --to-destination {to}"
    bed.within(where, "iptables", "-t", "nat", "-A", chain, *rule.split())


def _masquerade(bed: Bed) -> None:
    bed.within("router", "iptables", "-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE")
