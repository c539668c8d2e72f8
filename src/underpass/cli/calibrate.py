"""`underpass calibrate`."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click
import msgspec

from underpass import calibration, namespaces
from underpass.bench import bed, probe, runner
from underpass.bench import calibrate as measuring
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
@click.option("--dry-run", is_flag=True, help="Show what is found, keep nothing.")
@output.json_option
@click.pass_obj
def calibrate(pins: Path, way: str, dry_run: bool, as_json: bool) -> None:
    """Find out which streams of small messages are faster by TCP on this node.

    Some forty seconds, in two network namespaces, a cgroup and a generation of its own. The
    result is kept in /var/lib/underpass, and used by the next `up` or `upgrade`; `doctor` shows
    it. Measure before `up`, while nothing else runs.
    """
    path = bed.Way.parse(way)
    if os.geteuid() != 0:
        raise UnderpassError("run", "the calibration", "it makes namespaces", "run as root")
    if not probe.available():
        raise UnderpassError("run", probe.PROGRAM, "this build lacks it", "build underpass again")
    root = namespaces.find_cgroup2()
    runner.refuse_if_covered(root, [DEFAULT_PINS, pins])
    with interruptible("the calibration"):
        bed.sweep(root)
        with bed.Bed(root, path) as here:
            found = measuring.run(here, choose_placements("both", None), _progress)
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
            f"kept in {calibration.PLACE}; used by the next `underpass up` or `underpass upgrade`"
        )


def words(size: int) -> str:
    """What a bound means."""
    return f"streams below {size} B go by TCP" if size else "no stream goes by TCP for its size"


def _progress(line: str) -> None:
    click.echo(f"{time.strftime('%H:%M:%S')} {line}", err=True)
