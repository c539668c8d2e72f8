"""Unusual handshakes and sockets: paired when proven, plain TCP otherwise, right in any case."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.kernel.bed import SERVER4, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.kube_proxy import make_node
from tests.kernel.remote import IN_SYN, connect, couple, exchange, listen
from tests.kernel.verdicts import check_plain
from underpass.torture.plans import Batch, mixed
from underpass.torture.traffic import run_batch

PORT = 8080
_ULP = 31
_FAST_OPEN_BOTH_WAYS = 3


@pytest.mark.parametrize(
    "setting",
    [
        "net.ipv4.tcp_timestamps=0",
        "net.ipv4.tcp_syncookies=2",
        "net.ipv4.tcp_sack=0",
        "net.ipv4.tcp_window_scaling=0",
        "net.ipv4.tcp_ecn=1",
    ],
)
def test_other_tcp_options_pair(bed: Bed, plane: MakePlane, setting: str) -> None:
    """Claim: whatever options the handshake carries, syncookies included, connections pair."""
    for where in ("client", "server"):
        bed.within(where, "sysctl", "-qw", setting)
    underpass = plane()
    batch = Batch(1, mixed(44, seed=5), SERVER4)
    run_batch(bed.worker("client"), bed.worker("server"), batch).check()
    assert underpass.counters().pairs_total == 44


def test_fast_open_is_right(bed: Bed, plane: MakePlane) -> None:
    """Claim: bytes that travel in the SYN (TCP Fast Open) arrive once and in order."""
    for where in ("client", "server"):
        bed.within(where, "sysctl", "-qw", f"net.ipv4.tcp_fastopen={_FAST_OPEN_BOTH_WAYS}")
    plane()
    client, server = bed.worker("client"), bed.worker("server")
    listener = listen(server, (SERVER4, PORT), fast_open=True)
    for number in range(6):
        near = connect(client, (SERVER4, PORT), fast_open=2 * number + 1)
        far = listener.accept()
        exchange(near, far, 2 * number + 1)
        far.receive(2 * number + 1, IN_SYN)
    used = bed.within("server", "cat", "/proc/net/netstat").splitlines()
    counted = dict(zip(used[0].split(), used[1].split(), strict=True))
    assert int(counted["TCPFastOpenPassive"]) > 0


def test_multipath_tcp_stays_out(bed: Bed, plane: MakePlane) -> None:
    """Claim: MPTCP connections work and never enter the map."""
    if not Path("/proc/sys/net/mptcp").exists():
        pytest.skip("this kernel has no MPTCP")
    underpass = plane()
    protocol = socket.IPPROTO_MPTCP
    listener = listen(bed.worker("server"), (SERVER4, PORT), protocol=protocol)
    near = connect(bed.worker("client"), (SERVER4, PORT), protocol=protocol)
    exchange(near, listener.accept(), 1)
    assert underpass.endpoints() == []
    assert underpass.counters().shortcut_messages_total == 0


def test_a_socket_that_connects_again(bed: Bed, plane: MakePlane) -> None:
    """Claim: a socket that is disconnected (AF_UNSPEC) and connected elsewhere is a new one."""
    underpass = plane()
    client, server = bed.worker("client"), bed.worker("server")
    near, first = couple(client, server, (SERVER4, PORT))
    exchange(near, first, 1)
    listener = listen(server, (SERVER4, PORT + 1))
    for number in range(1, 6):
        near.connect_again((SERVER4, PORT + 1))
        exchange(near, listener.accept(), 2 * number + 1)
    assert underpass.counters().shortcut_messages_total >= 4


def test_upper_layer_protocols_leave_the_shortcut(bed: Bed, plane: MakePlane) -> None:
    """Claim: once a socket is prepared for kTLS, its messages take TCP and stay right."""
    underpass = plane()
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, PORT))
    exchange(near, far, 1)
    try:
        near.set_option(socket.IPPROTO_TCP, _ULP, b"tls")
    except OSError as error:
        pytest.skip(f"this kernel does not prepare a socket of a sockmap for kTLS: {error}")
    before = underpass.counters()
    exchange(near, far, 1)
    after = underpass.counters()
    assert after.shortcut_messages_total == before.shortcut_messages_total
    assert after.tcp_messages_total["ulp"] > 0


def test_an_address_that_comes_later_is_known(bed: Bed, plane: MakePlane) -> None:
    """Claim: SNAT to an address that a namespace got after `up` pairs."""
    later = "10.77.0.200"
    rule = f"-p tcp --dport {PORT} -j SNAT --to-source {later}"
    bed.within("router", "iptables", "-t", "nat", "-A", "POSTROUTING", *rule.split())
    dnat = f"-d 10.96.0.10 -p tcp --dport 80 -j DNAT --to-destination {SERVER4}:{PORT}"
    bed.within("router", "iptables", "-t", "nat", "-A", "PREROUTING", *dnat.split())
    underpass = plane()
    bed.within("router", "ip", "addr", "add", f"{later}/24", "dev", "br0")
    ends = bed.worker("client"), bed.worker("server")
    near, far = couple(*ends, ("10.96.0.10", 80), listen_on=(SERVER4, PORT))
    assert far.names()[1][0] == later
    exchange(near, far, 1)
    assert underpass.counters().pairs_total == 1


def test_a_syn_proxy_stays_tcp(bed: Bed, plane: MakePlane) -> None:
    """Claim: where a firewall answers in the server's place (SYNPROXY), it is right and TCP."""
    make_node(bed)
    to = f"-p tcp -d {SERVER4} --dport {PORT}"
    unknown = f"{to} -m conntrack --ctstate INVALID,UNTRACKED"
    bed.within("router", "sysctl", "-qw", "net.netfilter.nf_conntrack_tcp_loose=0")
    for rule in (
        f"-t raw -A PREROUTING {to} --syn -j CT --notrack",
        f"-A FORWARD {unknown} -j SYNPROXY --sack-perm --timestamp --wscale 7 --mss 1460",
        "-A FORWARD -m conntrack --ctstate INVALID -j DROP",
    ):
        bed.within("router", "iptables", *rule.split())
    underpass = plane()
    near, far = couple(bed.worker("client"), bed.worker("server"), (SERVER4, PORT))
    check_plain(underpass, near, far, "not-local")
    assert underpass.counters().refused_total["remote-client"] == 1
    answered = bed.within("router", "cat", "/proc/net/stat/synproxy").splitlines()[1:]
    assert sum(int(line.split()[1], 16) for line in answered) > 0
