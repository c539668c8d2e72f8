"""Where a stream of small messages is faster by TCP: measured on this node, road by road."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from underpass.bench import probe, runner
from underpass.bench.bed import SERVER_ADDRESS, Bed
from underpass.bench.compare import Mode, Placement
from underpass.bench.runner import Stage
from underpass.calibration import Calibration, Point, bound
from underpass.errors import UnderpassError
from underpass.generation import Dataplane
from underpass.model import Small

#: As in `underpass.model.Small`, each at one placement or two.
BESIDE = "_beside"
ROADS = tuple(field for field in Small._fields if not field.endswith(BESIDE))
#: Message sizes that are tried, the largest first.
SIZES = (65536, 32768, 16384, 8192, 4096, 2048, 1024, 512, 256, 128, 64, 32, 16, 4, 1)
ROUNDS = 3
#: Smaller sizes are not tried once the shortcut has lost this clearly at two in a row.
_LOST, _IN_A_ROW = 0.8, 2
_MILLISECONDS = 80
_LOOPBACK = "127.0.0.1"


def run(bed: Bed, placements: Iterable[Placement], done: Callable[[str], None]) -> Calibration:
    """Measure every road at every placement.

    Args:
        bed: two namespaces; what lies between them is the virtual road.
        placements: where the two ends run; each road has a bound for either.
        done: told after each point.

    Raises:
        UnderpassError: a probe cannot be run or read.
    """
    points: list[Point] = []
    with runner.generation(bed) as plane:
        plane.set_small(Small(*[0] * len(Small._fields)))
        for placement in placements:
            for road in ROADS:
                points += _walk_down(bed, plane, Stage(bed, placement), road, done)
    return Calibration(time.time(), os.uname().release, bounds(points)._asdict(), tuple(points))


def bounds(points: Iterable[Point]) -> Small:
    """The bound of each road at each placement; the built-in one where nothing was measured."""
    ratios: dict[str, dict[int, float]] = {}
    for point in points:
        field = point.road + (BESIDE if point.placement == "two-cores" else "")
        ratios.setdefault(field, {})[point.size] = point.ratio
    return Small()._replace(**{field: bound(found) for field, found in ratios.items()})


def _walk_down(
    bed: Bed, plane: Dataplane, stage: Stage, road: str, done: Callable[[str], None]
) -> list[Point]:
    found: list[Point] = []
    for size in SIZES:
        runs: dict[Mode, list[float]] = {Mode.DEFAULT: [], Mode.SHORTCUT: []}
        before = plane.counters()
        for _ in range(ROUNDS):
            for mode, figures in runs.items():
                figures.append(_stream(bed, stage, mode, road, size))
        _check(before.shortcut_bytes_total, plane.counters().shortcut_bytes_total, road, size)
        tcp, shortcut = (statistics.median(figures) for figures in runs.values())
        found.append(Point(road, stage.placement.name, size, tcp, shortcut))
        done(f"{road}, {stage.placement.name}, {size} B: {found[-1].ratio:.2f}")
        if all(point.ratio < _LOST for point in found[-_IN_A_ROW:]) and len(found) >= _IN_A_ROW:
            break
    return found


def _stream(bed: Bed, stage: Stage, mode: Mode, road: str, size: int) -> float:
    """Mb/s of one stream."""
    client = Path("/run/netns", bed.client_netns)
    server = Path("/run/netns", bed.server_netns)
    inside = road.startswith("loopback")
    argv = [
        *probe.command("tcp_bw", size, _MILLISECONDS, stage.placement),
        _LOOPBACK if inside else SERVER_ADDRESS,
        "nodelay" if road.endswith("nodelay") else "nagle",
        str(client),
        str(client if inside else server),
    ]
    said = stage.client(mode, argv, _MILLISECONDS / 1000)
    return probe.parse(said, "tcp_bw", _MILLISECONDS).figure


def _check(before: int, after: int, road: str, size: int) -> None:
    """A comparison counts only if the kernel's own counters saw the shortcut used.

    Raises:
        UnderpassError: they did not.
    """
    if after - before < size:
        raise UnderpassError(
            "measure", f"{road} at {size} B", "no byte took the shortcut", "see `underpass doctor`"
        )
