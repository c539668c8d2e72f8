"""`underpass down`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import click

from underpass import dataplane, kept, selftest
from underpass.agent import lock
from underpass.cli import output
from underpass.cli.seconds import Seconds
from underpass.errors import UnderpassError
from underpass.model import many


@click.command()
@click.option(
    "--timeout",
    type=Seconds(0, 86400),
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
    with contextlib.suppress(UnderpassError):
        selftest.sweep()
    was_up = pins.exists()
    tty = sys.stderr.isatty()

    def progress(left: int) -> None:
        if tty:
            click.echo(f"\rdraining: {many(left, 'endpoint')} left \033[K", nl=False, err=True)

    left = dataplane.down(pins, timeout, progress)
    if tty and was_up:
        click.echo("\r\033[K", nl=False, err=True)
    if left:
        shown = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        cause = f"unread bytes or calls hold {many(len(left), 'endpoint')}, still working: {shown}"
        raise UnderpassError("finish draining", pins, cause, "run `underpass down` again")
    output.say("underpass is down" if was_up else "underpass was not up")
    if not lock.at_work(pins):
        kept.remove(pins)
    else:
        output.say("an agent is at work here and brings it back: end that one first")
