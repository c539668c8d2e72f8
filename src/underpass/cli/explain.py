"""`underpass explain`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from underpass import dataplane, kept, naming
from underpass import explain as words
from underpass.cli import output
from underpass.errors import NotLoaded
from underpass.model import Pair, Program, Socket

#: A walk over the kernel's sockets can miss one while others come and go.
_LOOKS = 2


@click.command(short_help="Why traffic does or does not take the shortcut.")
@click.argument("client")
@click.argument("server", metavar="SERVER[:PORT]")
@output.json_option
@click.pass_obj
def explain(pins: Path, client: str, server: str, as_json: bool) -> None:
    """Why traffic from CLIENT to SERVER does or does not take the shortcut.

    CLIENT and SERVER are addresses as the client's socket sees them, with or without a port
    ([IPV6]:PORT for IPv6); of an open connection also as `connections` shows them. Where none is
    open it tells what policy and guard would decide, as far as that is known.
    """
    one, other = words.parse(client), words.parse(server)
    words.check(one, other)
    for _ in range(_LOOKS):
        view = _view(pins)
        findings = words.explain(one, other, view)
        if any(finding.path != "none" for finding in findings):
            break
    findings = [
        replace(f, sentence=output.runnable(f.sentence), next_step=output.runnable(f.next_step))
        for f in findings
    ]
    if as_json:
        output.print_json(
            {"client": str(one), "server": str(other), "state": view.state, "findings": findings}
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


def _view(pins: Path) -> words.View:
    """What there is to see now."""
    pairs: list[Pair] = []
    sockets: list[Socket] = []
    known: dict[int, Program] = {}
    state, policed = "absent", False
    try:
        with dataplane.opened(pins) as planes:
            state, policed = planes[0].state, planes[0].policy != 0
            sockets = words.merged([plane.sockets() for plane in planes])
            known = {int(p.id, 16): p for plane in reversed(planes) for p in plane.programs()}
            held = {e.cookie for plane in planes for e in plane.endpoints()}
            sockets = [replace(s, in_map=s.cookie in held and s.cookie != 0) for s in sockets]
            pairs = [pair for plane in planes for pair in plane.pairs()]
    except NotLoaded:
        pass
    seen = kept.read_pods(pins)
    pods = naming.by_label(seen.pods if seen else ())
    sockets = [replace(s, endpoint=naming.with_pod(s.endpoint, pods)) for s in sockets]
    pairs = [
        replace(
            pair,
            client=naming.with_pod(pair.client, pods),
            server=naming.with_pod(pair.server, pods),
        )
        for pair in pairs
    ]
    in_force = kept.read_policy(pins) if policed else None
    rules = in_force.policy if in_force else None
    return words.View(state, pairs, sockets, known, rules, pods, policed)
