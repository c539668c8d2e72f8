"""A mesh that spans nodes: what is on this node is accelerated, the rest is TCP and says why."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kernel.commands import underpass
from tests.mesh.conftest import Running, running
from tests.mesh.legs import CONNECTIONS, leg_of, load, pairs, steady, wrong
from underpass.bench import envoy
from underpass.bench.envoy import Kind
from underpass.bench.mesh import EVERY, Leg, Part

AWAY = {
    "client": frozenset({Part.CLIENT}),
    "client's pod": frozenset({Part.CLIENT, Part.CLIENT_ENVOY}),
    "server's pod": frozenset({Part.SERVER_ENVOY, Part.SERVER}),
    "server": frozenset({Part.SERVER}),
    "both applications": frozenset({Part.CLIENT, Part.SERVER}),
}
"""What runs outside the covered cgroup, as if on another node."""
KIND = Kind.TCP


@pytest.mark.usefixtures("clean_machine")
@pytest.mark.parametrize("away", AWAY)
def test_legs_across_nodes(away: str) -> None:
    """Claim: a leg with an end elsewhere is TCP and its reason is told; all others go under."""
    gone = AWAY[away]
    local = tuple(leg for leg in Leg if not leg.ends & gone)
    with running(EVERY - gone) as run, load(run, KIND):
        assert wrong(*steady(run, KIND, local), run, KIND, local) == []
        told = pairs(run)
        assert {leg_of(pair, run.mesh, KIND) for pair in told} == set(local)
        paired = {f"{pair['client']['address']}:{pair['client']['port']}" for pair in told}
        found = explained(run)
        for finding in found:
            client = finding["subject"].split(" ")[0]
            expected = "shortcut" if client in paired else "outside-cgroup"
            assert finding["reason"] == expected, finding
            assert (finding["path"] == "shortcut") == (client in paired), finding
        on_tcp = {finding["subject"] for finding in found if finding["path"] == "tcp"}
        assert len(on_tcp) >= CONNECTIONS * (len(Leg) - len(local))
        refused = run.plane.counters().refused_total
    for reason, legs in refusals(gone).items():
        assert refused[reason] >= CONNECTIONS * legs, refused
        assert legs or not refused[reason], refused


def refusals(gone: frozenset[Part]) -> dict[str, int]:
    """By what the kernel counts: legs of which one end is here and must be turned down."""
    ends = list(zip(Part, list(Part)[1:], strict=False))
    return {
        "remote-client": sum(client in gone and server not in gone for client, server in ends),
        "not-local": sum(client not in gone and server in gone for client, server in ends),
    }


def explained(run: Running) -> list[dict[str, Any]]:
    """What `underpass explain` says of every open connection of the mesh."""
    found: list[dict[str, Any]] = []
    for client in (run.mesh.client.address, envoy.PASSTHROUGH):
        words = ["explain", client, f"{run.mesh.server.address}:{KIND.value}", "--json"]
        found += underpass(run.bed.pins, *words).document()["findings"]
    return found
