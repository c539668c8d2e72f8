"""`underpass bench`."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from underpass import namespaces
from underpass.bench import (
    bed,
    chart,
    idle,
    kubernetes,
    naive,
    page,
    parallel,
    probe,
    report,
    runner,
)
from underpass.bench.compare import Outcome, Placement, failures
from underpass.bench.programs import missing
from underpass.bench.way import Way
from underpass.bench.workloads import WORKLOADS, choose
from underpass.cli import bench_kubernetes, output
from underpass.cli.interrupt import interruptible
from underpass.dataplane import DEFAULT_PINS
from underpass.errors import UnderpassError, Usage
from underpass.model import many

_PLACEMENTS = ("one-core", "two-cores", "free")


path_option = click.option(
    "--path",
    "way",
    default="bridge",
    show_default=True,
    metavar="bridge|ipv6|iptables:N|ovs",
    help="What lies between the two namespaces.",
)


def choose_placements(name: str, cpus: str | None) -> tuple[Placement, ...]:
    """Placements by the name of the option, on these cores or on the first two allowed.

    Raises:
        Usage: no such cores.
    """
    allowed = sorted(os.sched_getaffinity(0))
    try:
        chosen = [int(word) for word in cpus.split(",")] if cpus else allowed[:2]
    except ValueError:
        raise Usage("use", f"--cpus {cpus}", "not numbers", "say for example 0,1") from None
    if not set(chosen) <= set(allowed):
        raise Usage("use", f"--cpus {cpus}", f"allowed are {allowed}", "choose of these")
    names = ("one-core", "two-cores") if name == "both" else (name,)
    if "two-cores" in names and len(chosen) < 2:
        if name != "both":
            raise Usage("use", "two-cores", "there is one core", "say --placement one-core")
        names = ("one-core",)
    kinds = {
        "one-core": ((chosen[0],), (chosen[0],)),
        "two-cores": ((chosen[0],), (chosen[-1],)),
        "free": (tuple(chosen), tuple(chosen)),
    }
    return tuple(Placement(each, *kinds[each]) for each in names)


@dataclass(frozen=True)
class _Output:
    """Where the results go."""

    directory: Path | None
    page: Path | None
    as_json: bool


class _Reporter:
    """A bar on a terminal; elsewhere a line every so often."""

    def __init__(self, total: int) -> None:
        self._total, self._count, self._said = total, 0, time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )

    def __enter__(self) -> _Reporter:
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task("starting", total=self._total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def done(self, what: str) -> None:
        self._count += 1
        if self._bar:
            self._bar.update(self._task, advance=1, description=what)
        elif time.monotonic() - self._said > 20:
            self._said = time.monotonic()
            click.echo(f"{self._count} of {self._total} runs done, now at {what}", err=True)


@click.command(short_help="Default against shortcut, measured here and now.")
@click.option("--workload", type=click.Choice(list(WORKLOADS)), default="qperf", show_default=True)
@click.option(
    "--mesh",
    is_flag=True,
    help="The same as --workload mesh: through two real Envoy sidecars.",
)
@path_option
@click.option(
    "--placement",
    type=click.Choice([*_PLACEMENTS, "both"]),
    help="Cores of the two ends.  [default: both for qperf (one-core with --quick), else free]",
)
@click.option("--cpus", metavar="A,B", help="Cores to use.  [default: the first two allowed]")
@click.option("--rounds", type=click.IntRange(1, 100), help="Runs per mode.  [default: 5]")
@click.option(
    "--seconds", type=click.IntRange(1, 600), default=1, show_default=True, help="Of every run."
)
@click.option(
    "--size",
    type=click.IntRange(1, parallel.MOST),
    help=f"Bytes of a response of workload parallel.  [default: {parallel.SIZE}]",
)
@click.option(
    "--pairs",
    type=click.IntRange(1, idle.MOST),
    help=f"Connections that workload idle holds.  [default: {idle.PAIRS}]",
)
@click.option(
    "--naive",
    "with_naive",
    is_flag=True,
    help="Also a bypass that promises nothing, to show what the promise costs.",
)
@click.option(
    "--kubernetes",
    "on_kubernetes",
    is_flag=True,
    help="Two pods on a node of a cluster on which underpass runs, by kubectl; those of default "
    "runs opt out.",
)
@click.option(
    "--kubeconfig",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="With --kubernetes: of the cluster.  [default: kubectl's own]",
)
@click.option("--node", help="With --kubernetes: its name.  [default: one that underpass is on]")
@click.option(
    "--image",
    help=f"With --kubernetes: an image with qperf and sleep.  [default: {kubernetes.IMAGE}]",
)
@click.option("--quick", is_flag=True, help="About 75 seconds: 2 rounds, one core.")
@click.option(
    "--output",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write results.json, chart.png and chart.svg there.",
)
@click.option(
    "--report",
    "target",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write one HTML page there: charts, tables and every run; it needs no other file.",
)
@output.json_option
@click.pass_obj
def bench(  # noqa: PLR0913, PLR0917 - one argument an option
    pins: Path,
    workload: str,
    mesh: bool,
    way: str,
    placement: str | None,
    cpus: str | None,
    rounds: int | None,
    seconds: int,
    size: int | None,
    pairs: int | None,
    with_naive: bool,
    on_kubernetes: bool,
    kubeconfig: Path | None,
    node: str | None,
    image: str | None,
    quick: bool,
    directory: Path | None,
    target: Path | None,
    as_json: bool,
) -> None:
    """Default against shortcut, measured here and now with the real programs.

    Two network namespaces, a cgroup and a generation of its own; a running installation is not
    touched. Fails if the kernel's counters do not bear the comparison out.
    """
    if mesh:
        _refuse_beside_mesh(workload)
        workload = "mesh"
    shown = _Output(directory, target, as_json)
    if target:
        page.check(target)
    if directory:
        report.check(directory)
    if on_kubernetes:
        other = workload if workload != "qperf" else None
        kubernetes.refuse(
            {"--naive": with_naive, "--placement": placement, "--cpus": cpus, "--workload": other}
            | {"--path": way if way != "bridge" else None, "--size": size, "--pairs": pairs},
            with_cluster=True,
        )
        count = rounds or (2 if quick else 5)
        where = kubernetes.Kubectl(kubeconfig)
        image = image or kubernetes.IMAGE
        wanted = bench_kubernetes.Wanted(where, node, image, count, seconds)
        _show(*bench_kubernetes.run(wanted, _Reporter), shown)
        return
    of_a_cluster = {"--kubeconfig": kubeconfig, "--node": node, "--image": image}
    kubernetes.refuse(of_a_cluster, with_cluster=False)
    chosen = choose(workload, size=size, pairs=pairs)
    if with_naive and chosen.behind_nat:
        cause = f"NAT hides the connections of workload {workload} from the naive bypass"
        raise Usage("use", "--naive", cause, "leave it out")
    if placement is None:
        placement = "free" if workload != "qperf" else "one-core" if quick else "both"
    plan = runner.Plan(
        chosen,
        choose_placements(placement, cpus),
        rounds or (2 if quick else 5),
        seconds,
        (100 if quick else 200) if chosen.unix and probe.available() else 0,
        with_naive,
    )
    path = Way.parse(way)
    if with_naive:
        path.refuse_naive()
    if os.geteuid() != 0:
        raise UnderpassError("run", "the benchmark", "it makes namespaces", "run as root")
    missing(chosen)
    root = namespaces.find_cgroup2()
    runner.refuse_if_covered(root, [DEFAULT_PINS, pins])
    if chosen.unix and not probe.available():
        click.echo("no AF_UNIX columns: this build has no probe program", err=True)
    started = time.time()
    with interruptible("the benchmark"):
        bed.sweep(root)
        with (
            bed.Bed(root, path) as here,
            runner.generation(here) as plane,
            ExitStack() as stack,
        ):
            rows = len(chosen.measures(here.reach, seconds))
            minutes = plan.estimate(rows) / 60
            click.echo(f"{many(rows, 'row')}, about {minutes:.1f} minutes; {path}", err=True)
            total = rows * len(plan.placements) * plan.rounds * len(plan.modes)
            with _Reporter(total) as reporter:
                bypass = stack.enter_context(naive.attached(here.naive)) if with_naive else None
                kernel = (plane, bypass)
                outcomes = runner.Comparison(plan, here, kernel, reporter.done).run()
    document = report.document(plan, path, outcomes, started)
    _show(document, outcomes, plan, shown)


def _refuse_beside_mesh(workload: str) -> None:
    source = click.get_current_context().get_parameter_source("workload")
    if source is not ParameterSource.DEFAULT and workload != "mesh":
        cause = "it is a workload itself"
        raise Usage("use", f"--mesh with --workload {workload}", cause, "leave one of them out")


def _show(
    document: dict[str, object], outcomes: list[Outcome], plan: runner.Plan, wanted: _Output
) -> None:
    if wanted.page:
        page.write(document, wanted.page)
    if wanted.as_json:
        output.print_json(document)
    else:
        report.print_tables(outcomes, plan, document, output.console(markup=True, width=200))
    if wanted.directory:
        report.write(document, wanted.directory)
        problem = chart.draw(outcomes, plan, document, wanted.directory)
        if problem:
            click.echo(problem, err=True)
    wrong = failures(outcomes)
    for line in wrong:
        click.echo(f"NOT PROVEN: {line}", err=True)
    if wrong:
        raise UnderpassError(
            "believe", "this comparison", f"{many(len(wrong), 'run')} not what was claimed; "
            f"first: {wrong[0]}", "see `underpass doctor`"
        )  # fmt: skip
