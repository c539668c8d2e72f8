"""`underpass status`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from underpass import __version__, dataplane
from underpass.cli import output
from underpass.errors import NotLoaded
from underpass.model import REFUSALS, TCP_REASONS, Counters

_NOTHING = Counters(0, 0, 0, {r.word: 0 for r in TCP_REASONS}, {r.word: 0 for r in REFUSALS})


def read(pins: Path) -> dict[str, Any]:
    """What `status --json` prints."""
    try:
        with dataplane.opened(pins) as planes:
            plane = planes[0]
            each = [
                {"pins": str(p.pins), "generation": p.number, "version": p.version, "open_pairs": n}
                for p, n in ((p, p.open_pairs()) for p in planes)
            ]
            return {
                "state": plane.state,
                "cgroup": str(plane.cgroup),
                "version": plane.version,
                "counters": dataplane.counters(planes),
                "open_pairs": sum(p["open_pairs"] for p in each),
                "capacity": plane.capacity,
                "attached": plane.attached,
                "pins": str(pins),
                "generations": each,
            }
    except NotLoaded:
        return {
            "state": "absent",
            "cgroup": None,
            "version": __version__,
            "counters": _NOTHING,
            "open_pairs": 0,
            "capacity": 0,
            "attached": False,
            "pins": str(pins),
            "generations": [],
        }


@click.command()
@output.json_option
@click.pass_obj
def status(pins: Path, as_json: bool) -> None:
    """Is it live, for what, and what has it carried."""
    found = read(pins)
    if as_json:
        output.print_json(found)
        return
    counters: Counters = found["counters"]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("state", found["state"])
    if found["state"] != "absent":
        carried = output.size(counters.shortcut_bytes_total)
        gone = "" if found["attached"] else "  (has gone: run `underpass up` again)"
        table.add_row("cgroup", output.runnable(found["cgroup"] + gone))
        table.add_row("version", found["version"])
        table.add_row("open pairs", f"{found['open_pairs']} of {found['capacity']}")
        for old in found["generations"][1:]:
            held = (
                f"generation {old['generation']} (upgraded) still holds {old['open_pairs']} pairs"
            )
            table.add_row("", held)
        table.add_row("pairs so far", str(counters.pairs_total))
        table.add_row("by shortcut", f"{counters.shortcut_messages_total} messages, {carried}")
        _add_reasons(table, "by TCP", counters.tcp_messages_total, "messages")
        _add_reasons(table, "not paired", counters.refused_total, "sockets")
    else:
        table.add_row("next step", output.runnable("`underpass up`"))
    output.console().print(table)


def _add_reasons(table: Table, title: str, counts: dict[str, int], unit: str) -> None:
    seen = [(word, n) for word, n in counts.items() if n]
    if not seen:
        table.add_row(title, f"0 {unit}")
    for word, n in seen:
        table.add_row(title, f"{n} {unit}: {word}")
        title = ""
