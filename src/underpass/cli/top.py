"""`underpass top`."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import sys
import termios
import time
import tty
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from underpass import dataplane, kept, naming
from underpass import top as picture
from underpass.cli.seconds import Seconds
from underpass.errors import NotLoaded, Usage
from underpass.model import Pair, many
from underpass.top import Sort

_KEYS = "q quit  s sort  p pods or pairs"
_NO_TERMINAL = 160  # columns


@dataclass
class _View:
    sort: Sort
    by_pod: bool


@click.command(short_help="The busiest pairs or pods, live.")
@click.option(
    "--interval",
    type=Seconds(0.1, 3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Between two looks.",
)
@click.option(
    "--sort",
    type=click.Choice([each.value for each in Sort]),
    default=Sort.RATE.value,
    show_default=True,
    help="What comes first.",
)
@click.option("--pods", "by_pod", is_flag=True, help="Begin with a row for two pods.")
@click.option("--once", is_flag=True, help="Print one picture, after one interval, and end.")
@click.pass_obj
def top(pins: Path, interval: float, sort: str, by_pod: bool, once: bool) -> None:
    """The busiest pairs, or pods, live: what they carry, on which path, and why.

    Keys: `q` ends it, `s` sorts by the next column (marked by a star), `p` goes from pairs to pods
    and back. Where pods are not known, network namespaces stand for them.
    """
    view = _View(Sort(sort), by_pod)
    if once:
        before, then = _pairs(pins), time.monotonic()
        time.sleep(interval)
        after, now = _pairs(pins), time.monotonic()
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _NO_TERMINAL
        click.echo("\n".join(_frame(before, after, now - then, view, (width, None))))
        return
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise Usage("show", "a live table", "this is no terminal", "say `underpass top --once`")
    if not Console().is_terminal or Console().is_dumb_terminal:
        cause = f"this terminal (TERM={os.environ.get('TERM', '')}) cannot move its cursor"
        raise Usage("show", "a live table", cause, "say `underpass top --once`")
    with _keyboard() as keyboard, Live(screen=True, auto_refresh=False) as live:
        before, then = _pairs(pins), time.monotonic()
        after, now = before, then
        while True:
            size = shutil.get_terminal_size()
            lines = _frame(before, after, now - then, view, (size.columns, size.lines))
            live.update(Text("\n".join(lines), no_wrap=True, overflow="crop"), refresh=True)
            key = _key(keyboard, now + interval - time.monotonic())
            if key in {"q", "\x1b", "\x03", "\x04"}:
                return
            if key == "s":
                view.sort = view.sort.following
            elif key == "p":
                view.by_pod = not view.by_pod
            elif not key:
                before, then = after, now
                after, now = _pairs(pins), time.monotonic()


def _pairs(pins: Path) -> list[Pair] | None:
    """The open pairs; None if nothing is up."""
    try:
        with dataplane.opened(pins) as planes:
            seen = kept.read_pods(pins)
            return naming.pairs(planes, seen.pods if seen else ())
    except NotLoaded:
        return None


def _frame(
    before: list[Pair] | None,
    after: list[Pair] | None,
    seconds: float,
    view: _View,
    size: tuple[int, int | None],
) -> list[str]:
    found = picture.rows(before or [], after or [], seconds, by_pod=view.by_pod)
    if seconds <= 0:  # the first picture: nothing to compare with yet
        found = picture.rows(after or [], after or [], 1.0, by_pod=view.by_pod)
    rate, messages = sum(row.rate for row in found), sum(row.messages for row in found)
    head = "underpass is not up" if after is None else (
        f"{many(len(after), 'open pair')}, {picture.amount(rate)}/s by shortcut, "
        f"{many(round(messages), 'message')}/s"
    )  # fmt: skip
    foot = _KEYS if size[1] else ""
    return picture.frame(picture.ordered(found, view.sort), view.sort, size, head, foot)


@contextlib.contextmanager
def _keyboard() -> Iterator[int]:
    """The terminal, telling of each key as it is pressed; afterwards it is as it was."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield fd
    finally:
        with contextlib.suppress(termios.error):  # the terminal has gone
            termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _key(fd: int, seconds: float) -> str:
    """The next key, empty if none is pressed for so long."""
    readable, _, _ = select.select([fd], [], [], max(0.0, seconds))
    if not readable:
        return ""
    return os.read(fd, 1).decode(errors="replace") or "q"  # the terminal has gone
