"""`underpass guard`: which programs may take the shortcut, and why not."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from underpass import dataplane, programs
from underpass.cli import output
from underpass.errors import UnderpassError, Usage
from underpass.model import Program, Rule, Sign

#: Columns below which the list is no table.
_NARROW = 100


@click.group(short_help="Which programs stay on plain TCP, and why.")
def guard() -> None:
    """Programs that use what the shortcut cannot serve stay on plain TCP.

    A program that has not been seen before is watched while it runs (10 s) on plain TCP. One
    that splices from sockets, or uses MSG_WAITALL, MSG_OOB, MSG_TRUNC, MSG_ZEROCOPY, SO_RCVLOWAT
    above 1, kTLS or MPTCP, or hands its sockets to the kernel, is kept out, now and when it is
    started again. The watching goes on for all.

    \b
    Verdict of a program   its connections, in `status` and `explain`
      watched              observed: on TCP, new ones once it is admitted
      admitted, allowed    may take the shortcut
      kept-out, denied     guarded: on TCP

    PROGRAM is an id of `guard list`, or the name of an executable file: of a symbolic link that
    is the name of the file it leads to, of a script that of its interpreter.
    """  # noqa: D301 - to click, a real \b says that lines stay as they are


@guard.command("list", short_help="Programs and rules, with verdict and reason.")
@output.json_option
@click.pass_obj
def list_(pins: Path, as_json: bool) -> None:
    """Every program seen so far, the latest first, with its verdict and what led to it.

    After them, the rules about programs that have not been seen.
    """
    with dataplane.Dataplane.open(pins) as plane:
        found = plane.programs()
        found += programs.unseen(plane.rules(), found)
        observe = plane.about.knobs.observe_ns / 1e9
    if as_json:
        output.print_json(found)
        return
    if not found:
        output.say("no program has been seen yet")
        return
    rows = [
        (
            program.name,
            program.verdict,
            program.reason or _progress(program, observe),
            program.id,
            program.command or ("" if program.pid else "(not seen yet)"),
        )
        for program in found
    ]
    _print(rows, output.console())


def _print(rows: list[tuple[str, str, str, str, str]], console: Console) -> None:
    """A table; three lines a program where its columns would have no room."""
    if console.width < _NARROW:
        for name, verdict, why, key, command in rows:
            console.print(f"{name}: {verdict}{f' ({why})' if why else ''}", overflow="fold")
            console.print(Padding(f"{key}\n{command}".rstrip(), (0, 0, 0, 2), expand=False))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("PROGRAM", "VERDICT", "WHY", "ID", "COMMAND"):
        table.add_column(title, overflow="fold", no_wrap=title != "COMMAND")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _progress(program: Program, observe: float) -> str:
    if program.verdict == "watched":
        return f"has run {program.observed_seconds:.0f} of {observe:.0f} s"
    return ""


def _apply(pins: Path, name: str, rule: Rule, done: str) -> None:
    count = dataplane.set_rule(pins, name, rule)
    if count:
        output.say(f"{name} is {done} ({count} known)")
        return
    output.say(
        f"no program {name} has been seen yet; the rule is kept: it will be {done} once it runs"
    )
    command = programs.in_path(name)
    if not command:
        return
    path, real, script = command
    if script:
        output.say(f"{path} is a script: when it has run, use its id in `underpass guard list`")
    elif real != name:
        words = shlex.join(["underpass", "guard", "allow" if rule is Rule.ALLOW else "deny", real])
        output.say(f"{path} is a link to {real}, and that name counts: `{words}`")


def _refuse_in_kernel(pins: Path, name: str) -> None:
    """Refuse if no program of this name (or id) may ever be let in."""
    with dataplane.Dataplane.open(pins) as plane:
        by_name = programs.known_signs(os.fsencode(name), plane.about.knobs)
        found = [set(p.signs) for p in plane.programs() if name in (p.id, p.name)]
    hands = set(Sign.IN_KERNEL.words)
    if Sign.IN_KERNEL in by_name or (found and all(hands <= signs for signs in found)):
        cause = "it hands its sockets to the kernel, which could not close them"
        raise Usage("allow", name, cause, "leave it on TCP")


@guard.command(short_help="Let PROGRAM take the shortcut, whatever it does.")
@click.argument("program")
@click.pass_obj
def allow(pins: Path, program: str) -> None:
    """Let PROGRAM (a name, or an id of `guard list`) take the shortcut, whatever it does.

    But not one that hands its sockets to the kernel (in-kernel), which could not close them.
    """
    _refuse_in_kernel(pins, program)
    _apply(pins, program, Rule.ALLOW, "allowed")


@guard.command(short_help="Keep PROGRAM on plain TCP; open pairs leave, too.")
@click.argument("program")
@click.pass_obj
def deny(pins: Path, program: str) -> None:
    """Keep PROGRAM (a name, or an id of `guard list`) on plain TCP; open pairs leave, too."""
    _apply(pins, program, Rule.DENY, "denied")


@guard.command()
@click.argument("program")
@click.pass_obj
def forget(pins: Path, program: str) -> None:
    """Take rules and findings about PROGRAM back: it is watched anew."""
    if not dataplane.forget(pins, program):
        step = "run `underpass guard list`"
        raise UnderpassError("forget", program, "no such program has been seen", step)
    output.say(f"{program} is watched anew")
