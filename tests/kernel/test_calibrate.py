"""`underpass calibrate` measures what it says, keeps what it found, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.kernel.bed import ADMITTING, Bed, cgroup2
from tests.kernel.commands import command as words
from tests.kernel.commands import underpass
from tests.kernel.fixtures import MakePlane
from tests.kernel.waiting import wait_until
from underpass import namespaces
from underpass.bench import bed as beds
from underpass.bench import calibrate, probe, twopods
from underpass.bench.calibrate import Effort, Place
from underpass.bench.compare import Placement
from underpass.bench.way import Way
from underpass.cli.calibrate import calibrate as command
from underpass.errors import UnderpassError
from underpass.model import Rule, Small

FEW = Effort(sizes=(4096, 1), rounds=1)
ONE = Effort(sizes=(4096,), rounds=1)
PLACEMENTS = [Placement("one-core", (0,), (0,)), Placement("two-cores", (0,), (1,))]


@contextmanager
def _made(way: Way) -> Iterator[Place]:
    """The place that this way is measured in; afterwards it is gone."""
    made = twopods.made(cgroup2()) if way == Way() else beds.Bed(cgroup2(), way)
    with made as here:
        yield here
    left = (beds.pins(), cgroup2() / beds.name(), Path("/run/netns", f"up-bench-{os.getpid()}-a"))
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize(
    ("way", "placements", "effort"),
    [(Way(), PLACEMENTS, FEW), (Way("iptables", 5), PLACEMENTS[:1], ONE)],
    ids=["bridge, without a program", "iptables"],
)
def test_every_road_is_measured(
    clean_machine: None,  # noqa: ARG001 - swept before, checked after
    way: Way,
    placements: list[Placement],
    effort: Effort,
) -> None:
    """Claim: each road at each placement has figures that the kernel's counters bear out."""
    with _made(way) as place:
        found = calibrate.run(place, placements, lambda _: None, effort)
    assert {(p.placement, p.road, p.size) for p in found.points} == {
        (placement.name, road, size)
        for placement in placements
        for road in calibrate.ROADS
        for size in effort.sizes
    }
    assert all(point.tcp > 0 and point.shortcut > 0 for point in found.points)
    assert set(found.small) == set(Small._fields)


@pytest.mark.parametrize("kept_out", [True, False])
def test_where_all_is_covered_default_is_native(bed: Bed, plane: MakePlane, kept_out: bool) -> None:
    """Claim: a generation that covers all pairs no stream of the probe, by a rule that goes again.

    Without that rule it does, or the measuring generation finds no socket free.
    """
    outer = plane(ADMITTING)
    before = outer.counters().pairs_total
    aside = calibrate.aside([bed.pins]) if kept_out else nullcontext()
    with twopods.made(bed.cgroup) as here, aside:
        assert (outer.rules().get((0, probe.NAME.encode())) == Rule.DENY) is kept_out
        try:
            found = calibrate.run(here, PLACEMENTS[:1], lambda _: None, ONE)
        except UnderpassError:
            assert not kept_out
        else:
            assert len(found.points) == len(calibrate.ROADS)
    assert (outer.counters().pairs_total == before) is kept_out
    assert outer.rules() == {}


def test_a_generation_that_came_anew_spoils_it(bed: Bed, plane: MakePlane) -> None:
    """Claim: if the rule did not hold to the end, what was measured is not believed."""
    outer = plane(ADMITTING)
    with pytest.raises(UnderpassError, match="made anew"), calibrate.aside([bed.pins]):
        outer.set_rule(probe.NAME, Rule.NONE)


def test_it_prints_what_it_found(
    clean_machine: None,  # noqa: ARG001 - swept before, checked after
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Claim: as a line for each road and placement, or as JSON with every point."""
    monkeypatch.setattr(calibrate, "FULL", ONE)
    pins = Path("/sys/fs/bpf/underpass-none")
    told = CliRunner().invoke(command, ["--dry-run", "--json"], obj=pins)
    document = json.loads(told.stdout)
    assert document["small"].keys() == set(Small._fields)
    assert len(document["points"]) == len(calibrate.ROADS) * min(2, len(os.sched_getaffinity(0)))
    assert document["points"][0]["shortcut"] > 0
    assert not document["kept"]
    text = CliRunner().invoke(command, ["--dry-run"], obj=pins)
    assert len(text.stdout.splitlines()) == len(Small._fields)


def test_what_a_kill_leaves_the_next_one_clears(bed: Bed) -> None:
    """Claim: killed in the middle it leaves cgroup and pins, no namespace; a sweep clears them."""
    with subprocess.Popen(
        words(bed.pins, "calibrate", "--dry-run"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as calibrating:
        assert calibrating.stderr
        assert "virtual" in calibrating.stderr.readline()
        spaces = _held(calibrating.pid)
        assert len(spaces) == 3
        calibrating.kill()
    name = f"underpass-bench-{calibrating.pid}"
    left = [cgroup2() / name, beds.pins().with_name(name)]
    assert all(path.exists() for path in left)
    wait_until(
        lambda: not spaces & {f"net:[{ns.inode}]" for ns in namespaces.net_namespaces()},
        "its namespaces have gone",
    )
    assert calibrating.pid in beds.sweep(cgroup2())
    assert not any(path.exists() for path in left)


def _held(pid: int) -> set[str]:
    """Network namespaces that a process holds by a file."""
    held = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # others it opens and closes
            held.add(str(file.readlink()))
    return {target for target in held if target.startswith("net:[")}


def test_gently_it_ends_with_who_started_it(bed: Bed) -> None:
    """Claim: an agent that is killed leaves no calibration at work for long, and no trace of it."""
    script = '"$@" & echo $!; wait'
    calibrate_gently = words(bed.pins, "calibrate", "--gently", "--dry-run")
    with subprocess.Popen(
        ["sh", "-c", script, "sh", *calibrate_gently],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as shell:
        assert shell.stdout
        pid = int(shell.stdout.readline())
        name = f"underpass-bench-{pid}"
        wait_until(beds.pins().with_name(name).exists, "it has begun")
        shell.send_signal(signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), "it has ended", 60)
    assert not (cgroup2() / name).exists()
    assert not beds.pins().with_name(name).exists()


def test_a_busy_node_is_not_measured(clean_machine: None) -> None:  # noqa: ARG001 - swept before
    """Claim: while others have the core, what is measured with pauses is not believed."""
    with subprocess.Popen(["taskset", "-c", "0", "sh", "-c", "while :; do :; done"]) as other:
        try:
            rest = Effort(sizes=(4096,) * 3, rounds=2, milliseconds=10, rest=8.0)
            with (
                twopods.made(cgroup2()) as place,
                pytest.raises(UnderpassError, match="other work has"),
            ):
                calibrate.run(place, PLACEMENTS[:1], lambda _: None, rest)
        finally:
            other.kill()


def test_a_path_that_there_is_not(bed: Bed) -> None:
    """Claim: a wrong path is refused before anything is made."""
    underpass(bed.pins, "calibrate", "--path", "nowhere").failed(2, "--path nowhere")
