"""`underpass doctor`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
from rich.markup import escape

from underpass import features
from underpass.cli import output

_MARKS = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "failed": "[red]✗[/]"}


@click.command(short_help="Check kernel and node by really loading and trying.")
@output.json_option
@click.pass_obj
def doctor(pins: Path, as_json: bool) -> int:
    """Check kernel, node and neighbours, by really loading and trying; takes a few seconds.

    The self-test runs in a cgroup and on pins of its own; a bpffs is mounted if there is none.
    """
    found: list[features.Check] = []
    console = output.console(markup=True)
    for checked in features.checks(pins):
        check = replace(checked, next_step=output.runnable(checked.next_step))
        if not as_json:
            if not found or found[-1].group != check.group:
                console.print(f"[bold]{check.group}[/]")
            detail = f": {escape(check.detail)}" if check.detail else ""
            console.print(f"  {_MARKS[check.status]} {check.name}{detail}", soft_wrap=True)
            if check.status != "ok" and check.next_step:
                console.print(f"      next: {escape(check.next_step)}", soft_wrap=True)
        found.append(check)
    code = features.exit_code(found)
    if as_json:
        output.print_json({"ok": code == 0, "checks": found})
    elif code == 0:
        console.print("underpass can run here")
    else:
        failed = ", ".join(c.name for c in found if c.status == "failed")
        output.fail(f"cannot pass the check: {failed}; see the next steps above", code)
    return code
