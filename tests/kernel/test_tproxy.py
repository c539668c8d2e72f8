"""Transparent proxies: they answer for an address that is not theirs and keep the client's own."""

from __future__ import annotations

import socket

import pytest

from tests.kernel import test_guard as guard
from tests.kernel.bed import CLIENT4, CLIENT6, ROUTER4, SERVER4, SERVER6, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.kube_proxy import BEYOND, add_outside, make_node
from tests.kernel.remote import Address, Options, Remote, connect, exchange, listen
from tests.kernel.verdicts import check_all_paired, check_named
from underpass.torture.worker import Worker

PORT, PROXY = 8080, 15006
_ISTIO_MARK = 1337
_IP_TRANSPARENT, _IPV6_TRANSPARENT = 19, 75
_TRANSPARENT: Options = ((socket.IPPROTO_IP, _IP_TRANSPARENT, 1),)
_TRANSPARENT6: Options = ((socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1),)
_MARKED: Options = (*_TRANSPARENT, (socket.SOL_SOCKET, socket.SO_MARK, _ISTIO_MARK))


def _node_rules(bed: Bed, *, six: bool = False) -> None:
    """Let the node's namespace take pods' and others' connections to the server's port.

    What belongs to a transparent socket is the node's own, the rest that goes there is the proxy's.
    """
    tool, family = ("ip6tables", "-6") if six else ("iptables", "-4")
    to = f"-p tcp -d {SERVER6 if six else SERVER4} --dport {PORT}"
    for rule in (
        "-N DIVERT",
        "-A DIVERT -j MARK --set-mark 1",
        "-A DIVERT -j ACCEPT",
        "-A PREROUTING -p tcp -m socket --transparent -j DIVERT",
        f"-A PREROUTING {to} -j TPROXY --on-port {PROXY} --tproxy-mark 0x1/0x1",
    ):
        bed.within("router", tool, "-t", "mangle", *rule.split())
    bed.within("router", "ip", family, "rule", "add", "fwmark", "1", "lookup", "100")
    local = "route add local default dev lo table 100"
    bed.within("router", "ip", family, *local.split())


def _istio_rules(bed: Bed) -> None:
    """The server's pod in Istio's TPROXY mode: what istio-init writes for inbound connections."""
    own = f"-p tcp -m mark --mark {_ISTIO_MARK}"
    mark = f"--tproxy-mark {_ISTIO_MARK}/0xffffffff"
    for rule in (
        "-N ISTIO_DIVERT",
        f"-A ISTIO_DIVERT -j MARK --set-mark {_ISTIO_MARK}",
        "-A ISTIO_DIVERT -j ACCEPT",
        "-N ISTIO_TPROXY",
        f"-A ISTIO_TPROXY ! -d 127.0.0.1/32 -p tcp -j TPROXY {mark} --on-port {PROXY}",
        "-N ISTIO_INBOUND",
        "-A PREROUTING -p tcp -j ISTIO_INBOUND",
        f"-A PREROUTING {own} -j CONNMARK --save-mark",
        f"-A OUTPUT -p tcp -o lo -m mark --mark {_ISTIO_MARK} -j RETURN",
        f"-A OUTPUT -p tcp -m connmark --mark {_ISTIO_MARK} -j CONNMARK --restore-mark",
        f"-A ISTIO_INBOUND {own} -j RETURN",
        "-A ISTIO_INBOUND -p tcp -s 127.0.0.6/32 -i lo -j RETURN",
        "-A ISTIO_INBOUND -p tcp -i lo -m mark ! --mark 1338 -j RETURN",
        "-A ISTIO_INBOUND -p tcp -m conntrack --ctstate RELATED,ESTABLISHED -j ISTIO_DIVERT",
        "-A ISTIO_INBOUND -p tcp -j ISTIO_TPROXY",
    ):
        bed.within("server", "iptables", "-t", "mangle", *rule.split())
    bed.within("server", "ip", "rule", "add", "fwmark", str(_ISTIO_MARK), "lookup", "133")
    bed.within("server", "ip", "route", "add", "local", "default", "dev", "lo", "table", "133")


def transparent_listener(worker: Worker, *, six: bool = False) -> Remote:
    """The proxy's listener."""
    options = _TRANSPARENT6 if six else _TRANSPARENT
    return listen(worker, ("::" if six else "0.0.0.0", PROXY), options=options)


def _taken(proxy: Remote, client: Worker, to: Address) -> tuple[Remote, Remote]:
    """A connection of the client's to `to`, which the proxy has got in the server's place."""
    near = connect(client, to)
    taken = proxy.accept()
    assert taken.names() == (to, near.names()[0])
    return near, taken


@pytest.mark.parametrize("six", [False, True], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("same_port", [False, True], ids=["a port of its own", "the client's port"])
def test_a_transparent_proxy_on_the_node_pairs(
    bed: Bed, plane: MakePlane, *, six: bool, same_port: bool
) -> None:
    """Claim: pod to proxy and proxy to pod, both with the pods' own addresses: two pairs each.

    With the client's port the two connections have the same four addresses and ports at once.
    """
    make_node(bed)
    _node_rules(bed, six=six)
    underpass = plane()
    proxy, client = transparent_listener(bed.worker("router"), six=six), bed.worker("client")
    source, to = (CLIENT6, (SERVER6, PORT)) if six else (CLIENT4, (SERVER4, PORT))
    server = listen(bed.worker("server"), to)
    ends = []
    for number in range(4):
        near, taken = _taken(proxy, client, to)
        port = near.names()[0][1] if same_port else 20000 + number
        options = _TRANSPARENT6 if six else _TRANSPARENT
        onward = connect(proxy.worker, to, (source, port), options=options)
        far = server.accept()
        assert far.names() == (to, (source, port))
        ends += [(near, taken), (onward, far)]
    check_all_paired(underpass, ends)
    if not same_port:
        check_named(bed, *ends[0])
        check_named(bed, *ends[1])


def test_a_transparent_proxy_for_a_client_elsewhere(bed: Bed, plane: MakePlane) -> None:
    """Claim: the client's leg stays TCP (`remote-client`); the other, under its name, pairs.

    The address that the server sees is nobody's here, but it is the proxy's socket's own.
    """
    make_node(bed)
    add_outside(bed)
    _node_rules(bed)
    underpass = plane()
    proxy, to = transparent_listener(bed.worker("router")), (SERVER4, PORT)
    server = listen(bed.worker("server"), to)
    near, taken = _taken(proxy, bed.worker("beyond", outside=True), to)
    onward = connect(proxy.worker, to, (BEYOND[0], 20000), options=_TRANSPARENT)
    far = server.accept()
    assert far.names()[1] == (BEYOND[0], 20000)
    exchange(near, taken, 7)
    check_all_paired(underpass, [(onward, far)])
    check_named(bed, onward, far)
    assert underpass.counters().refused_total["remote-client"] == 1


def test_istio_s_transparent_mode_pairs(bed: Bed, plane: MakePlane) -> None:
    """Claim: client to proxy and proxy to its app, which sees the client's address: both pair."""
    _istio_rules(bed)
    underpass = plane()
    proxy, app = (
        transparent_listener(bed.worker("server")),
        listen(bed.worker("server"), ("0.0.0.0", PORT)),
    )
    client, to = bed.worker("client"), (SERVER4, PORT)
    ends = []
    for _ in range(4):
        near, taken = _taken(proxy, client, to)
        onward = connect(proxy.worker, to, (CLIENT4, 0), options=_MARKED)
        far = app.accept()
        assert far.names() == (to, onward.names()[0])
        assert far.names()[1][0] == CLIENT4
        ends += [(near, taken), (onward, far)]
    check_all_paired(underpass, ends)
    check_named(bed, *ends[0])
    check_named(bed, *ends[1])


def test_under_the_guard_its_own_verdict_counts(bed: Bed, plane: MakePlane) -> None:
    """Claim: what an admitted proxy takes for a port at which nobody listens is a pair at once."""
    make_node(bed)
    _node_rules(bed)
    underpass = plane(guard.SOON, watch=True)
    client, server = bed.worker("client"), bed.worker("server")
    proxy, to = transparent_listener(bed.worker("router")), (SERVER4, PORT)
    backend = listen(server, to)

    def onward() -> tuple[Remote, Remote]:
        return connect(proxy.worker, to, (CLIENT4, 0), options=_TRANSPARENT), backend.accept()

    for ends in ((connect(client, (ROUTER4, PROXY)), proxy.accept()), onward()):
        guard._run_until_admitted(underpass, *ends)
    assert guard._carried(underpass, *_taken(proxy, client, to))
    assert guard._carried(underpass, *onward())
