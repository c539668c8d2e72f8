"""What is compared, in which order, and whether the comparison may be believed. No I/O."""

from __future__ import annotations

import enum
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

#: A run is judged by messages, so let a few of the program's own set-up or a late timer pass.
RULED_FLOOR = 0.95
#: A row below this share is marked wherever it is shown.
HALF = 0.5
#: The most that one packet of a default run may carry: the kernel cuts streams up no further.
_LARGEST = 64 << 10
_GIGABYTE = 1e9

#: The sidecars' own share of the CPU: the one figure below of which less is no gain.
SIDECARS = "sidecars_percent_of_cpu"
#: Figures beside a row's own, by their names in the report, with words for people. Less is better.
ALSO = {
    "p50_us": "latency p50 (us)",
    "p99_us": "latency p99 (us)",
    "p99.9_us": "latency p99.9 (us)",
    "slab_bytes_per_pair": "slabs (bytes/pair)",
    "tcp_bytes_per_pair": "TCP buffers (bytes/pair)",
    "cpu_seconds_per_gigabyte": "CPU seconds per GB",
    SIDECARS: "Envoys' own work (% of CPU)",
}


class Mode(enum.StrEnum):
    """How the bytes of one run travel."""

    DEFAULT = "default"
    SHORTCUT = "shortcut"
    NAIVE = "naive"
    UNIX = "unix"


@dataclass(frozen=True)
class Placement:
    """Which cores the two ends may use."""

    name: str
    client_cpus: tuple[int, ...]
    server_cpus: tuple[int, ...]

    def __str__(self) -> str:
        ends = (self.client_cpus, self.server_cpus)
        client, server = (",".join(map(str, cpus)) for cpus in ends)
        if self.name == "one-core":
            return f"both ends on core {client}"
        if self.name == "two-cores":
            return f"client on core {client}, server on core {server}"
        return f"both ends free on cores {client}"


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a test at a size, or one kind of request.

    Attributes:
        floor: least share (0..1) of what a shortcut run moved that the shortcut must have carried.
        ruled: the data plane may hold any part of it on TCP, but must have given nearly every
            message a path and a reason, or have let a stream of small messages go.
        short: connections of two messages each: the first message of one may leave before its other
            end has been found, the answer may not.
        crossing: share (0..1) of what a run moves that crosses the path, where proxies pass it on.
        off_node: the server stands outside the cgroup: the shortcut must carry nothing, and the
            data plane must have turned down nearly every connection as not local.
    """

    placement: str
    test: str
    label: str
    unit: str
    less_is_better: bool
    floor: float
    ruled: bool = False
    off_node: bool = False
    short: bool = False
    crossing: float = 1.0

    def __str__(self) -> str:
        return " ".join(part for part in (self.placement, self.test, self.label) if part)


@dataclass(frozen=True)
class Volume:
    """How much one run moved by the program's own account. ``unit``: "messages" or "bytes"."""

    unit: str
    amount: float


@dataclass(frozen=True)
class Reading:
    """What a program reported of one run.

    Attributes:
        messages: needed where a row is ``ruled``.
        also: figures beside the row's own, by their names in :data:`ALSO`.
        payload: bytes, where they are known and the volume is something else.
        sidecar_seconds: CPU time that sidecars spent in user mode, where there are some.
    """

    figure: float
    volume: Volume
    messages: float = 0.0
    also: dict[str, float] = field(default_factory=dict)
    payload: float = 0.0
    sidecar_seconds: float | None = None


@dataclass(frozen=True)
class Moved:
    """By how much the kernel's counters moved during one run.

    Attributes:
        small_streams: endpoints that left the map since a direction streams small messages; what
            they send from then on meets no verdict.
        naive_messages, naive_bytes: what the naive bypass redirected.
        path_packets: that took the path between the ends, by its own counter; None: not read.
            All others are underpass's.
    """

    pairs: int = 0
    shortcut_messages: int = 0
    shortcut_bytes: int = 0
    tcp_messages: dict[str, int] = field(default_factory=dict)
    not_local: int = 0
    small_streams: int = 0
    naive_messages: int = 0
    naive_bytes: int = 0
    path_packets: int | None = None


@dataclass(frozen=True)
class Sample:
    """One run: what the program said and what the kernel counted meanwhile.

    Attributes:
        cpu_seconds: what all processes of the benchmark used; None where the kernel does not tell.
    """

    mode: Mode
    round: int
    reading: Reading
    moved: Moved
    cpu_seconds: float | None = None

    @property
    def also(self) -> dict[str, float]:
        """What the program said beside its figure; the CPU's price where the bytes are known."""
        found, volume = dict(self.reading.also), self.reading.volume
        moved = self.reading.payload or (volume.amount if volume.unit == "bytes" else 0.0)
        if self.cpu_seconds and moved:
            found["cpu_seconds_per_gigabyte"] = self.cpu_seconds / moved * _GIGABYTE
        if self.cpu_seconds and self.reading.sidecar_seconds is not None:
            found[SIDECARS] = 100 * self.reading.sidecar_seconds / self.cpu_seconds
        return found

    @property
    def carried(self) -> float:
        """Share (0..1) of the run's volume that the shortcut (or the naive bypass) carried."""
        volume, moved = self.reading.volume, self.moved
        messages, size = moved.shortcut_messages, moved.shortcut_bytes
        if self.mode is Mode.NAIVE:
            messages, size = moved.naive_messages, moved.naive_bytes
        counted = size if volume.unit == "bytes" else messages
        return min(1.0, counted / volume.amount) if volume.amount else 0.0

    @property
    def ruled(self) -> float:
        """Share (0..1) of the run's messages to which the data plane gave a path."""
        seen = self.moved.shortcut_messages + sum(self.moved.tcp_messages.values())
        return min(1.0, seen / self.reading.messages) if self.reading.messages else 0.0


@dataclass(frozen=True)
class Spread:
    """The median of several runs between the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Spread:
        """Of at least one figure."""
        return cls(statistics.median(figures), min(figures), max(figures))


@dataclass(frozen=True)
class Outcome:
    """A row with all its runs.

    Attributes:
        broken: why a naive run has no figure, a line each. It promises nothing, so that is one of
            its results and no failure of the comparison.
    """

    row: Row
    samples: tuple[Sample, ...]
    broken: tuple[str, ...] = ()

    def figures(self, mode: Mode) -> list[float]:
        """What the runs of a mode reported, round by round."""
        # ABBA turns modes within a round, so each mode's runs are in the order of the rounds.
        return [s.reading.figure for s in self.samples if s.mode is mode]

    def spread(self, mode: Mode) -> Spread | None:
        """Median, lowest and highest of a mode, None where it did not run."""
        figures = self.figures(mode)
        return Spread.of(figures) if figures else None

    def also(self, mode: Mode) -> dict[str, Spread]:
        """The figures beside the row's own that every run of a mode has."""
        runs = [s.also for s in self.samples if s.mode is mode]
        names = [name for name in ALSO if runs and all(name in run for run in runs)]
        return {name: Spread.of([run[name] for run in runs]) for name in names}

    @property
    def ratio(self) -> Spread | None:
        """Shortcut over default: ratio of the medians, spread of the ratios round by round."""
        default, shortcut = self.figures(Mode.DEFAULT), self.figures(Mode.SHORTCUT)
        if not default or not shortcut or not all(default):
            return None
        rounds = [s / d for s, d in zip(shortcut, default, strict=True)]
        medians = statistics.median(shortcut) / statistics.median(default)
        return Spread(medians, min(rounds), max(rounds))

    @property
    def carried(self) -> Spread | None:
        """Share that the shortcut carried, over the shortcut runs."""
        shares = [s.carried for s in self.samples if s.mode is Mode.SHORTCUT]
        return Spread.of(shares) if shares else None


def schedule(modes: Sequence[Mode], rounds: int) -> list[tuple[int, Mode]]:
    """The order of a row's runs: every round turned round (ABBA), so that a drift cancels."""
    order: list[tuple[int, Mode]] = []
    for number in range(rounds):
        step = modes if number % 2 == 0 else tuple(reversed(modes))
        order += [(number, mode) for mode in step]
    return order


def least_packets(volume: Volume, crossing: float = 1.0) -> int:
    """Packets that a run by TCP has sent at least, with room for what joins on its way."""
    each = _LARGEST if volume.unit == "bytes" else 1
    return max(1, int(crossing * volume.amount / each * HALF))


def disbelief(sample: Sample, row: Row) -> str | None:
    """Why this run does not count as what it claims to be, None when it does."""
    moved = sample.moved
    wrong = _default_disbelief(sample, row) if sample.mode is Mode.DEFAULT else None
    if wrong:
        return wrong
    if sample.mode is Mode.NAIVE:
        return _naive_disbelief(sample, row)
    if moved.naive_messages:
        return (
            f"{row}, round {sample.round + 1}: the naive bypass redirected"
            f" {moved.naive_messages} messages of a {sample.mode.value} run"
        )
    if sample.mode is not Mode.SHORTCUT:
        return None
    return (_off_node_disbelief if row.off_node else _shortcut_disbelief)(sample, row)


def _default_disbelief(sample: Sample, row: Row) -> str | None:
    moved, least = sample.moved, least_packets(sample.reading.volume, row.crossing)
    if moved.shortcut_messages or moved.pairs:
        return (
            f"{row}, round {sample.round + 1}: a default run used the shortcut"
            f" ({moved.shortcut_messages} messages, {moved.pairs} pairs)"
        )
    if moved.path_packets is not None and moved.path_packets < least:
        return (
            f"{row}, round {sample.round + 1}: {moved.path_packets} packets of a default run took"
            f" the path, {least} needed"
        )
    return None


def _naive_disbelief(sample: Sample, row: Row) -> str | None:
    moved = sample.moved
    if moved.shortcut_messages or moved.pairs:
        return f"{row}, round {sample.round + 1}: a naive run used the shortcut"
    if not row.off_node and not moved.naive_messages:
        return f"{row}, round {sample.round + 1}: nothing of a naive run was redirected"
    return None


def _shortcut_disbelief(sample: Sample, row: Row) -> str | None:
    moved = sample.moved
    # No new pair is no doubt: a proxy keeps its connections from run to run.
    if not moved.shortcut_messages:
        return f"{row}, round {sample.round + 1}: nothing of a shortcut run took the shortcut"
    if row.ruled and not moved.small_streams and sample.ruled < RULED_FLOOR:
        return (
            f"{row}, round {sample.round + 1}: the data plane saw {sample.ruled:.1%} of the"
            f" messages, {RULED_FLOOR:.0%} needed"
        )
    if sample.carried + (_early(sample) if row.short else 0.0) < row.floor:
        tcp = ", ".join(f"{reason} {n}" for reason, n in moved.tcp_messages.items() if n)
        return (
            f"{row}, round {sample.round + 1}: the shortcut carried {sample.carried:.1%} of the"
            f" {sample.reading.volume.unit}, {row.floor:.0%} needed"
            f" ({moved.pairs} pairs; by TCP: {tcp or 'nothing counted'})"
        )
    return None


def _early(sample: Sample) -> float:
    """Share (0..half) of a run's messages that met no other end yet."""
    early = sample.moved.tcp_messages.get("unpaired", 0)
    amount = sample.reading.volume.amount
    return min(HALF, early / amount) if amount else 0.0


def _off_node_disbelief(sample: Sample, row: Row) -> str | None:
    moved, connections = sample.moved, sample.reading.volume.amount
    if moved.pairs or moved.shortcut_messages:
        return f"{row}, round {sample.round + 1}: {moved.pairs} off-node connections were paired"
    if moved.not_local < RULED_FLOOR * connections:
        return (
            f"{row}, round {sample.round + 1}: the data plane turned down {moved.not_local} of"
            f" {connections:.0f} connections"
        )
    return None


def failures(outcomes: Sequence[Outcome]) -> list[str]:
    """One line for each run that the kernel's counters do not bear out."""
    lines = (disbelief(sample, o.row) for o in outcomes for sample in o.samples)
    return [line for line in lines if line]
