"""What goes to the terminal: JSON documents, tables, the one line of an error."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn, TextIO

import click
from rich.console import Console

from underpass.model import plain

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")

#: The option that commands in next steps need, with a blank after it; empty: none.
_PINS: ContextVar[str] = ContextVar("pins", default="")
#: Where it goes: in a command in backticks, unless that makes pins of its own.
_COMMAND = re.compile(r"`underpass (?=[a-z])(?!bench|torture)")


def act_on(pins: Path) -> None:
    """From now on next steps say that they are for ``pins``, which is not the usual place."""
    _PINS.set(f"--pins {_quoted(str(pins))} ")


def _quoted(word: str) -> str:
    """As a shell reads it; what a terminal cannot show is written as its bytes (``$'...'``)."""
    if word.isprintable():
        return shlex.quote(word)
    shown = (
        char if char.isprintable() and char not in "'\\" else
        "".join(f"\\{byte:03o}" for byte in os.fsencode(char))
        for char in word
    )  # fmt: skip
    return f"$'{''.join(shown)}'"


def runnable(text: str) -> str:
    """``text`` with every command of ours in backticks as it has to be typed here."""
    return runnable_anywhere()(text)


def runnable_anywhere() -> Callable[[str], str]:
    """:func:`runnable` for threads that know nothing of this one's pins."""
    option = _PINS.get()
    return lambda text: _COMMAND.sub(lambda found: found[0] + option, text)


def say(line: str) -> None:
    """Print a line of people's text on stdout."""
    click.echo(runnable(line))


def open_streams() -> None:
    """Give a command that was started without stdout or stderr one that goes nowhere.

    Else the next descriptor, a map's, would take its number. What a stream's encoding lacks is
    written as an escape.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    if sys.__stdout__ is None:
        sys.stdout = os.fdopen(1, "w")
    if sys.__stderr__ is None:
        sys.stderr = os.fdopen(2, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def console(markup: bool = False, width: int = 160) -> Console:
    """Where people's text goes; wide enough to keep rows whole when stdout is no terminal.

    Args:
        markup: ``[bold]`` and the like in the text are rich's; else a name may hold brackets.
        width: in columns, where stdout is no terminal.
    """
    known = None if sys.stdout.isatty() else width
    return Console(highlight=False, markup=markup, width=known)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows under one another, each column as wide as its widest word; quick for thousands."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def print_json(value: Any) -> None:
    """Print ``value`` (dataclasses allowed) as one JSON document."""
    click.echo(json.dumps(plain(value), indent=2))


def warn(line: str) -> None:
    """A line for people on stderr, where what was asked for has been done all the same."""
    click.echo(f"underpass: {runnable(line)}", err=True)


def fail(line: str, code: int) -> NoReturn:
    """Print the one line of an error on stderr and exit."""
    try:
        click.echo("underpass: " + runnable(" ".join(line.split())), err=True)
    except OSError:
        silence(sys.stderr)
    sys.exit(code)


def silence(stream: TextIO) -> None:
    """Let what cannot be written go nowhere, so that the interpreter's last flush succeeds."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def size(count: float) -> str:
    """A number of bytes for people: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
