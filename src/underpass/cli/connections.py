"""`underpass connections`."""

from __future__ import annotations

from pathlib import Path

import click

from underpass import dataplane, kept, naming
from underpass.cli import output
from underpass.errors import NotLoaded
from underpass.model import Direction, Pair, Reason


@click.command(short_help="The open pairs, with each direction's path and why.")
@output.json_option
@click.pass_obj
def connections(pins: Path, as_json: bool) -> None:
    """The pairs that are open now, with the path of each direction and why."""
    pairs: list[Pair] = []
    up = True
    try:
        with dataplane.opened(pins) as planes:
            seen = kept.read_pods(pins)
            pairs = naming.pairs(planes, seen.pods if seen else ())
    except NotLoaded:
        up = False
    if as_json:
        output.print_json(pairs)
        return
    if not pairs:
        output.say("no open pairs" if up else "no open pairs: underpass is not up")
        return
    titles = (
        "CLIENT",
        "POD OR NETNS",
        "SERVER",
        "POD OR NETNS",
        "CLIENT TO SERVER",
        "SERVER TO CLIENT",
    )
    click.echo(output.columns([titles, *map(_row, pairs)]))


def _row(pair: Pair) -> tuple[str, ...]:
    return (
        str(pair.client),
        pair.client.pod or pair.client.netns,
        str(pair.server),
        pair.server.pod or pair.server.netns,
        _words(pair.client_to_server),
        _words(pair.server_to_client),
    )


def _words(direction: Direction) -> str:
    if direction.path == "shortcut":
        return f"shortcut, {output.size(direction.shortcut_bytes)}"
    if direction.reason == Reason.NO_MESSAGE.word:
        return "nothing sent yet"
    return f"tcp ({direction.reason}), {output.size(direction.shortcut_bytes)} by shortcut before"
