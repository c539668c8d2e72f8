"""Where a stream of small messages is faster by TCP: measured on this node, road by road."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from underpass import dataplane
from underpass.bench import probe, runner
from underpass.bench.compare import Mode, Placement
from underpass.bench.others import Others
from underpass.bench.processes import Group
from underpass.bench.way import SERVER_ADDRESS
from underpass.calibration import METHOD, Calibration, Point, bound
from underpass.errors import UnderpassError
from underpass.generation import Dataplane
from underpass.model import Rule, Small

#: As in `underpass.model.Small`, each at one placement or two.
BESIDE = "_beside"
ROADS = tuple(field for field in Small._fields if not field.endswith(BESIDE))
#: Message sizes that are tried, the largest first.
SIZES = (65536, 32768, 16384, 8192, 4096, 2048, 1024, 512, 256, 128, 64, 32, 16, 4, 1)
#: Between namespaces, on one core and with Nagle's algorithm, TCP has the benefit of the doubt up
#: to so many times the size: some streams are twice as fast as others there (docs/BENCHMARKS.md).
MARGIN = 2.5
#: Smaller sizes are not tried once the shortcut has lost this clearly at two in a row.
_LOST, _IN_A_ROW = 0.8, 2
_GRACE = 30.0
#: Of a stream of which not a byte came through: its reader had no processor.
_TRIES = 3
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: streams by either path at each size.
        milliseconds: of a stream.
        rest: pause after each stream, in its lengths: so much less of the cores is taken. In
            pauses it is seen whether others leave enough of them.
    """

    sizes: tuple[int, ...] = SIZES
    rounds: int = 3
    milliseconds: int = 100
    rest: float = 0.0


FULL = Effort()
#: For a node at work: a quarter of two cores.
GENTLE = Effort(rest=3.0)
#: Some five seconds; bounds are coarser.
QUICK = Effort(sizes=SIZES[::2], rounds=1, milliseconds=60)


class Place(runner.Ground, Protocol):
    """Where streams are measured."""

    @property
    def default(self) -> Group:
        """The cgroup of streams by TCP."""

    @property
    def netns(self) -> tuple[Path, Path]:
        """What opens the client's and the server's namespace."""


def run(
    place: Place,
    placements: Iterable[Placement],
    done: Callable[[str], None],
    effort: Effort = FULL,
) -> Calibration:
    """Measure every road at every placement.

    Args:
        place: two namespaces; what lies between them is the virtual road.
        placements: where the two ends run; each road has a bound for either.
        done: told after each point.
        effort: how much.

    Raises:
        UnderpassError: a probe cannot be run or read, or others have most of the cores.
    """
    points: list[Point] = []
    others = Others()
    with runner.generation(place) as plane:
        plane.set_small(Small(*[0] * len(Small._fields)))
        for placement in placements:
            for road in ROADS:
                points += _walk_down(_Streams(place, placement, road, effort, others), plane, done)
    small = bounds(points)._asdict()
    return Calibration(time.time(), os.uname().release, small, tuple(points), METHOD)


@contextlib.contextmanager
def aside(covering: Iterable[Path]) -> Iterator[None]:
    """Where generations cover all that could be measured in, their guard keeps the probe on TCP.

    Raises:
        UnderpassError: one of them was made anew meanwhile, without the rule.
    """
    covering = list(covering)
    with contextlib.ExitStack() as undo:
        for pins in covering:
            dataplane.set_rule(pins, probe.NAME, Rule.DENY)
            undo.callback(_lift, pins)
        yield
        for pins in covering:
            with Dataplane.open(pins) as plane:
                if plane.rules().get((0, probe.NAME.encode())) != Rule.DENY:
                    cause = f"the generation at {pins} was made anew meanwhile"
                    raise UnderpassError("trust", "what was measured", cause, "run it again")


def _lift(pins: Path) -> None:
    with contextlib.suppress(UnderpassError):  # it may have been taken down
        dataplane.set_rule(pins, probe.NAME, Rule.NONE)


def bounds(points: Iterable[Point]) -> Small:
    """The bound of each road at each placement; the built-in one where none was measured. Pure."""
    ratios: dict[str, dict[int, float]] = {}
    for point in points:
        field = point.road + (BESIDE if point.placement == "two-cores" else "")
        ratios.setdefault(field, {})[point.size] = point.ratio
    found = Small()._replace(**{field: bound(of_road) for field, of_road in ratios.items()})
    return found._replace(virtual=round(found.virtual * MARGIN)) if "virtual" in ratios else found


def _walk_down(streams: _Streams, plane: Dataplane, done: Callable[[str], None]) -> list[Point]:
    found: list[Point] = []
    for size in streams.effort.sizes:
        runs: dict[Mode, list[float]] = {Mode.DEFAULT: [], Mode.SHORTCUT: []}
        before = plane.counters()
        for _ in range(streams.effort.rounds):
            for mode, figures in runs.items():
                figures.append(streams.run(mode, size))
        _check(
            before.shortcut_bytes_total, plane.counters().shortcut_bytes_total, streams.road, size
        )
        tcp, shortcut = (statistics.median(figures) for figures in runs.values())
        found.append(Point(streams.road, streams.placement.name, size, tcp, shortcut))
        done(f"{streams.road}, {streams.placement.name}, {size} B: {found[-1].ratio:.2f}")
        if all(point.ratio < _LOST for point in found[-_IN_A_ROW:]) and len(found) >= _IN_A_ROW:
            break
    return found


@dataclass(frozen=True)
class _Streams:
    """Streams on one road at one placement."""

    place: Place
    placement: Placement
    road: str
    effort: Effort
    others: Others

    def run(self, mode: Mode, size: int) -> float:
        """Mb/s of one stream.

        Raises:
            UnderpassError: the probe failed, or not a byte came through.
        """
        inside, milliseconds = self.road.startswith("loopback"), self.effort.milliseconds
        client, server = self.place.netns
        argv = [
            *probe.command("tcp_bw", size, milliseconds, self.placement),
            _LOOPBACK if inside else SERVER_ADDRESS,
            "nodelay" if self.road.endswith("nodelay") else "nagle",
            str(client),
            str(client if inside else server),
        ]
        group = self.place.shortcut if mode is Mode.SHORTCUT else self.place.default
        for _ in range(_TRIES):
            said = group.run_joining(argv, milliseconds / 1000 + _GRACE)
            if self.effort.rest:
                cpus = (self.placement.client_cpus[0], self.placement.server_cpus[-1])
                self.others.pause(cpus, self.effort.rest * milliseconds / 1000)
            figure = probe.parse(said, "tcp_bw", milliseconds).figure
            if figure > 0:
                return figure
        what = f"{self.road} at {size} B"
        raise UnderpassError("measure", what, "the node is too busy", "try when it is not")


def _check(before: int, after: int, road: str, size: int) -> None:
    """A comparison counts only if the kernel's own counters saw the shortcut used.

    Raises:
        UnderpassError: they did not.
    """
    if after - before < size:
        raise UnderpassError(
            "measure", f"{road} at {size} B", "no byte took the shortcut", "see `underpass doctor`"
        )
