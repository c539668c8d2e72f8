"""`underpass status`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from underpass import __version__, dataplane, records
from underpass.cli import output
from underpass.errors import NotLoaded
from underpass.model import REFUSALS, TCP_REASONS, Counters, Reason, many

_NOTHING = Counters(0, 0, 0, {r.word: 0 for r in TCP_REASONS}, {r.word: 0 for r in REFUSALS})
#: What `guard list` calls the programs behind these reasons.
_VERDICTS = {
    Reason.OBSERVED.word: " (a program was watched: `underpass guard list`)",
    Reason.GUARDED.word: " (a program was kept-out or denied: `underpass guard list`)",
}


def _generation(plane: dataplane.Dataplane) -> dict[str, Any]:
    endpoints = plane.endpoints()
    return {
        "pins": str(plane.pins),
        "generation": plane.number,
        "version": plane.version,
        "open_pairs": len(records.matched(endpoints)),
        "endpoints": len(endpoints),
    }


def read(pins: Path) -> dict[str, Any]:
    """What `status --json` prints."""
    try:
        with dataplane.opened(pins) as planes:
            plane = planes[0]
            each = [_generation(one) for one in planes]
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
            table.add_row("", f"generation {old['generation']} (upgraded) {_held(old)}")
        table.add_row("pairs so far", str(counters.pairs_total))
        table.add_row(
            "by shortcut", f"{many(counters.shortcut_messages_total, 'message')}, {carried}"
        )
        _add_reasons(table, "by TCP", counters.tcp_messages_total, "message")
        _add_reasons(table, "not paired", counters.refused_total, "socket")
    else:
        table.add_row("next step", output.runnable("`underpass up`"))
    output.console().print(table)


def _held(old: dict[str, Any]) -> str:
    if old["open_pairs"]:
        return f"still holds {many(old['open_pairs'], 'pair')}"
    if old["endpoints"]:
        return f"still holds {many(old['endpoints'], 'socket')} whose other end has left"
    return "holds nothing any more; it goes with the next up, upgrade or down"


def _add_reasons(table: Table, title: str, counts: dict[str, int], unit: str) -> None:
    seen = [(word, n) for word, n in counts.items() if n]
    if not seen:
        table.add_row(title, many(0, unit))
    for word, n in seen:
        table.add_row(title, output.runnable(f"{many(n, unit)}: {word}{_VERDICTS.get(word, '')}"))
        title = ""
