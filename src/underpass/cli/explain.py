"""`underpass explain`."""

from __future__ import annotations

from pathlib import Path

import click

from underpass import explain as words
from underpass.cli import output
from underpass.dataplane import Dataplane
from underpass.errors import NotLoaded
from underpass.model import Pair, Socket


@click.command()
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
    state = "absent"
    try:
        with Dataplane.open(pins) as plane:
            state, pairs, sockets = plane.state, plane.pairs(), plane.sockets()
    except NotLoaded:
        pass
    findings = words.explain(one, other, state, pairs, sockets)
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
