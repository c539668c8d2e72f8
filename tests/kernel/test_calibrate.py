"""`underpass calibrate` measures what it says, keeps what it found, and leaves nothing behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.kernel.bed import Bed, cgroup2
from tests.kernel.commands import underpass
from underpass.bench import bed as beds
from underpass.bench import calibrate
from underpass.bench.compare import Placement
from underpass.cli.calibrate import calibrate as command
from underpass.model import Small

SIZES = (4096, 1)


def test_every_road_is_measured(
    clean_machine: None,  # noqa: ARG001 - swept before, checked after
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Claim: each road at each placement has figures that the kernel's counters bear out."""
    monkeypatch.setattr(calibrate, "SIZES", SIZES)
    monkeypatch.setattr(calibrate, "ROUNDS", 1)
    placements = [Placement("one-core", (0,), (0,)), Placement("two-cores", (0,), (1,))]
    with beds.Bed(cgroup2(), beds.Way()) as here:
        left = (here.pins, here.cgroup, Path("/run/netns", here.client_netns))
        found = calibrate.run(here, placements, lambda _: None)
    assert {(p.placement, p.road, p.size) for p in found.points} == {
        (placement.name, road, size)
        for placement in placements
        for road in calibrate.ROADS
        for size in SIZES
    }
    assert all(point.tcp > 0 and point.shortcut > 0 for point in found.points)
    assert set(found.small) == set(Small._fields)
    assert not any(path.exists() for path in left)


def test_it_prints_what_it_found(
    clean_machine: None,  # noqa: ARG001 - swept before, checked after
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Claim: as a line for each road and placement, or as JSON with every point."""
    monkeypatch.setattr(calibrate, "SIZES", SIZES[:1])
    monkeypatch.setattr(calibrate, "ROUNDS", 1)
    pins = Path("/sys/fs/bpf/underpass-none")
    told = CliRunner().invoke(command, ["--dry-run", "--json"], obj=pins)
    document = json.loads(told.stdout)
    assert document["small"].keys() == set(Small._fields)
    assert len(document["points"]) == len(calibrate.ROADS) * min(2, len(os.sched_getaffinity(0)))
    assert document["points"][0]["shortcut"] > 0
    assert not document["kept"]
    text = CliRunner().invoke(command, ["--dry-run"], obj=pins)
    assert len(text.stdout.splitlines()) == len(Small._fields)


def test_a_path_that_there_is_not(bed: Bed) -> None:
    """Claim: a wrong path is refused before anything is made."""
    underpass(bed.pins, "calibrate", "--path", "nowhere").failed(2, "--path nowhere")
