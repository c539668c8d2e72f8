"""`underpass adopt`."""

from __future__ import annotations

from pathlib import Path

import click

from underpass import adoption, dataplane
from underpass.adoption import Outcome
from underpass.cli import output
from underpass.cli.interrupt import stop_on_signals
from underpass.cli.seconds import Seconds
from underpass.errors import UnderpassError
from underpass.model import Reason, plain

#: Why a pass took nothing in, and what to do.
_STILL = {
    "paused": "underpass is paused: everything stays on TCP until `underpass resume`",
    "draining": "underpass is draining: everything stays on TCP; `underpass down` finishes",
}


@click.command(short_help="Take in open connections that are on TCP, where that is safe.")
@click.option(
    "--every",
    type=Seconds(0.1),
    metavar="SECONDS",
    help="Go on until it is told to stop, one pass in this time.",
)
@output.json_option
@click.pass_obj
def adopt(pins: Path, every: float | None, as_json: bool) -> None:
    """Take in open connections of this node that are on plain TCP, where that is safe.

    They may be older than underpass, or were opened while their programs were still watched, or
    left because they streamed small messages; one that has left may come back after 10 s, and
    waits twice as long each time. `up` does one such pass itself.

    A connection that is busy just now stays for the next pass; the others are listed with the
    reason for which they stay on TCP.
    """
    with dataplane.Dataplane.open(pins) as plane:
        state = plane.state
    _tell(adoption.adopt(pins), as_json, state)
    if every is None:
        return
    with stop_on_signals() as stop:
        while not stop.wait(every):
            try:
                again = adoption.adopt(pins)
            except UnderpassError as error:  # as beside a `down`; another time
                output.warn(str(error))
                continue
            if any(o.reason is Reason.SHORTCUT for o in again):
                _tell(again, as_json)


def _tell(outcomes: list[Outcome], as_json: bool, state: str = "active") -> None:
    if as_json:
        taken, stay = adoption.summary(outcomes)
        rows = [plain(outcome) | {"reason": outcome.reason.word} for outcome in outcomes]
        output.print_json({"adopted": taken, "stay": stay, "connections": rows, "state": state})
        return
    output.say(adoption.told(outcomes) if outcomes else _STILL.get(state, adoption.told([])))
    rows = [
        (str(o.client), o.client.netns, str(o.server), o.server.netns, o.reason.word, o.detail)
        for o in outcomes
        if o.reason is not Reason.SHORTCUT
    ]
    if rows:
        titles = ("CLIENT", "NETNS", "SERVER", "NETNS", "STAYS ON TCP", "")
        click.echo(output.columns([titles, *rows]))
