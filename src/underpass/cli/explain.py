"""`underpass explain`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from underpass import dataplane
from underpass import explain as words
from underpass.cli import output
from underpass.errors import NotLoaded
from underpass.model import Pair, Program, Socket


@click.command(short_help="Why traffic does or does not take the shortcut.")
@click.argument("client")
@click.argument("server", metavar="SERVER[:PORT]")
@output.json_option
@click.pass_obj
def explain(pins: Path, client: str, server: str, as_json: bool) -> None:
    """Why traffic from CLIENT to SERVER does or does not take the shortcut.

    CLIENT and SERVER are addresses as the client's socket sees them, with or without a port
    ([IPV6]:PORT for IPv6).
    """
    one, other = words.parse(client), words.parse(server)
    pairs: list[Pair] = []
    sockets: list[Socket] = []
    known: dict[int, Program] = {}
    state = "absent"
    try:
        with dataplane.opened(pins) as planes:
            state = planes[0].state
            sockets = words.merged([plane.sockets() for plane in planes])
            known = {int(p.id, 16): p for plane in reversed(planes) for p in plane.programs()}
            held = {e.cookie for plane in planes for e in plane.endpoints()}
            sockets = [replace(s, in_map=s.cookie in held and s.cookie != 0) for s in sockets]
            pairs = [pair for plane in planes for pair in plane.pairs()]
    except NotLoaded:
        pass
    findings = [
        replace(f, sentence=output.runnable(f.sentence), next_step=output.runnable(f.next_step))
        for f in words.explain(one, other, words.View(state, pairs, sockets, known))
    ]
    if as_json:
        output.print_json(
            {"client": str(one), "server": str(other), "state": state, "findings": findings}
        )
        return
    subject = None
    for finding in findings:
        if finding.subject != subject:
            subject = finding.subject
            click.echo(subject)
        click.echo(f"  {finding.path}: {finding.sentence}")
        if finding.next_step != "nothing to do":
            click.echo(f"    next: {finding.next_step}")
