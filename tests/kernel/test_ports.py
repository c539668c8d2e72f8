"""Ports that are used again, shared listeners, full maps: every connection is right."""

from __future__ import annotations

import errno

import pytest

from tests.kernel.bed import CLIENT4, SERVER4, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.remote import Remote, accept_any, connect, couple, exchange, listen
from tests.kernel.waiting import wait_until
from underpass.model import Settings
from underpass.torture.churn import Churn, churn_connect, churn_serve
from underpass.torture.patience import patient
from underpass.torture.worker import Worker

PORT = 8080
SOURCE = (CLIENT4, 31000)


def test_one_client_port_to_two_servers(bed: Bed, plane: MakePlane) -> None:
    """Claim: connections from one client port to different servers each pair with their own."""
    underpass = plane()
    client, server = bed.worker("client"), bed.worker("server")
    ends = [couple(client, server, (SERVER4, PORT + i), SOURCE) for i in range(8)]
    for _ in range(4):
        for number, (near, far) in enumerate(ends):
            exchange(near, far, 2 * number + 1, rounds=1)
    assert underpass.counters().pairs_total == len(ends)
    assert len(underpass.pairs()) == len(ends)


def _connect_again(client: Worker) -> Remote:
    """From the port that was just in use; a busy machine acknowledges the last FIN late."""

    def connected() -> Remote | None:
        try:
            return connect(client, (SERVER4, PORT), SOURCE)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            return None

    near = wait_until(connected, "the port is free")
    assert near
    return near


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "closed by the server"])
def test_one_client_port_again_and_again(bed: Bed, plane: MakePlane, *, reset: bool) -> None:
    """Claim: a connection whose addresses and ports were just in use pairs with its own peer."""
    underpass = plane()
    client = bed.worker("client")
    listener = listen(bed.worker("server"), (SERVER4, PORT))
    for number in range(60):
        near = _connect_again(client)
        far = listener.accept()
        exchange(near, far, 2 * number + 1, rounds=2)
        far.close(reset=reset)
        if not reset:
            near.expect_eof()
        near.close()
    assert underpass.counters().pairs_total == 60


def test_listeners_that_share_a_port(bed: Bed, plane: MakePlane) -> None:
    """Claim: with SO_REUSEPORT every connection pairs with the listener that accepted it."""
    underpass = plane()
    client = bed.worker("client")
    address = (SERVER4, PORT)
    listeners = [listen(bed.worker("server"), address, reuse_port=True) for _ in range(3)]
    hit = set()
    for number in range(40):
        near = connect(client, address)
        far = accept_any(listeners)
        exchange(near, far, 2 * number + 1, rounds=1)
        hit.add(far.worker.pid)
    assert len(hit) > 1
    assert underpass.counters().pairs_total == 40


def test_forked_processes_that_share_a_listener(bed: Bed, plane: MakePlane) -> None:
    """Claim: connections that forked servers accept from one listener pair and are right."""
    underpass = plane()
    churn = Churn((SERVER4, PORT), 2000, processes=3)
    serving = bed.worker("server").submit(churn_serve, churn)
    assert bed.worker("client").call(churn_connect, churn) == []
    assert serving.result(patient(20)) == []
    assert underpass.counters().pairs_total >= 2000


def test_a_full_map_means_plain_tcp(bed: Bed, plane: MakePlane) -> None:
    """Claim: connections beyond the capacity work over TCP, counted; room is used again."""
    capacity = 4
    underpass = plane(Settings(capacity=capacity))
    client, server = bed.worker("client"), bed.worker("server")
    ends = [couple(client, server, (SERVER4, PORT + i)) for i in range(4 * capacity)]
    for number, (near, far) in enumerate(ends):
        exchange(near, far, 2 * number + 1)
    counters = underpass.counters()
    assert 0 < len(underpass.pairs()) <= capacity
    assert counters.pairs_total + counters.refused_total["map-full"] >= len(ends)
    assert counters.refused_total["map-full"] > 0
    for near, far in ends:
        far.close()
        near.expect_eof()
        near.close()
    exchange(*couple(client, server, (SERVER4, PORT)), 1)
    assert underpass.counters().pairs_total == counters.pairs_total + 1
