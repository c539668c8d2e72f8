"""`underpass bugreport`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from underpass import bugreport as report
from underpass.cli import output
from underpass.cli.status import read
from underpass.errors import UnderpassError

_FILE = click.Path(path_type=Path, dir_okay=False, allow_dash=True)
_STDOUT = Path("-")


@click.command(short_help="One archive with what a bug report needs; no payload, no secrets.")
@click.option(
    "--output", "to", type=_FILE, help="Where to write it; -: to standard output.  [default: here]"
)
@click.option(
    "--config",
    "config_path",
    type=_FILE,
    help="The configuration that is in use.  [default: that in /etc/underpass]",
)
@click.option("--logs", type=_FILE, help="A file of recent log lines of the agent.")
@click.pass_obj
def bugreport(pins: Path, to: Path | None, config_path: Path | None, logs: Path | None) -> None:
    """Write one archive (tar.gz) with what a bug report needs; takes some ten seconds.

    It holds the checks of `doctor`, status, connections, why sockets are on TCP, what the guard
    knows (without command lines), sizes, kernel, versions and the agent's metrics. No payload, no
    environment, no command line is in it; addresses, ports and names of programs are. Look it
    through before you pass it on.
    """
    to = to or Path(f"underpass-bugreport-{time.strftime('%Y%m%d-%H%M%S')}.tar.gz")
    if to != _STDOUT:
        report.check(to)
    sources = report.Sources(pins, config_path or report.usual_config(), logs)
    parts = report.collect(sources, lambda: read(pins))
    if to == _STDOUT:
        sys.stdout.buffer.write(report.packed(parts))
        return
    try:
        report.write(to, parts)
    except OSError as error:
        step = "name another file with --output"
        raise UnderpassError("write", to, error.strerror or str(error), step) from None
    output.say(f"{to}: {len(parts)} files; look them through before you pass them on")
