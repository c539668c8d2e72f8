"""`underpass calibrate`."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager
from pathlib import Path

import click
import msgspec

from underpass import calibration, namespaces
from underpass.bench import bed, probe, runner, twopods
from underpass.bench import calibrate as measuring
from underpass.bench.way import Way
from underpass.cli import output
from underpass.cli.bench import choose_placements, path_option
from underpass.cli.interrupt import interruptible
from underpass.dataplane import DEFAULT_PINS
from underpass.errors import UnderpassError

_ROADS = {
    "virtual": "between namespaces",
    "virtual_nodelay": "between namespaces, TCP_NODELAY",
    "loopback": "on loopback",
    "loopback_nodelay": "on loopback, TCP_NODELAY",
}


@click.command("calibrate", short_help="Find out which small streams are faster by TCP here.")
@path_option
@click.option("--quick", "effort", flag_value="quick", help="Some ten seconds; coarser bounds.")
@click.option(
    "--gently",
    "effort",
    flag_value="gently",
    help="Four minutes with pauses, for a node at work; ends with the process that started it.",
)
@click.option("--dry-run", is_flag=True, help="Show what is found, keep nothing.")
@output.json_option
@click.pass_obj
def calibrate(pins: Path, way: str, effort: str | None, dry_run: bool, as_json: bool) -> None:
    """Find out which streams of small messages are faster by TCP on this node.

    A minute, in two network namespaces, a cgroup and a generation of its own. The
    result is kept in /var/lib/underpass, and used by the next `up` or `upgrade`, by an agent at
    once; `doctor` shows it. Measure while nothing else runs.
    """
    path = Way.parse(way)
    path.refuse_probe()
    if os.geteuid() != 0:
        raise UnderpassError("run", "the calibration", "it makes namespaces", "run as root")
    if not probe.available():
        raise UnderpassError("run", probe.PROGRAM, "this build lacks it", "build underpass again")
    root = namespaces.find_cgroup2()
    efforts = {"quick": measuring.QUICK, "gently": measuring.GENTLE}
    chosen = efforts.get(effort or "", measuring.FULL)
    progress = _Attended(os.getppid()) if effort == "gently" else _progress
    with interruptible("the calibration"):
        bed.sweep(root)
        covering = runner.covering(root / bed.name(), [DEFAULT_PINS, pins])
        with measuring.aside(covering), _place(root, path) as here:
            found = measuring.run(here, choose_placements("both", None), progress, chosen)
    if not dry_run:
        try:
            calibration.write(found)
        except OSError as error:
            cause = error.strerror or str(error)
            raise UnderpassError(
                "keep", calibration.PLACE, cause, "make it writable, or say --dry-run"
            ) from None
    if as_json:
        points = msgspec.to_builtins(found.points)
        output.print_json({"small": found.small, "kept": not dry_run, "points": points})
        return
    for road, size in found.small.items():
        where = "two cores" if road.endswith(measuring.BESIDE) else "one core"
        output.say(f"{_ROADS[road.removesuffix(measuring.BESIDE)]:32s} {where:10s} {words(size)}")
    if not dry_run:
        output.say(
            f"kept in {calibration.PLACE}; used by the next `underpass up` or `underpass upgrade`, "
            "by an agent at once"
        )


def words(size: int) -> str:
    """What a bound means."""
    return f"streams below {size} B go by TCP" if size else "no stream goes by TCP for its size"


def _place(root: Path, path: Way) -> AbstractContextManager[measuring.Place]:
    # the usual way takes no program, so that it goes in a container, too
    return twopods.made(root) if path == Way() else bed.Bed(root, path)


def _progress(line: str) -> None:
    click.echo(f"{time.strftime('%H:%M:%S')} {line}", err=True)


class _Attended:
    """Tells nobody, and goes on only while the process that started this one is there."""

    def __init__(self, parent: int) -> None:
        self._parent = parent

    def __call__(self, _line: str) -> None:
        if os.getppid() != self._parent:
            cause = "the process that started it has ended"
            raise UnderpassError("finish", "the calibration", cause, "run it again")
