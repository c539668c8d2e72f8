"""What goes to the terminal: JSON documents, tables, the one line of an error."""

from __future__ import annotations

import json
import sys
from typing import Any, NoReturn

import click
from rich.console import Console

from underpass.model import plain

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def console() -> Console:
    """Where people's text goes; wide enough to keep rows whole when stdout is no terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def print_json(value: Any) -> None:
    """Print ``value`` (dataclasses allowed) as one JSON document."""
    click.echo(json.dumps(plain(value), indent=2))


def fail(line: str, code: int) -> NoReturn:
    """Print the one line of an error on stderr and exit."""
    click.echo("underpass: " + " ".join(line.split()), err=True)
    sys.exit(code)


def size(count: float) -> str:
    """A number of bytes for people: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
