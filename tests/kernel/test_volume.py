"""A hundred thousand short connections: all right, and nothing of them stays behind."""

from __future__ import annotations

import itertools

from tests.kernel.bed import SERVER4, Bed
from tests.kernel.fixtures import MakePlane
from tests.kernel.waiting import wait_until
from underpass.torture.churn import Churn, churn_connect, churn_serve
from underpass.torture.patience import fewer, patient

_SERVERS = 2
CONNECTIONS = fewer(100_000 // _SERVERS) * _SERVERS
_DEADLINE = patient(240.0)


def test_short_connections(bed: Bed, plane: MakePlane) -> None:
    """Claim: 100,000 connections of one request are right and leave no entry in any map."""
    underpass = plane()
    share = CONNECTIONS // _SERVERS
    running = []
    for number in range(_SERVERS):
        churn = Churn((SERVER4, 8080 + number), share, number * share)
        running.append(bed.worker("server").submit(churn_serve, churn))
        running.append(bed.worker("client").submit(churn_connect, churn))
    complaints = list(itertools.chain(*(one.result(_DEADLINE) for one in running)))
    assert complaints == []
    counters = underpass.counters()
    assert counters.pairs_total >= CONNECTIONS
    assert counters.shortcut_messages_total >= CONNECTIONS
    wait_until(lambda: not underpass.pairs(), "every pair ends")
    wait_until(lambda: not any(underpass.leftovers().values()), "handoff maps empty")
