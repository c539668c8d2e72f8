"""`underpass pause` and `underpass resume`."""

from __future__ import annotations

from pathlib import Path

import click

from underpass import dataplane
from underpass.cli import output


@click.command(short_help="Send everything by TCP at once; pairs are kept.")
@click.pass_obj
def pause(pins: Path) -> None:
    """Send everything by TCP at once; pairs are kept, nothing is lost."""
    dataplane.pause(pins, True)
    output.say("underpass is paused: every message takes TCP; `underpass resume` goes back")


@click.command(short_help="Let pairs use the shortcut again.")
@click.pass_obj
def resume(pins: Path) -> None:
    """Let pairs use the shortcut again, each once its reader has read what went by TCP."""
    dataplane.pause(pins, False)
    output.say("underpass is active")
