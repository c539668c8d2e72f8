"""`underpass torture`."""

from __future__ import annotations

import os
import random
import sys

import click
from rich.live import Live
from rich.table import Table

from underpass.cli import output
from underpass.cli.interrupt import interruptible
from underpass.cli.seconds import Seconds
from underpass.errors import UnderpassError
from underpass.model import Fault, many
from underpass.torture import bed, schedule
from underpass.torture.generation import path_switches
from underpass.torture.run import Result, Torture
from underpass.torture.run import torture as run_torture

_SHOWN = 20
_SAY_EVERY = 10.0


class _Watcher:
    """A live table on a terminal; elsewhere a line every ten seconds."""

    def __init__(self) -> None:
        self._live = Live(transient=True) if sys.stderr.isatty() else None
        if self._live:
            self._live.console.file = sys.stderr
        self._said = 0.0
        self._last = (0.0, 0)

    def __enter__(self) -> _Watcher:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def watch(self, seconds: float, run: Torture) -> None:
        """Show how far the run is."""
        if not self._live and seconds - self._said < _SAY_EVERY:
            return
        tally = run.tally
        since, before = self._last
        rate = (tally.bytes - before) / max(seconds - since, 0.1)
        self._said, self._last = seconds, (seconds, tally.bytes)
        figures = {
            "elapsed": f"{seconds:.0f} s",
            "connections": f"{tally.connections:,} done, {tally.open} open",
            "bytes checked": f"{output.size(tally.bytes)}, {output.size(rate)}/s",
            "path switches": f"{path_switches(run.generation.messages()):,}",
            "disturbances": f"{sum(tally.disturbances.values())}, {tally.killed} killed",
            "errors": str(len(tally.errors) + len(tally.leaks)),
        }
        if self._live:
            self._live.update(_table(figures))
        else:
            click.echo("; ".join(f"{name} {said}" for name, said in figures.items()), err=True)


def _table(figures: dict[str, str]) -> Table:
    table = Table(show_header=False)
    for name, said in figures.items():
        table.add_row(name, said)
    return table


@click.command(short_help="Check every byte while everything is disturbed.")
@click.option("--seconds", type=Seconds(1, 86400), default=60, show_default=True, help="How long.")
@click.option("--connections", type=click.IntRange(1), help="End earlier, after so many.")
@click.option("--seed", type=click.IntRange(0), help="Draws the plan.  [default: a random one]")
@click.option(
    "--fault",
    type=click.Choice([fault.name for fault in Fault if fault.name], case_sensitive=False),
    help="Plant a fault in the data plane: the run has to find it and to fail.",
)
@output.json_option
def torture(
    seconds: float, connections: int | None, seed: int | None, fault: str | None, as_json: bool
) -> int:
    """Drive connections of every shape, check every byte, and move the ground under them.

    Pods, a cgroup and a generation of its own; a running installation is not touched. Fails on one
    wrong byte, one stuck connection, one leaked map entry. The same seed draws the same plan.
    """
    if os.geteuid() != 0:
        raise UnderpassError("run", "the torture", "it makes namespaces", "run as root")
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    click.echo(f"seed {seed}, plan {schedule.digest(seed)}", err=True)
    planted = Fault[fault.upper()] if fault else Fault(0)
    with interruptible("the torture"):
        bed.sweep()
        with _Watcher() as watcher:
            result = run_torture(seconds, connections, seed, planted, watcher.watch)
    wrong = result.errors + result.leaks
    if as_json:
        output.print_json(result)
    else:
        _show(result)
    for line in wrong[:_SHOWN]:
        click.echo(line, err=True)
    if wrong:
        again = f"underpass torture --seed {seed}"
        output.fail(
            f"the torture found {many(len(wrong), 'error')}; `{again}` draws the same plan", 1
        )
    return 0


def _show(result: Result) -> None:
    tcp = result.messages["tcp"]
    by_tcp = ", ".join(f"{n:,} {word}" for word, n in tcp.items()) if isinstance(tcp, dict) else ""
    figures = {
        "seed, plan": f"{result.seed}, {result.plan}",
        "seconds": f"{result.seconds}",
        "connections": f"{result.connections:,}, {result.connections / result.seconds:,.0f}/s",
        "bytes checked": f"{result.bytes:,}, {output.size(result.bytes / result.seconds)}/s",
        "path switches": f"{result.path_switches:,}",
        "messages by the shortcut": f"{result.messages['shortcut']:,}",
        "messages by TCP": by_tcp,
        "disturbances": ", ".join(f"{n} {act}" for act, n in result.disturbances.items()),
        "processes killed": str(result.killed),
        "taken in while open": f"{result.adopted:,}",
        "blocking reads woken early": str(result.woken),
        "errors": str(len(result.errors)),
        "leaks": str(len(result.leaks)),
    }
    output.console().print(_table(figures))
