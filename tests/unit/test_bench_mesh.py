"""What a sidecar is told, and how the mesh's workload is read. No kernel, no Envoy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_bench_programs import WRK_MANY
from underpass.bench import envoy
from underpass.bench.compare import SIDECARS, Mode, Moved, Sample, Volume
from underpass.bench.envoy import Kind
from underpass.bench.mesh import Leg, Part
from underpass.bench.way import Reach
from underpass.bench.workloads import WORKLOADS
from underpass.cli.bench import bench
from underpass.errors import Usage

ISTIO = """
-A ISTIO_OUTPUT -s 127.0.0.6/32 -o lo -j RETURN
-A ISTIO_OUTPUT ! -d 127.0.0.1/32 -o lo -p tcp -m tcp ! --dport 15008 \
-m owner --uid-owner 1337 -j ISTIO_IN_REDIRECT
-A ISTIO_OUTPUT -o lo -m owner ! --uid-owner 1337 -j RETURN
-A ISTIO_OUTPUT -m owner --uid-owner 1337 -j RETURN
-A ISTIO_OUTPUT ! -d 127.0.0.1/32 -o lo -p tcp -m tcp ! --dport 15008 \
-m owner --gid-owner 1337 -j ISTIO_IN_REDIRECT
-A ISTIO_OUTPUT -o lo -m owner ! --gid-owner 1337 -j RETURN
-A ISTIO_OUTPUT -m owner --gid-owner 1337 -j RETURN
-A ISTIO_OUTPUT -d 127.0.0.1/32 -j RETURN
-A ISTIO_OUTPUT -j ISTIO_REDIRECT
"""
"""The chain of a pod with a sidecar as `iptables-save` prints it, in its order."""
WRK_MESH = f"{WRK_MANY}sidecar_ticks 50\n"


def chains(config: dict[str, Any], port: int) -> dict[int, dict[str, Any]]:
    """The filter chains of the listener at a port, by the application's port."""
    (listener,) = (
        each
        for each in config["static_resources"]["listeners"]
        if each["address"]["socket_address"]["port_value"] == port
    )
    return {
        chain["filter_chain_match"]["destination_port"]: chain
        for chain in listener["filter_chains"]
    }


def test_the_rules_are_istio_s() -> None:
    """What leaves a pod meets Istio's rules, all of them, in Istio's order."""
    lines = [line for line in envoy.rules().splitlines() if line.startswith("-A ISTIO_OUTPUT")]
    assert lines == ISTIO.strip().splitlines()


def test_a_sidecar_has_a_chain_for_every_kind() -> None:
    """Both listeners tell the kinds by port; TLS is between the Envoys, and only there."""
    config = envoy.config("client", "server", "/certificates")
    assert json.loads(json.dumps(config)) == config
    for port in (envoy.OUTBOUND, envoy.INBOUND):
        found = chains(config, port)
        assert set(found) == {kind.value for kind in Kind}
        ciphered = {number for number, chain in found.items() if "transport_socket" in chain}
        assert ciphered == ({Kind.MTLS.value} if port == envoy.INBOUND else set())
    clusters = {each["name"]: each for each in config["static_resources"]["clusters"]}
    ciphered_ways = {name for name, each in clusters.items() if "transport_socket" in each}
    assert ciphered_ways == {f"out-{Kind.MTLS.value}"}
    for name, cluster in clusters.items():
        assert ("upstream_bind_config" in cluster) == name.startswith("in-")


def test_an_envoy_trusts_its_peer_alone() -> None:
    """Either side shows its own certificate and wants the other's name in the one it sees."""
    text = json.dumps(envoy.config("client", "server", "/certificates"))
    assert "/certificates/client.key" in text
    assert envoy.IDENTITY.format("server") in text
    assert envoy.IDENTITY.format("client") not in text


def test_neighbours_share_a_leg() -> None:
    """Three legs between four programs, each with its two ends."""
    assert [set(leg.ends) for leg in Leg] == [
        {Part.CLIENT, Part.CLIENT_ENVOY},
        {Part.CLIENT_ENVOY, Part.SERVER_ENVOY},
        {Part.SERVER_ENVOY, Part.SERVER},
    ]


def test_each_leg_has_rows_of_its_own(tmp_path: Path) -> None:
    """All legs and each alone, for two sizes and kinds; a leg alone is judged by its own part."""
    rows = WORKLOADS["mesh"].measures(Reach(tmp_path), 1)
    assert len(rows) == len({(row.test, row.label) for row in rows}) == 16
    for row in rows:
        volume = row.parse(WRK_MESH).volume
        legs = 3 if "all legs" in row.label else 1
        assert row.crossing == 1 / legs  # the leg between the pods
        small = Volume("messages", 2 * legs * 120_411)
        assert volume == (small if "small" in row.test else Volume("bytes", legs * 120_411 << 16))
    clients = [row.argv(mode)[0] for row in rows for mode in (Mode.DEFAULT, Mode.SHORTCUT)]
    assert len(set(clients)) == 5  # one mesh by TCP, one for each choice of legs


def test_what_of_the_cpu_is_the_sidecars_own(tmp_path: Path) -> None:
    """Half a second in user mode of two seconds of CPU time is a quarter."""
    reading = WORKLOADS["mesh"].measures(Reach(tmp_path), 1)[0].parse(WRK_MESH)
    assert reading.sidecar_seconds == pytest.approx(0.5)
    assert Sample(Mode.SHORTCUT, 0, reading, Moved(), 2.0).also[SIDECARS] == pytest.approx(25)
    assert SIDECARS not in Sample(Mode.SHORTCUT, 0, reading, Moved(), None).also


def test_the_naive_bypass_is_refused() -> None:
    """NAT hides the mesh from it: a usage error before anything is made."""
    context = bench.make_context("bench", ["--mesh", "--naive"], obj=Path("/nowhere"))
    with pytest.raises(Usage, match="NAT hides the connections of workload mesh"):
        bench.invoke(context)


@pytest.mark.parametrize(
    ("words", "workload"),
    [
        ([], "qperf"),
        (["--mesh"], "mesh"),
        (["--workload", "mesh"], "mesh"),
        (["--mesh", "--workload", "mesh"], "mesh"),
    ],
)
def test_mesh_is_a_short_word_for_the_workload(
    words: list[str], workload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--mesh` is `--workload mesh`, and neither is qperf."""

    def chosen(name: str, **_: object) -> None:
        raise Usage("choose", name, "that is all", "look at it")

    monkeypatch.setattr("underpass.cli.bench.choose", chosen)
    context = bench.make_context("bench", words, obj=Path("/nowhere"))
    with pytest.raises(Usage, match=f"cannot choose {workload}:"):
        bench.invoke(context)


@pytest.mark.parametrize("other", ["redis", "qperf"])
def test_mesh_beside_another_workload_is_refused(other: str) -> None:
    """Whichever comes first: neither is left aside in silence."""
    for words in (["--mesh", "--workload", other], ["--workload", other, "--mesh"]):
        context = bench.make_context("bench", words, obj=Path("/nowhere"))
        with pytest.raises(Usage, match=f"--mesh with --workload {other}"):
            bench.invoke(context)
