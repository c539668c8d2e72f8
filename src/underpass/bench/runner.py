"""Runs a comparison: a generation of its own, servers for both modes, and the alternation."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from underpass import dataplane
from underpass.bench import probe
from underpass.bench.bed import Bed
from underpass.bench.compare import (
    Mode,
    Moved,
    Outcome,
    Placement,
    Reading,
    Sample,
    schedule,
)
from underpass.bench.naive import Naive
from underpass.bench.processes import Group, listens, wait_for
from underpass.bench.programs import Measure, Workload
from underpass.bench.way import Reach
from underpass.dataplane import Dataplane
from underpass.errors import NotLoaded, UnderpassError
from underpass.model import Counters, Settings

#: A program may take this much longer than it was asked to run, then it is ended.
_GRACE = 30.0
#: The naive bypass hangs programs for ever now and then; nobody should wait for all of them.
_NAIVE_GRACE = 10.0
_SERVER_START = 30.0
#: A run begins when the counters have stood still for so long, or after so long at most.
_STILL, _SETTLE = 0.02, 5.0


@dataclass(frozen=True)
class Plan:
    """What to run. ``seconds`` is per run, ``unix_milliseconds`` per AF_UNIX run (0: none).

    Attributes:
        naive: whether the naive bypass runs too.
    """

    workload: Workload
    placements: tuple[Placement, ...]
    rounds: int
    seconds: int
    unix_milliseconds: int = 0
    naive: bool = False

    @property
    def served(self) -> tuple[Mode, ...]:
        """The modes that the workload's own programs run in."""
        naive = (Mode.NAIVE,) if self.naive else ()
        return (Mode.DEFAULT, Mode.SHORTCUT, *naive)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes of every round."""
        unix = (Mode.UNIX,) if self.unix_milliseconds else ()
        return (*self.served, *unix)

    def estimate(self, rows: int) -> float:
        """Seconds that all of it takes, about."""
        run = self.seconds + self.workload.rest
        once = len(self.served) * run + self.unix_milliseconds / 1000
        return len(self.placements) * (rows * self.rounds * once + 3)


def covering(cgroup: Path, pins: Sequence[Path]) -> dict[Path, Path]:
    """Those of the generations at ``pins`` that cover a cgroup -> what they are attached to."""
    found = {}
    for path in dict.fromkeys(pins):
        try:
            plane = Dataplane.open(path)
        except NotLoaded:
            continue
        with plane:
            if cgroup.is_relative_to(plane.cgroup):
                found[path] = plane.cgroup
    return found


def refuse_if_covered(cgroup: Path, pins: Sequence[Path]) -> None:
    """Default runs must be native: no generation may cover the benchmark's cgroup.

    Raises:
        UnderpassError: one does.
    """
    for path, attached in covering(cgroup, pins).items():
        cause = f"the generation at {path} covers {attached}, default runs too"
        raise UnderpassError("measure in", cgroup, cause, "run `underpass down` first")


class Ground(Protocol):
    """What a generation of the benchmark's own needs: a place for its pins, and a cgroup."""

    @property
    def pins(self) -> Path:
        """Where it goes."""

    @property
    def shortcut(self) -> Group:
        """What it is attached to."""


@contextmanager
def generation(
    bed: Ground, settings: Settings = Settings(admit_unknown=True)
) -> Iterator[Dataplane]:
    """A generation of the benchmark's own, for its shortcut cgroup only."""
    try:
        dataplane.up(bed.pins, bed.shortcut.path, settings)
        with Dataplane.open(bed.pins) as plane:
            yield plane
    finally:
        # Whatever still waited unread belonged to programs of ours.
        bed.shortcut.end()
        left = dataplane.down(bed.pins, timeout=10)
        if left:
            raise UnderpassError(
                "remove", bed.pins, f"{len(left)} endpoints did not drain", "run bench again"
            )


class Stage:
    """One placement in the bed: starts servers, runs clients. A ``programs.Place``."""

    def __init__(self, bed: Bed, placement: Placement) -> None:
        self.bed, self.placement = bed, placement

    def group(self, mode: Mode) -> Group:
        """The cgroup of a mode."""
        own = {Mode.SHORTCUT: self.bed.shortcut, Mode.NAIVE: self.bed.naive}
        return own.get(mode, self.bed.default)

    @property
    def reach(self) -> Reach:
        """How the two ends reach each other."""
        return self.bed.reach

    def directory(self, name: str) -> Path:
        """A directory in the bed's, made if it is not there."""
        path = self.bed.directory / name
        path.mkdir(exist_ok=True)
        return path

    def serve(self, mode: Mode, argv: list[str], port: int, client_side: bool = False) -> None:
        """Start a server and return when it listens.

        Raises:
            UnderpassError: it ended or did not listen; tells its last words.
        """
        netns = self.bed.client_netns if client_side else self.bed.server_netns
        cpus = self.placement.client_cpus if client_side else self.placement.server_cpus
        log = self.bed.directory / f"{Path(argv[0]).name}-{port}.log"
        child = self.group(mode).spawn(argv, netns, cpus, log)
        wait_for(lambda: child.poll() is not None or listens(child.pid, port), _SERVER_START)
        if child.poll() is not None or not listens(child.pid, port):
            said = " ".join(log.read_text(errors="replace").split())[-200:] or "it said nothing"
            raise UnderpassError("start", " ".join(argv), said, "run it by hand to see")

    def once(self, argv: list[str]) -> str:
        """Run a set-up program on this machine's own side, outside both namespaces."""
        return self.bed.default.run(argv, None, sorted(os.sched_getaffinity(0)), 60)

    def client(self, mode: Mode, argv: list[str], seconds: float) -> str:
        """Run a client to its end and return what it printed."""
        cpus, netns = self.placement.client_cpus, self.bed.client_netns
        grace = _NAIVE_GRACE if mode is Mode.NAIVE else _GRACE
        return self.group(mode).run(argv, netns, cpus, seconds + grace)

    def end_servers(self, modes: Sequence[Mode]) -> None:
        """End what was started in these modes."""
        for mode in modes:
            self.group(mode).end()


def moved(before: Counters, after: Counters) -> Moved:
    """What the counters of a generation moved by between two readings."""
    return Moved(
        pairs=after.pairs_total - before.pairs_total,
        shortcut_messages=after.shortcut_messages_total - before.shortcut_messages_total,
        shortcut_bytes=after.shortcut_bytes_total - before.shortcut_bytes_total,
        tcp_messages={
            reason: count - before.tcp_messages_total.get(reason, 0)
            for reason, count in after.tcp_messages_total.items()
        },
        not_local=after.refused_total["not-local"] - before.refused_total["not-local"],
        small_streams=after.refused_total["small-stream"] - before.refused_total["small-stream"],
    )


class Comparison:
    """A plan under way.

    Args:
        plan: what to run.
        bed: where.
        kernel: the generation, and the naive bypass where the plan has it.
        done: told after every run what ran.
    """

    def __init__(
        self,
        plan: Plan,
        bed: Bed,
        kernel: tuple[Dataplane, Naive | None],
        done: Callable[[str], None],
    ) -> None:
        self._plan, self._bed, self._done = plan, bed, done
        self._plane, self._naive = kernel

    def run(self) -> list[Outcome]:
        """Run all of it.

        Raises:
            UnderpassError: a program could not be run or read.
        """
        outcomes: list[Outcome] = []
        for placement in self._plan.placements:
            stage = Stage(self._bed, placement)
            with ExitStack() as stack:
                stack.callback(stage.end_servers, self._plan.served)
                for mode in self._plan.served:
                    self._plan.workload.serve(stage, mode)
                measures = self._plan.workload.measures(self._bed.reach, self._plan.seconds)
                outcomes.extend(self._row(measure, stage) for measure in measures)
        return outcomes

    def _row(self, measure: Measure, stage: Stage) -> Outcome:
        row = measure.row(stage.placement.name)
        samples, broken = [], []
        for number, mode in schedule(self._plan.modes, self._plan.rounds):
            try:
                samples.append(self._sample(measure, mode, stage, number))
            except UnderpassError as error:
                if mode is not Mode.NAIVE:
                    raise
                broken.append(f"round {number + 1}: {error}")
                stage.end_servers([mode])
                self._plan.workload.serve(stage, mode)
            self._done(f"{row}: {mode.value}")
        return Outcome(row, tuple(samples), tuple(broken))

    def _sample(self, measure: Measure, mode: Mode, stage: Stage, number: int) -> Sample:
        self._settle()
        path = self._bed.passed()
        before, spent, aside = self._plane.counters(), self._bed.cpu_seconds(), self._redirected()
        reading = self._once(measure, mode, stage)
        after, now, beyond = self._plane.counters(), self._bed.cpu_seconds(), self._redirected()
        path = self._bed.passed() - path
        messages, size = (end - start for end, start in zip(beyond, aside, strict=True))
        difference = replace(
            moved(before, after), naive_messages=messages, naive_bytes=size, path_packets=path
        )
        used = None if spent is None or now is None else now - spent
        return Sample(mode, number, reading, difference, used)

    def _settle(self) -> None:
        """What the run before left under way must not be counted to the next."""
        last, since = self._plane.counters(), time.monotonic()

        def still() -> bool:
            nonlocal last, since
            time.sleep(_STILL)
            before, last = last, self._plane.counters()
            if before != last:
                since = time.monotonic()
            return time.monotonic() - since >= max(_STILL, self._plan.workload.rest)

        wait_for(still, _SETTLE)

    def _redirected(self) -> tuple[int, int]:
        return self._naive.redirected() if self._naive else (0, 0)

    def _once(self, measure: Measure, mode: Mode, stage: Stage) -> Reading:
        if mode is not Mode.UNIX:
            return measure.parse(stage.client(mode, measure.argv(mode), self._plan.seconds))
        duration = self._plan.unix_milliseconds
        argv = probe.command(measure.test, int(measure.label), duration, stage.placement)
        said = stage.client(mode, argv, duration / 1000)
        return probe.parse(said, measure.test, duration)
