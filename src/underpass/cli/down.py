"""`underpass down`."""

from __future__ import annotations

import contextlib
import math
import sys
from pathlib import Path

import click

from underpass import dataplane, selftest
from underpass.cli import output
from underpass.errors import UnderpassError


@click.command()
@click.option(
    "--timeout",
    type=click.FloatRange(0, 86400),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for readers to consume what waits for them.",
)
@click.pass_obj
def down(pins: Path, timeout: float) -> None:
    """Stop pairing, drain, detach, unpin. Loses nothing.

    Endpoints whose readers do not read in time are left working and named; the exit code is then
    1, and `underpass down` can be run again to finish.
    """
    if math.isnan(timeout):  # it compares with nothing: the wait would have no end
        raise click.BadParameter("nan is not a number of seconds.", param_hint="--timeout")
    with contextlib.suppress(UnderpassError):
        selftest.sweep()
    was_up = pins.exists()
    tty = sys.stderr.isatty()

    def progress(left: int) -> None:
        if tty:
            click.echo(f"\rdraining: {left} endpoints hold unread bytes \033[K", nl=False, err=True)

    left = dataplane.down(pins, timeout, progress)
    if tty and was_up:
        click.echo("\r\033[K", nl=False, err=True)
    if left:
        shown = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        cause = f"{len(left)} endpoints still hold unread bytes and go on working: {shown}"
        raise UnderpassError("finish draining", pins, cause, "run `underpass down` again")
    output.say("underpass is down" if was_up else "underpass was not up")
