"""Equal addresses in different namespaces never meet."""

from __future__ import annotations

import pytest

from tests.kernel.bed import Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import Remote, connect, exchange, listen
from underpass.model import Fault
from underpass.torture.content import WrongBytesError
from underpass.torture.plans import Batch, mixed
from underpass.torture.traffic import Running

LOOPBACK = "127.0.0.1"
_PORTS = 12


def _twins(bed: Bed) -> list[tuple[Remote, Remote]]:
    """Connections 127.0.0.1:2000x to 127.0.0.1:8080 in two namespaces, in step.

    The handshake ACKs wait, so that both clients are known before either server is.
    """
    places = ("client", "server")
    clients, servers = [bed.worker(at) for at in places], [bed.worker(at) for at in places]
    listeners = [listen(server, (LOOPBACK, 8080)) for server in servers]
    ends: list[tuple[Remote, Remote]] = []
    for port in range(20000, 20000 + _PORTS):
        source = (LOOPBACK, port)
        nears = [connect(one, (LOOPBACK, 8080), source, deferred=True) for one in clients]
        ends += zip(nears, [listener.accept() for listener in listeners], strict=True)
    return ends


def _exchange_all(ends: list[tuple[Remote, Remote]]) -> None:
    for number, (near, far) in enumerate(ends):
        # the server speaks first: a stranger's client would get it
        exchange(far, near, 2 * number + 1, deadline=3)


def test_equal_port_pairs_do_not_meet(bed: Bed, plane: MakePlane) -> None:
    """Claim: two namespaces with the same 127.0.0.1 port pairs exchange no byte."""
    underpass = plane()
    _exchange_all(_twins(bed))
    counters = underpass.counters()
    assert counters.pairs_total == 2 * _PORTS
    assert counters.shortcut_messages_total > 2 * _PORTS
    namespaces = {(pair.client.netns, pair.server.netns) for pair in underpass.pairs()}
    assert namespaces == {(bed.netns[at], bed.netns[at]) for at in ("client", "server")}


def test_the_check_catches_address_keys(bed: Bed, plane: MakePlane) -> None:
    """Claim: keyed by addresses alone, bytes go to the other namespace and the check sees it."""
    plane(faults=Fault.ADDRESS_KEYS)
    with pytest.raises((WrongBytesError, BlockingIOError)):
        _exchange_all(_twins(bed))


def test_equal_port_pairs_under_load(bed: Bed, plane: MakePlane) -> None:
    """Claim: the same holds for 100 busy connections of every shape on each side."""
    underpass = plane()
    running = []
    for number, at in enumerate(("client", "server"), 1):
        batch = Batch(number, mixed(100, seed=number), LOOPBACK)
        running.append(Running(bed.worker(at), bed.worker(at), batch))
    for one in running:
        one.report().check()
    assert underpass.counters().pairs_total == 200
