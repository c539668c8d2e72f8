"""`underpass upgrade`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from underpass import calibration, config, dataplane
from underpass.bringup import fionread_broken
from underpass.cli import output
from underpass.cli.up import admit_unknown
from underpass.model import many


@click.command()
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, readable=False),
    help="TOML file as for `up`.  [default: the settings that are in force]",
)
@admit_unknown
@click.pass_obj
def upgrade(pins: Path, config_path: Path | None, admit: bool) -> None:
    """Put this version's programs and maps in charge, under load.

    Open pairs go on in the old generation until they close; new connections use the new one. If
    anything fails, the old one serves on, unchanged.
    """
    with dataplane.Dataplane.open(pins) as plane:
        settings = config.read(config_path) if config_path else plane.settings
    settings = replace(settings, small=calibration.bounds())
    if admit:
        settings = replace(settings, admit_unknown=True)
    left = dataplane.upgrade(pins, settings, fionread_broken=fionread_broken())
    stay = f"; the old one keeps {many(left, 'pair')} until closed" if left else ""
    output.say(f"underpass is upgraded{stay}")
