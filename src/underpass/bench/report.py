"""The results for people and for programs: the reference's table, and one JSON document."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from underpass import __version__
from underpass.bench import drawing
from underpass.bench.compare import (
    ALSO,
    HALF,
    Mode,
    Outcome,
    Placement,
    Row,
    Sample,
    Spread,
    failures,
)
from underpass.bench.runner import Plan
from underpass.bench.way import Way
from underpass.errors import UnderpassError, Usage
from underpass.model import plain

_BYPASSES = (Mode.SHORTCUT, Mode.NAIVE)
_VERSION_FLAGS = {
    "qperf": ["--version"],
    "redis-server": ["--version"],
    "wrk": ["--version"],
    "iperf3": ["--version"],
    "pgbench": ["--version"],
    "nginx": ["-v"],
}


def figure(value: float) -> str:
    """Three significant digits, as qperf prints: 4.15, 12.6, 846, 24900."""
    return drawing.number(value).replace(",", "")


def cell(spread: Spread | None) -> str:
    """The median, and under it the lowest and the highest."""
    if spread is None:
        return "-"
    if spread.low == spread.high:
        return figure(spread.median)
    return f"{figure(spread.median)}\n[dim]{figure(spread.low)}..{figure(spread.high)}[/dim]"


def ratio_cell(outcome: Outcome) -> str:
    """Shortcut over default, coloured by whether it helps."""
    ratio = outcome.ratio
    if ratio is None:
        return "-"
    better = ratio.median < 1 if outcome.row.less_is_better else ratio.median > 1
    colour = "green" if better else "red"
    rounds = f"\n[dim]{ratio.low:.2f}..{ratio.high:.2f}[/dim]"
    return f"[{colour}]{ratio.median:.2f}x[/{colour}]" + (rounds if ratio.low < ratio.high else "")


def naive_cell(outcome: Outcome) -> str:
    """The naive bypass's figure, and how many of its runs broke."""
    shown = cell(outcome.spread(Mode.NAIVE))
    broke = f"\n[red]{len(outcome.broken)} broke[/red]" if outcome.broken else ""
    return shown + broke


def carried_cell(outcome: Outcome) -> str:
    """The least share that the shortcut carried in any of its runs; marked below a half."""
    if outcome.row.off_node:
        return "none, as it must"
    if outcome.carried is None:
        return "-"
    low = outcome.carried.low
    return f"{low:.0%}" if low >= HALF else f"[yellow]{low:.0%} *[/yellow]"


def print_tables(
    outcomes: Sequence[Outcome], plan: Plan, document: dict[str, Any], console: Console
) -> None:
    """One table for each placement."""
    for placement in plan.placements:
        here = [o for o in outcomes if o.row.placement == placement.name]
        title = f"{plan.workload.name}, {document['path']}, {placement}"
        make = _qperf_table if plan.workload.name == "qperf" else _table
        console.print(make(title, here))
        if any(o.also(mode) for o in here for mode in Mode):
            console.print(_also_table(f"{title}: beside it", here))
    machine = document["machine"]
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores, kernel {machine['kernel']};"
        f" {plan.rounds} rounds of {plan.seconds} s, alternating in ABBA order.\n"
        "Figures: median, under it lowest..highest. Ratio: shortcut / default, of the medians,"
        " under it by round.\nCarried: least share of a shortcut run that the kernel's counters"
        " show on the shortcut; no default run used it."
        if document["ok"]
        else "The kernel's counters do not bear this comparison out."
    )
    if plan.naive:
        console.print(
            "Naive: a 4-tuple sockhash bypass without proof, gate, budget, guard or drain; a"
            " yardstick for what the promise costs.\n  What it gets wrong: docs/BENCHMARKS.md."
        )
    if any(o.carried and o.carried.low < HALF and not o.row.off_node for o in outcomes):
        console.print(
            "* In some run most of this went by TCP: a stream of small messages, which left,"
            " or one that stood at the budget.\n  Read it as underpass's own choice, not as the"
            " speed of the shortcut; the reasons are in --json."
        )


def _qperf_table(title: str, outcomes: Sequence[Outcome]) -> Table:
    table = Table(title=title, title_justify="left")
    naive = any(o.spread(Mode.NAIVE) or o.broken for o in outcomes)
    for name in (
        "Packet Size\n(byte)",
        "Shortcut\ntcp_lat (us)",
        "Default\ntcp_lat (us)",
        "Ratio",
        *(["Naive\nlat (us)"] if naive else []),
        "AF_UNIX\nlat (us)",
        "Shortcut\ntcp_bw (Mb/s)",
        "Default\ntcp_bw (Mb/s)",
        "Ratio",
        *(["Naive\nbw (Mb/s)"] if naive else []),
        "AF_UNIX\nbw (Mb/s)",
        "Carried\nlat / bw",
    ):
        table.add_column(name, justify="right")
    by_test = {(o.row.test, o.row.label): o for o in outcomes}
    for size in dict.fromkeys(o.row.label for o in outcomes):
        both = [by_test[test, size] for test in ("tcp_lat", "tcp_bw")]
        cells = [size]
        for outcome in both:
            cells += [cell(outcome.spread(m)) for m in (Mode.SHORTCUT, Mode.DEFAULT)]
            cells += [ratio_cell(outcome), *([naive_cell(outcome)] if naive else [])]
            cells.append(cell(outcome.spread(Mode.UNIX)))
        table.add_row(*cells, " / ".join(carried_cell(outcome) for outcome in both))
    return table


def _table(title: str, outcomes: Sequence[Outcome]) -> Table:
    table = Table(title=title, title_justify="left")
    naive = any(o.spread(Mode.NAIVE) or o.broken for o in outcomes)
    names = ("Test", "Unit", "Shortcut", "Default", "Ratio", *(["Naive"] if naive else []))
    for name in (*names, "Carried"):
        table.add_column(name, justify="left" if name in ("Test", "Unit") else "right")
    several = len({o.row.test for o in outcomes}) > 1
    for outcome in outcomes:
        spreads = [cell(outcome.spread(m)) for m in (Mode.SHORTCUT, Mode.DEFAULT)]
        row = outcome.row
        label = f"{row.test}: {row.label}" if several else row.label
        spreads += [ratio_cell(outcome), *([naive_cell(outcome)] if naive else [])]
        table.add_row(label, row.unit, *spreads, carried_cell(outcome))
    return table


def _also_table(title: str, outcomes: Sequence[Outcome]) -> Table:
    table = Table(title=title, title_justify="left")
    modes = [m for m in Mode if any(o.also(m) for o in outcomes)]
    for name in ("Test", "Figure"):
        table.add_column(name)
    for mode in modes:
        table.add_column(mode.value.capitalize() if mode is not Mode.UNIX else "AF_UNIX",
                         justify="right")  # fmt: skip
    for outcome in outcomes:
        label = f"{outcome.row.test}: {outcome.row.label}"
        told = {mode: outcome.also(mode) for mode in modes}
        for name, words in ALSO.items():
            if any(name in each for each in told.values()):
                table.add_row(label, words, *(cell(told[mode].get(name)) for mode in modes))
    return table


def document(plan: Plan, way: Way, outcomes: Sequence[Outcome], started: float) -> dict[str, Any]:
    """Everything about one benchmark, as ``--json`` prints it."""
    wrong = failures(outcomes)
    return {
        "benchmark": plan.workload.name,
        "ok": not wrong,
        "failures": wrong,
        "path": str(way),
        "path_counter": way.counter,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "duration_seconds": round(time.time() - started, 1),
        "settings": {
            "rounds": plan.rounds,
            "seconds": plan.seconds,
            "unix_milliseconds": plan.unix_milliseconds,
            "order": "ABBA",
            "naive": plan.naive,
            **plan.workload.settings,
            "placements": [_placement(each) for each in plan.placements],
        },
        "machine": machine(),
        "versions": {"underpass": __version__, **versions(plan)},
        "spread": "low and high are the lowest and the highest run; ratio: shortcut / default",
        "rows": [_row(outcome) for outcome in outcomes],
    }


def _placement(placement: Placement) -> dict[str, Any]:
    return dict(plain(placement))


def _row(outcome: Outcome) -> dict[str, Any]:
    row: Row = outcome.row
    spreads = {mode.value: plain(outcome.spread(mode)) for mode in Mode}
    return {
        **plain(row),
        **spreads,
        "ratio": plain(outcome.ratio),
        "carried": plain(outcome.carried),
        "also": {mode.value: plain(outcome.also(mode)) for mode in Mode},
        "naive_broken": list(outcome.broken),
        "runs": [_run(sample) for sample in outcome.samples],
    }


def _run(sample: Sample) -> dict[str, Any]:
    return {
        "mode": sample.mode.value,
        "round": sample.round + 1,
        "figure": sample.reading.figure,
        "volume": plain(sample.reading.volume),
        "counters": plain(sample.moved),
        "carried": sample.carried if sample.mode in _BYPASSES else None,
        "cpu_seconds": sample.cpu_seconds,
        "also": sample.also,
    }


def machine() -> dict[str, Any]:
    """What it was measured on."""
    congestion = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    model = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": model,
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
        "kernel": platform.release(),
        "congestion_control": congestion.read_text().strip() if congestion.exists() else None,
    }


def versions(plan: Plan) -> dict[str, str]:
    """First line of what each program says of its version."""
    found = {}
    for program in plan.workload.needs:
        flags = _VERSION_FLAGS.get(program)
        if flags:
            said = subprocess.run([program, *flags], capture_output=True, text=True, check=False)
            found[program] = (said.stdout + said.stderr).strip().splitlines()[0]
    return {**found, **plan.workload.beside()}


def check(directory: Path) -> None:
    """Refuse a directory that cannot be written before anything is measured for it.

    Raises:
        Usage: it cannot.
    """
    try:
        there = next(each for each in (directory, *directory.absolute().parents) if each.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except (OSError, ValueError) as error:
        cause = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise Usage("write to", directory, cause, "name another directory") from None


def write(result: dict[str, Any], directory: Path) -> None:
    """Write ``results.json``.

    Raises:
        UnderpassError: the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise UnderpassError(
            "write to", directory, error.strerror or "?", "name another directory"
        ) from None
